"""What do ranks send each other in a step? Bytes of each collective: counted, and by a formula; both must be equal.

Bytes are those of the whole tensor: of what a reduction takes in, of what an all-gather gives out. On the wire a ring
of N ranks puts, of each rank and byte, 2(N - 1)/N for an all-reduce and (N - 1)/N for everything else. What is no
weight and no gradient (norms, flags, digests, the set of layers) stands for itself, as "control". The formulas, and
what they know of DeepSpeed, are in traffic.py.

python -m benchmarks.cost.communication
"""

import argparse
import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.methods import FULL, LISA, SIDE_BY_SIDE, shrunk_methods
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.common.runs import RANKS, Run, methods_parser, model_of, parse, shrunk_config
from benchmarks.cost.traffic import (
    CONTROL,
    PERIOD,
    Layout,
    Settings,
    bytes_by_formula,
    layout_of,
    mean_of_period,
    on_wire,
)
from benchmarks.tables.declared import show
from lisa_dist.ds_config import read_ds_config

INTERVAL = 3  # steps of a period: the first, the second, and an ordinary one
LARGE_WORLD = 8  # GPUs of the large model
MOMENTS = ("switch", "first step", "second step", "step")
KEEPS_NONE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
# Operator: what it is called, and which of its arguments is the whole.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_allgather_base_": ("all_gather_into_tensor", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather_coalesced", 0),
    "barrier": ("barrier", None),
}


# Counting


class CollectiveCounter(TorchDispatchMode):
    """While it is on, bytes and calls of every collective of this process, whoever asks for it.

    It sees torch's own operators, below torch.distributed and deepspeed.comm. Raises KeyError for one that it cannot
    count.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count the operator if it sends something, and run it."""
        if function.namespace == "c10d":
            name, whole = _COLLECTIVES[function._schema.name.removeprefix("c10d::")]
            tensors = [] if whole is None else list(_tensors_of(args[whole]))
            # Weights, gradients and samples of them are floats, and more than one.
            if all(one.numel() == 1 or not one.is_floating_point() for one in tensors):
                name = CONTROL + name
            self.bytes[name] += sum(one.nbytes for one in tensors)
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def _tensors_of(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for one in value:
            yield from _tensors_of(one)


class CountedRun(Run):
    """A method whose steps are counted."""

    def count(self, length: int) -> dict:
        """Take a period of INTERVAL steps and the next: what its moments send, and the layers of both.

        These are MOMENTS of LISA, and of the other methods, whose steps are all alike from the third on, a step.
        """
        self.steps(INTERVAL, length)
        was = self.active_layers
        with CollectiveCounter() as counter:
            self.begin()
        counted = {"was": was, "active": self.active_layers, "switch": _sent(counter)}
        for number, moment in enumerate(MOMENTS[1:] if self.lisa else MOMENTS[-1:]):
            if number:
                self.begin()
            tokens = self._next_tokens(length)
            with CollectiveCounter() as counter:
                self.engine.backward(self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
                self.engine.step()
            counted[moment] = _sent(counter)
        return counted


class Counting:
    """What a rank does: it counts one method after the other."""

    def __init__(self):
        gc.freeze()  # else DeepSpeed's collections would walk all that was imported, at every switch
        dist.barrier()  # of DeepSpeed's shared memory a rank gives up the name next, which others must have seen

    def count(self, length: int, *args, **kwargs) -> dict:
        """What a run of these arguments sends, by `CountedRun.count`."""
        run = CountedRun(*args, **kwargs)
        counted = run.count(length)
        run.engine.destroy()
        return counted


def _sent(counter: CollectiveCounter) -> dict[str, dict[str, int]]:
    return {"bytes": dict(+counter.bytes), "calls": dict(counter.calls)}


# The script


def ds_configs(num_elements: int) -> dict[str, str | dict]:
    """The shipped configs, and stage 3 as models meet it of which half, or nothing, is within the reuse distance."""
    found: dict[str, str | dict] = {name: name for name in ("zero1", "zero2", "zero3")}
    keeps_half = {"stage3_max_reuse_distance": num_elements // 2}
    for name, keys in {"zero3, keeps half": keeps_half, "zero3, keeps none": KEEPS_NONE}.items():
        config = read_ds_config("zero3")
        config["zero_optimization"] |= keys
        found[name] = config
    return found


@dataclass(frozen=True)
class Compared:
    """A method under one config: what each rank has counted, and the formula."""

    layout: Layout
    counted: list[dict]
    formula: dict[str, Counter]

    def rows(self) -> Iterator[tuple[str, str, list[int], int]]:
        """Moment, collective, bytes that each rank has counted, bytes by the formula."""
        for moment, by_collective in self.formula.items():
            names = {*by_collective, *(name for one in self.counted for name in one[moment]["bytes"])}
            for name in sorted(names, key=lambda name: (name.startswith(CONTROL), name)):
                yield moment, name, [one[moment]["bytes"].get(name, 0) for one in self.counted], by_collective[name]

    def differs(self) -> bool:
        """Whether any rank has counted anything else than the formula says."""
        return any(set(counted) != {formula} for _, _, counted, formula in self.rows())

    def figures(self) -> dict:
        """For the results, in bytes; `wire`: what a rank sends of it in rings."""
        moments = {
            moment: {
                "counted": self.counted[0][moment]["bytes"],
                "formula": dict(+found),
                "calls": self.counted[0][moment]["calls"],
                "wire": on_wire(found, len(self.counted)),
            }
            for moment, found in self.formula.items()
        }
        return {"active_share": self.layout.active_share, "equal": not self.differs(), "moments": moments}


def compare_all(arguments: argparse.Namespace) -> dict[str, dict[str, Compared]]:
    """Every method under every config; static trains the layers that LISA has drawn."""
    model = (arguments.model, arguments.shrink, arguments.num_layers)
    config = shrunk_config(*model)
    configs, counted = ds_configs(sum(one.numel() for one in model_of(config).parameters())), {}
    side_by_side = shrunk_methods(SIDE_BY_SIDE, arguments.shrink)
    with RankGroup(RANKS, Counting) as ranks:
        for name, ds_config in configs.items():
            layers: Sequence[int] = ()
            for method in sorted(side_by_side, key=lambda method: method is not LISA):
                settings = {"layers": layers, "interval": INTERVAL}
                found = ranks.call("count", arguments.length, method, config, ds_config, **settings)
                counted[name, method.name], layers = found, layers or found[0]["active"]
    compared: dict[str, dict[str, Compared]] = {}
    layouts: dict[tuple, Layout] = {}
    for name, ds_config in configs.items():
        settings = Settings.of(ds_config, config, RANKS, torch.float32)
        for method in side_by_side:
            found = counted[name, method.name]
            was, active = found[0]["was"], found[0]["active"]
            key = method.name, active
            layouts[key] = layout = layouts.get(key) or layout_of(method, *model, active)
            formula = bytes_by_formula(method, layout, settings, was, active)
            compared.setdefault(name, {})[method.name] = Compared(layout, found, formula)
    return compared


def at_full_size(model: str) -> dict[str, dict]:
    """By the formula alone: bytes of a step of a model as it is, under the shipped configs, in bf16."""
    found: dict[str, dict] = {}
    for method in (FULL, LISA):
        gamma = method.config.lisa_activated_layers
        was, active = range(gamma), range(gamma, 2 * gamma)  # all layers are alike
        layout = layout_of(method, model, 1, None, active)
        for name in ("zero1", "zero2", "zero3"):
            settings = Settings.of(name, shrunk_config(model), LARGE_WORLD, torch.bfloat16)
            moments = bytes_by_formula(method, layout, settings, was, active)
            found.setdefault(name, {})[method.name] = {
                "active_share": layout.active_share,
                "step": dict(moments["step"]),
                "wire": on_wire(moments["step"], LARGE_WORLD),
                "mean_of_period": mean_of_period(moments, LARGE_WORLD),
            } | ({"switch": dict(moments["switch"])} if method is LISA else {})
    return found


def main() -> None:
    """Count, compare, print, write; ends with 1 where a number differs."""
    parser = methods_parser(__doc__, "communication", shrink=16)
    parser.add_argument("--length", type=positive, default=32, help="tokens of a row")
    about_large = f"of this model, as it is, the formula gives the bytes on {LARGE_WORLD} GPUs"
    parser.add_argument("--large", default="llama2-70b", help=about_large)
    arguments = parse(parser)
    compared = compare_all(arguments)
    settings = {name: getattr(arguments, name) for name in ("shrink", "num_layers", "length")}
    figures = {
        "settings": settings | {"model": Path(arguments.model).name, "ranks": RANKS, "period": PERIOD},
        "counted": {
            name: {method: one.figures() for method, one in methods.items()} for name, methods in compared.items()
        },
        "by_formula_alone": {f"{Path(arguments.large).name}, {LARGE_WORLD} GPUs, bf16": at_full_size(arguments.large)},
    }
    write_results(arguments.results, figures)
    show("communication", figures)
    differ = [
        f"{method} under {name}, {moment}, {collective}: counted {counted}, by the formula {formula}"
        for name, methods in compared.items()
        for method, one in methods.items()
        for moment, collective, counted, formula in one.rows()
        if set(counted) != {formula}
    ]
    if differ:
        sys.exit("\n".join(["counted and formula differ:", *differ]))


if __name__ == "__main__":
    main()
