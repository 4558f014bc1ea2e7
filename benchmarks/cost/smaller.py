"""What do smaller states and frozen layers in fewer bits hold, against their plans, and what does a switch cost then?

python -m benchmarks.cost.smaller --model .quickstart/model --shrink 1

Of each form in bf16 the bytes between two steps and at a step's peak, on one rank and on two; and seconds of a switch,
of the slowest rank, as a share of a period of 20 steps.
"""

from statistics import median

import torch

from benchmarks.common import arms
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, print_table, write_results

PERIOD, INTERVAL = 3, 20  # steps of a period as it is measured, and as its share is told
NO_MASTER = {"lisa_master": "bf16_sr"}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8"} | NO_MASTER
FORMS = {
    "AdamW, 32 bits": {},
    "8 bits": {"lisa_state_bits": "embed=8,head=8,layers=8"},
    "8 bits, no masters": {"lisa_state_bits": "embed=8,head=8,layers=8"} | NO_MASTER,
    "factored": FACTORED,
    "factored, layers 8 bits, no masters": SMALL,
    "the same, frozen layers in 8 bits": SMALL | {"lisa_frozen_bits": 8},
    "the same, frozen layers in 4 bits": SMALL | {"lisa_frozen_bits": 4},
}


class FormRun(arms.Run):
    """A run of LISA that tells of its last switch."""

    def last_switch_seconds(self) -> float:
        """Of this rank."""
        assert self.lisa is not None
        return self.lisa.records[-1].seconds


def measure(settings: dict, ranks: int, arguments) -> dict:
    """One form on so many ranks."""
    config = arms.shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    arm = arms.Arm("lisa", "lisa", settings, optim="lisa_adamw")
    with RankGroup(ranks, FormRun, arm, config, "zero2", interval=PERIOD, dtype=torch.bfloat16) as group:
        group.call("steps", PERIOD + 2, arguments.length)
        found = arms.peak_of(group, arguments.length, tries=1)  # the last step of a period: no switch is in it
        found["between_steps"] = max(parts["total"] for parts in group.call("live_bytes"))
        switches, steps = [], []
        for _ in range(arguments.switches):
            group.call("step", arguments.length)
            steps += [max(times["step"] for times in group.call("step", arguments.length)) for _ in range(PERIOD - 1)]
            switches.append(max(group.call("last_switch_seconds")))
    seconds, step = median(switches), median(steps)
    return found | {
        "switch_seconds": seconds,
        "step_seconds": step,
        "share_of_period": seconds / (seconds + INTERVAL * step),
    }


def main() -> None:
    """Measure every form; print bytes, plans and shares."""
    parser = arms.arms_parser(__doc__, "smaller", shrink=8)
    parser.add_argument("--length", type=positive, default=64, help="tokens of a step")
    parser.add_argument("--switches", type=positive, default=3)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    arguments = arms.parse(parser)
    figures = {}
    for ranks in arguments.ranks:
        for name, settings in FORMS.items():
            figures[f"{ranks} ranks, {name}"] = measure(settings, ranks, arguments)
            print(f"{ranks} ranks, {name}: measured", flush=True)
    write_results(arguments.results, figures)
    lines = [
        [
            name,
            f"{cell['between_steps'] / 2**20:.1f}",
            f"{cell['peak'] / 2**20:.1f}",
            f"{cell['planned'] / 2**20:.1f}",
            f"{100 * (cell['planned'] / cell['peak'] - 1):+.1f}%",
            f"{cell['switch_seconds']:.2f}",
            f"{100 * cell['share_of_period']:.1f}%",
        ]
        for name, cell in figures.items()
    ]
    header = ["", "MiB between steps", "at the peak", "planned", "off by", "s a switch", "of 20 steps"]
    print_table(header, lines)


if __name__ == "__main__":
    main()
