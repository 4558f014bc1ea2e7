"""How long does a step take by each method, in what, and how near is that to what the arithmetic allows?

python -m benchmarks.cost.speed

The methods take turns, a step each, in an order that is sampled anew every round, on ranks of their own that wait
otherwise. LISA stays in its first period meanwhile, with the layers that static has too; then it switches, and the two
take turns once more. Ratios are of steps of the same round: their median, and the least and the most.
"""

import argparse
import random
from dataclasses import replace
from statistics import median

from benchmarks.common import runs
from benchmarks.common.methods import EMBED_FROZEN, FULL, LISA, SIDE_BY_SIDE, STATIC, Method, shrunk_methods
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.tables.declared import show
from lisa_dist.core.checkpointing import AUTO, fewest_layers

WARMUP = 2
# Beside what is compared on every stage: embeddings frozen, and layers whose activations are computed again.
FROZEN = (
    Method("static, embed frozen", "static", EMBED_FROZEN),
    Method("lisa, embed frozen", "lisa", EMBED_FROZEN),
)
CHECKPOINTED = (
    replace(FULL, name="full, checkpointed", checkpointed="all"),
    replace(STATIC, name="static, checkpointed", checkpointed="all"),
    replace(LISA, name="lisa, checkpointed", checkpointed="all"),
    replace(LISA, name="lisa, checkpointed auto", checkpointed=AUTO),
)
LIMIT = {"static, embed frozen": "lisa, embed frozen", "static, checkpointed": "lisa, checkpointed", "static": "lisa"}


class Comparison:
    """Arms under one DeepSpeed config, each on a group of ranks."""

    def __init__(self, compared: tuple[Method, ...], ds_config: str, arguments):
        self._arguments, self._length = arguments, arguments.length
        self.config = runs.shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
        self._interval = WARMUP + arguments.repeats  # the step after them is LISA's first with a switch
        self.groups: dict[str, RankGroup] = {}
        self.checkpointed: dict[str, int | str] = {method.name: method.checkpointed for method in compared}
        for method in sorted(compared, key=lambda method: method.kind != "lisa"):
            twin = self.groups.get(LIMIT.get(method.name))
            layers = () if twin is None else twin.call("get", "active_layers")[0]
            fixed = {"rows": arguments.rows, "interval": self._interval, "layers": layers}
            built = replace(method, checkpointed=0) if method.checkpointed == AUTO else method
            group = self.groups[method.name] = RankGroup(runs.RANKS, runs.Run, built, self.config, ds_config, **fixed)
            if method.checkpointed == AUTO:
                self.checkpointed[method.name] = self._set_checkpointing(group)
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


def compare(compared: tuple[Method, ...], ds_config: str, arguments) -> dict:
    """Figures of every method under one config."""
    comparison = Comparison(compared, ds_config, arguments)
    names = [method.name for method in compared]
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
    for method in compared:
        figures[method.name] = {
            "parameters": parameters[method.name],
            "steps": taken[method.name],
            "after_a_switch": after.get(method.name, []),
            "switch": switched[method.name]["begin"] if method.name in switched else None,
            "tokens_a_second": runs.RANKS * tokens / median(one["step"] for one in taken[method.name]),
            "flops": runs.flops_of_step(comparison.config, method, tokens, arguments.length, layers[method.name]),
            "checkpointed_layers": comparison.checkpointed[method.name],
        }
    return figures


def wider(arguments):
    """The same with a model of twice the width, where what a step has to do besides arithmetic weighs less."""
    return argparse.Namespace(**vars(arguments) | {"shrink": arguments.shrink // 2})


def main() -> None:
    """Compare on every stage, and on one the rest too; print the tables."""
    parser = runs.methods_parser(__doc__, "speed", shrink=16)
    stages = ("zero1", "zero2", "zero3")
    parser.add_argument("--configs", nargs="+", choices=stages, default=stages)
    parser.add_argument("--rows", type=positive, default=1, help="of a rank")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a row")
    parser.add_argument("--repeats", type=positive, default=9)
    arguments = runs.parse(parser)
    if arguments.shrink % 2:
        parser.error(
            f"--shrink {arguments.shrink}: static and LISA are compared at half of it too; take an even number"
        )
    side_by_side = shrunk_methods(SIDE_BY_SIDE, arguments.shrink)
    sections = {ds_config: (side_by_side, ds_config, arguments) for ds_config in arguments.configs}
    for ds_config in arguments.configs:
        sections[f"{ds_config}, twice the width"] = ((STATIC, LISA), ds_config, wider(arguments))
    more = arguments.configs[len(arguments.configs) // 2]
    sections[f"{more}, frozen embeddings and checkpointing"] = ((FULL, *FROZEN, *CHECKPOINTED), more, arguments)
    figures = {}
    for title, section in sections.items():
        figures[title] = compare(*section)
        write_results(arguments.results, figures, quiet=True)  # in case a later one fails
        print(f"{title}: measured", flush=True)
    write_results(arguments.results, figures)
    show("speed", figures)


if __name__ == "__main__":
    main()
