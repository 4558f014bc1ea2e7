"""Full training, LoRA and LISA on one GPU: peak memory, tokens a second, and the share of the GPU's arithmetic.

python -m benchmarks.cost.gpu
python -m benchmarks.cost.gpu --rehearse     # the same on a CPU, with models small enough for it

Shapes of LLaMA-2-7B and Llama-3.1-8B with random weights, bf16, one row of 2048 tokens; each arm in a process of its
own, so that the peak is its own. Full training of these does not fit one GPU of 80 GB: what it says is kept, and it is
compared on the 7B shape with 12 of its layers, one of them active. Nothing is checkpointed where an arm does not say
so. Arms run by turns through the shapes, the most telling first, until time is up. Static has the layers that LISA
has. LISA's peak is the larger of two periods; where embedding and head are drawn, the second trains the embedding. No
network is needed once the packages are there.
"""

import argparse
import itertools
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks.common import arms
from benchmarks.common.ranks import RankError, RankGroup
from benchmarks.common.results import RESULTS, parser_of, positive, print_table, write_results
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.selection import BlockSelection

EIGHT = {"lisa_state_bits": "embed=8,head=8,layers=8"}
SIX_BYTES = arms.Arm("lisa, 6 bytes", "lisa", EIGHT | {"lisa_master": "bf16_sr"}, optim="lisa_adamw")
DRAWN = arms.Arm("lisa, drawn", "lisa", {"lisa_always_on": "rest"})
ON_HOST = arms.Arm("lisa, always on, on host", "lisa", {"lisa_offload": "embed,head,rest"})
ENDS_FROZEN = arms.Arm("lisa, embed and head frozen", "lisa", arms.EMBED_FROZEN)
LISA_ADAMW = arms.Arm("lisa, lisa_adamw", "lisa", optim="lisa_adamw")
ONE = {"lisa_activated_layers": 1}
GAMMA_1, STATIC_1, CALLBACK_1 = (arms.Arm(f"{name}, gamma 1", name, ONE) for name in ("lisa", "static", "callback"))
CHECKPOINTED = tuple(replace(arm, name=f"{arm.name}, checkpointed", checkpointed="all") for arm in (arms.FULL, GAMMA_1))
# Of each shape: its name, layers (None: all), and the arms; the most telling first, in case time is short.
POLICIES = (
    arms.LISA,
    arms.LORA_16,
    arms.FULL,
    SIX_BYTES,
    arms.STATIC,
    DRAWN,
    arms.LORA_128,
    ON_HOST,
    ENDS_FROZEN,
    LISA_ADAMW,
)
SHAPES = (
    ("llama2-7b", 12, (arms.FULL, GAMMA_1, arms.LORA_16, STATIC_1, CALLBACK_1, *CHECKPOINTED)),
    ("llama2-7b", None, POLICIES),
    ("llama3.1-8b", None, POLICIES),
)
# Dense bf16, in floating-point operations a second, by a part of the card's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
WARMUP, INTERVAL = 2, 8


def attention() -> str:
    """flash-attn where it is installed and there is a GPU for it, else torch's own, which has its kernel too."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def seeded(arm: arms.Arm, config) -> arms.Arm:
    """The same arm; if it draws embedding and head, with a seed that draws neither first, and then the embedding."""
    if arm is not DRAWN:
        return arm
    blocks = find_blocks(arms.model_of(config))
    for seed in itertools.count():
        candidate = replace(arm, settings=arm.settings | {"lisa_seed": seed})
        selection = BlockSelection(candidate.config, blocks)
        if not selection.sample(0).blocks and selection.sample(1).blocks == ("embed",):
            return candidate


def measure(arm: arms.Arm, config, layers: tuple[int, ...], arguments: argparse.Namespace) -> dict:
    """Steps of one period and the peak of one more; of LISA a switch and the next period's peak. `layers`: static's."""
    kind = {"rows": arguments.rows, "dtype": torch.bfloat16, "interval": INTERVAL, "attention": attention()}
    length, tokens = arguments.length, arguments.rows * arguments.length
    with RankGroup(1, arms.Run, seeded(arm, config), config, "zero2", layers=layers, **kind) as ranks:
        ranks.call("steps", WARMUP, length)
        steps = [ranks.call("step", length)[0] for _ in range(INTERVAL - WARMUP - 1)]
        active, blocks = ranks.call("get", "active_layers")[0], ranks.call("get", "active_blocks")[0]
        found = {
            "steps": steps,
            "tokens": tokens,
            "flops": arms.flops_of_step(config, arm, tokens, length, active, blocks),
            "active_layers": active,
            "live": ranks.call("live_bytes")[0],
            "switch": None,
        }
        peaks = [arms.peak_of(ranks, length)]
        if arm.method == "lisa":
            found["switch"] = ranks.call("step", length)[0]["begin"]
            peaks.append(arms.peak_of(ranks, length))
        return max(peaks, key=lambda one: one["peak"]) | found


def by_turns() -> list[tuple[int, arms.Arm]]:
    """Shape by number and arm, in the order in which they run: the first of every shape, the second, and so on."""
    numbered = [[(number, arm) for arm in of_shape] for number, (_, _, of_shape) in enumerate(SHAPES)]
    return [one for turn in itertools.zip_longest(*numbered) for one in turn if one is not None]


def run_all(arguments: argparse.Namespace, peak_flops: float | None) -> dict:
    """Every arm of every shape until time is up; what could not run says why."""
    figures, started, configs = {}, time.monotonic(), []
    for model, num_layers, of_shape in SHAPES:
        small = arguments.rehearse
        configs.append(arms.shrunk_config(model, 64 if small else 1, 8 if small else num_layers))
        figures[f"{model}, {num_layers or 'all'} layers"] = {arm.name: {"not_run": "not reached"} for arm in of_shape}
    for number, arm in by_turns():
        title, of_shape = list(figures.items())[number]
        lisa = next(found for name, found in of_shape.items() if name.startswith("lisa"))
        if time.monotonic() - started > 60 * arguments.minutes:
            of_shape[arm.name] = {"not_run": "time was up"}
        elif arm.method == "static" and "not_run" in lisa:
            of_shape[arm.name] = {"not_run": "LISA, whose layers it has, did not run"}
        else:
            try:
                of_shape[arm.name] = measure(arm, configs[number], lisa.get("active_layers", ()), arguments)
            except RankError as error:  # of full training it is expected
                why = {"OutOfMemoryError": "out of memory"}.get(error.kind, str(error)[-600:])
                of_shape[arm.name] = {"not_run": why}
        cells = cells_of(of_shape[arm.name], next(iter(of_shape.values())), peak_flops)
        named = (f"{name} {cell}" for name, cell in zip(HEADER, cells, strict=True))
        print(f"{title}, {arm.name}: {', '.join(named) if all(cells) else cells[0]}", flush=True)
        if arguments.results:
            write_results(arguments.results, figures, quiet=True)
    return figures


def cells_of(found: dict, first: dict, peak_flops: float | None) -> list[str]:
    """A row of the table; `first` is the arm that speeds are compared with, if it ran."""
    if "not_run" in found:
        return [found["not_run"].splitlines()[-1], *[""] * (len(HEADER) - 1)]
    each = [step["step"] for step in found["steps"]]
    seconds = median(each)
    of_first = None if "not_run" in first else median(step["step"] for step in first["steps"]) / seconds
    return [
        f"{found['peak'] / 2**30:.2f}",
        "-" if found["planned"] is None else f"{found['planned'] / found['peak'] - 1:+.1%}",
        f"{found['tokens'] / seconds:.0f}",
        f"{min(each):.3f}-{max(each):.3f}",
        "-" if of_first is None else f"{of_first:.2f}",
        *(f"{median(step[phase] for step in found['steps']):.3f}" for phase in arms.PHASES[1:]),
        "-" if found["switch"] is None else f"{found['switch']:.3f}",
        "-" if peak_flops is None else f"{found['flops'] / seconds / peak_flops:.1%}",
    ]


HEADER = ("peak GiB", "planned", "tokens/s", "step s", "of first", *arms.PHASES[1:], "switch s", "MFU")


def main() -> None:
    """Measure; print a line of each arm as it ends, and a table of each shape."""
    parser = parser_of(__doc__, "gpu")
    parser.set_defaults(results=None)
    parser.add_argument("--rows", type=positive, default=1)
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a row")
    parser.add_argument("--minutes", type=float, default=8, help="after which no further arm is begun")
    parser.add_argument("--peak_tflops", type=float, help="dense bf16 of the card, where it is not known here")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, a 64th of the width; writes no --results")
    arguments = parser.parse_args()
    if arguments.results is None and not arguments.rehearse:
        arguments.results = RESULTS / "gpu.json"
    if arguments.peak_tflops is not None and arguments.peak_tflops <= 0:
        parser.error(f"--peak_tflops {arguments.peak_tflops:g}: must be more than 0")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; --rehearse runs the same on a CPU, with small models")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    known = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    peak_flops = 1e12 * arguments.peak_tflops if arguments.peak_tflops else known
    print(f"on {card}, {attention()}, bf16, {arguments.rows} x {arguments.length} tokens")
    print("MFU counts the operations that a method cannot do without.")
    figures = run_all(arguments, peak_flops)
    for shape, of_arms in figures.items():
        first = next(iter(of_arms.values()))
        print_table([shape, *HEADER], [[name, *cells_of(found, first, peak_flops)] for name, found in of_arms.items()])


if __name__ == "__main__":
    main()
