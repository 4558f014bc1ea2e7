"""How long does a step take by each method, in what, and how near is that to what the arithmetic allows?

python -m benchmarks.cost.speed

The methods take turns, a step each, in an order that is sampled anew every round, on ranks of their own that wait
otherwise. LISA stays in its first period meanwhile, with the layers that static has too; then it switches, and the two
take turns once more. Ratios are of steps of the same round: their median, and the least and the most.
"""

import argparse
import random
from dataclasses import replace

from benchmarks.common import methods as registry
from benchmarks.common import runs
from benchmarks.common.methods import EMBED_FROZEN, FULL, LISA, SIDE_BY_SIDE, STATIC, Method, shrunk_methods
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.tables.rows import show
from lisa_dist.core.activation_checkpointing import AUTO, fewest_layers

WARMUP = 2
# Beside what is compared on every stage: embeddings frozen, and layers whose activations are computed again.
FROZEN = tuple(Method(f"{kind}, embed frozen", kind, EMBED_FROZEN) for kind in ("static", "lisa"))
CHECKPOINTED = (
    *map(registry.checkpointed, (FULL, STATIC, LISA)),
    replace(LISA, name="lisa, checkpointed auto", checkpointed=AUTO),
)
LIMIT = {"static, embed frozen": "lisa, embed frozen", "static, checkpointed": "lisa, checkpointed", "static": "lisa"}


def set_checkpointing(group: RankGroup, num_layers: int, length: int) -> int:
    """As `--checkpointed_layers auto` does, with a device half way between checkpointing none and all."""

    def planned(layers: int) -> int:
        return max(group.call("planned_bytes", length, layers))

    fewest = fewest_layers(planned, num_layers, (planned(0) + planned(num_layers)) // 2)
    group.call("checkpoint", fewest)
    return fewest


def take_turns(groups: dict[str, RankGroup], names: list[str], length: int, rounds: int) -> dict[str, list[dict]]:
    """Rounds of a step each, every round in an order of its own; of the ranks the slowest counts."""
    taken: dict[str, list[dict]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            taken[name].append(max(groups[name].call("step", length), key=lambda times: times["step"]))
    return taken


def compare(compared: tuple[Method, ...], ds_config: str, arguments) -> dict:
    """Figures of every method under one config, each on a group of ranks."""
    config, length = runs.shrunk_config(arguments.model, arguments.shrink, arguments.num_layers), arguments.length
    # The step after all rounds is LISA's first with a switch.
    fixed = {"rows": arguments.rows, "interval": WARMUP + arguments.repeats}
    checkpointed: dict[str, int | str] = {method.name: method.checkpointed for method in compared}
    names, groups = [method.name for method in compared], {}
    for method in sorted(compared, key=lambda method: method.kind != "lisa"):
        twin = groups.get(LIMIT.get(method.name))
        layers = () if twin is None else twin.call("get", "active_layers")[0]
        built = replace(method, checkpointed=0) if method.checkpointed == AUTO else method
        group = groups[method.name] = RankGroup(runs.RANKS, runs.Run, built, config, ds_config, layers=layers, **fixed)
        if method.checkpointed == AUTO:
            checkpointed[method.name] = set_checkpointing(group, config.num_hidden_layers, length)
        group.call("steps", WARMUP, length)
    taken = take_turns(groups, names, length, arguments.repeats)
    active = {name: group.call("get", "active_layers")[0] for name, group in groups.items()}
    for name in names:
        if name.startswith("lisa"):
            groups[name].call("step", length)  # the first of a period
    parameters = {name: group.call("numel")[0] for name, group in groups.items()}
    pair = [name for name in ("static", "lisa") if name in names]
    after = take_turns(groups, pair, length, arguments.repeats)
    for group in groups.values():
        group.close()
    return {
        method.name: {
            "parameters": parameters[method.name],
            "steps": taken[method.name],
            "after_a_switch": after.get(method.name, []),
            "flops": runs.flops_of_step(config, method, arguments.rows * length, length, active[method.name]),
            "checkpointed_layers": checkpointed[method.name],
        }
        for method in compared
    }


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
        # Where what a step has to do besides arithmetic weighs less.
        wider = argparse.Namespace(**vars(arguments) | {"shrink": arguments.shrink // 2})
        sections[f"{ds_config}, twice the width"] = ((STATIC, LISA), ds_config, wider)
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
