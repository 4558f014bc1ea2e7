"""How long does a step take by each method, in what, and how near is that to what the arithmetic allows?

python -m benchmarks.cost.speed

The arms take turns, a step each, in an order that is drawn anew every round, on ranks of their own that wait otherwise.
LISA stays in its first period meanwhile, with the layers that static has too; then it switches, and the two take turns
once more. Ratios are of steps of the same round: their median, and the least and the most.
"""

import argparse
import random
from dataclasses import replace
from statistics import median

from benchmarks.common import arms
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.tables.show import show
from lisa_dist.core.checkpointing import AUTO, fewest_layers

WARMUP = 2
# Beside what is compared on every stage: embeddings frozen, and layers whose activations are computed again.
FROZEN = (
    arms.Arm("static, embed frozen", "static", arms.EMBED_FROZEN),
    arms.Arm("lisa, embed frozen", "lisa", arms.EMBED_FROZEN),
)
CHECKPOINTED = (
    replace(arms.FULL, name="full, checkpointed", checkpointed="all"),
    replace(arms.STATIC, name="static, checkpointed", checkpointed="all"),
    replace(arms.LISA, name="lisa, checkpointed", checkpointed="all"),
    replace(arms.LISA, name="lisa, checkpointed auto", checkpointed=AUTO),
)
LIMIT = {"static, embed frozen": "lisa, embed frozen", "static, checkpointed": "lisa, checkpointed", "static": "lisa"}


class Comparison:
    """Arms under one DeepSpeed config, each on a group of ranks."""

    def __init__(self, compared: tuple[arms.Arm, ...], ds_config: str, arguments):
        self._arguments, self._length = arguments, arguments.length
        self.config = arms.shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
        self._interval = WARMUP + arguments.repeats  # the step after them is LISA's first with a switch
        self.groups: dict[str, RankGroup] = {}
        self.checkpointed: dict[str, int | str] = {arm.name: arm.checkpointed for arm in compared}
        for arm in sorted(compared, key=lambda arm: arm.method != "lisa"):
            twin = self.groups.get(LIMIT.get(arm.name))
            layers = () if twin is None else twin.call("get", "active_layers")[0]
            fixed = {"rows": arguments.rows, "interval": self._interval, "layers": layers}
            built = replace(arm, checkpointed=0) if arm.checkpointed == AUTO else arm
            group = self.groups[arm.name] = RankGroup(arms.RANKS, arms.Run, built, self.config, ds_config, **fixed)
            if arm.checkpointed == AUTO:
                self.checkpointed[arm.name] = self._set_checkpointing(group)
            group.call("steps", WARMUP, self._length)

    def _set_checkpointing(self, group: RankGroup) -> int:
        """As `--checkpointed_layers auto` does, with a device half way between checkpointing none and all."""
        count = self.config.num_hidden_layers

        def planned(layers: int) -> int:
            return max(group.call("planned_bytes", self._length, layers))

        fewest = fewest_layers(planned, count, (planned(0) + planned(count)) // 2)
        group.call("checkpoint", fewest)
        return fewest

    def take_turns(self, names: list[str]) -> dict[str, list[dict]]:
        """Rounds of a step each, every round in an order of its own; of the ranks the slowest counts."""
        taken: dict[str, list[dict]] = {name: [] for name in names}
        order = random.Random(0)
        for _ in range(self._arguments.repeats):
            for name in order.sample(names, len(names)):
                taken[name].append(max(self.groups[name].call("step", self._length), key=lambda times: times["step"]))
        return taken

    def close(self) -> None:
        for group in self.groups.values():
            group.close()


def compare(compared: tuple[arms.Arm, ...], ds_config: str, arguments) -> dict:
    """Figures of every arm under one config."""
    comparison = Comparison(compared, ds_config, arguments)
    names = [arm.name for arm in compared]
    taken = comparison.take_turns(names)
    layers = {name: group.call("get", "active_layers")[0] for name, group in comparison.groups.items()}
    switched = {name: max(comparison.groups[name].call("step", arguments.length), key=lambda times: times["begin"])
                for name in names if name.startswith("lisa")}  # fmt: skip
    parameters = {name: group.call("numel")[0] for name, group in comparison.groups.items()}
    pair = [name for name in ("static", "lisa") if name in names]
    after = comparison.take_turns(pair) if pair else {}
    comparison.close()
    tokens = arguments.rows * arguments.length
    figures = {}
    for arm in compared:
        figures[arm.name] = {
            "parameters": parameters[arm.name],
            "steps": taken[arm.name],
            "after_a_switch": after.get(arm.name, []),
            "switch": switched[arm.name]["begin"] if arm.name in switched else None,
            "tokens_a_second": arms.RANKS * tokens / median(one["step"] for one in taken[arm.name]),
            "flops": arms.flops_of_step(comparison.config, arm, tokens, arguments.length, layers[arm.name]),
            "checkpointed_layers": comparison.checkpointed[arm.name],
        }
    return figures


def wider(arguments):
    """The same with a model of twice the width, where what a step has to do besides arithmetic weighs less."""
    return argparse.Namespace(**vars(arguments) | {"shrink": arguments.shrink // 2})


def main() -> None:
    """Compare on every stage, and on one the rest too; print the tables."""
    parser = arms.arms_parser(__doc__, "speed", shrink=16)
    stages = ("zero1", "zero2", "zero3")
    parser.add_argument("--configs", nargs="+", choices=stages, default=stages)
    parser.add_argument("--rows", type=positive, default=1, help="of a rank")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a row")
    parser.add_argument("--repeats", type=positive, default=9)
    arguments = arms.parse(parser)
    if arguments.shrink % 2:
        parser.error(
            f"--shrink {arguments.shrink}: static and LISA are compared at half of it too; take an even number"
        )
    side_by_side = arms.shrunk_arms(arms.SIDE_BY_SIDE, arguments.shrink)
    sections = {ds_config: (side_by_side, ds_config, arguments) for ds_config in arguments.configs}
    for ds_config in arguments.configs:
        sections[f"{ds_config}, twice the width"] = ((arms.STATIC, arms.LISA), ds_config, wider(arguments))
    more = arguments.configs[len(arguments.configs) // 2]
    sections[f"{more}, frozen embeddings and checkpointing"] = ((arms.FULL, *FROZEN, *CHECKPOINTED), more, arguments)
    figures = {}
    for title, section in sections.items():
        figures[title] = compare(*section)
        write_results(arguments.results, figures, quiet=True)  # in case a later one fails
        print(f"{title}: measured", flush=True)
    write_results(arguments.results, figures)
    show("speed", figures)


if __name__ == "__main__":
    main()
