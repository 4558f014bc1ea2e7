"""What do ranks send each other in a step? Bytes of each collective, counted below torch.distributed.

Bytes are those of the whole tensor: of what a reduction takes in, of what an all-gather gives out. On the wire a ring
of N ranks puts, of each rank and byte, 2(N - 1)/N for an all-reduce and (N - 1)/N for everything else. What is no
weight and no gradient (flags, digests, the set of layers) stands for itself, as "control".

python -m benchmarks.cost.communication
"""

import argparse
import gc
from collections import Counter
from collections.abc import Sequence

from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.methods import LISA, SIDE_BY_SIDE, shrunk_methods
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.common.runs import RANKS, Run, methods_parser, model_of, parse, shrunk_config
from lisa_dist.ds_config import read_ds_config
from lisa_dist.zero.parameters import parameter_numel

INTERVAL = 3  # steps of a period, of which the third is an ordinary one on every stage
CONTROL = "control: "
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


class CollectiveCounter(TorchDispatchMode):
    """While it is on, bytes and calls of every collective; raises KeyError for one that it cannot count."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count the operator if it sends something, and run it."""
        if function.namespace == "c10d":
            name, whole = _COLLECTIVES[function._schema.name.removeprefix("c10d::")]
            tensors = [] if whole is None else tree_leaves(args[whole])
            # Weights, gradients and samples of them are floats, and more than one.
            if all(one.numel() == 1 or not one.is_floating_point() for one in tensors):
                name = CONTROL + name
            self.bytes[name] += sum(one.nbytes for one in tensors)
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


class Counting:
    """What a rank does: it counts one method after the other."""

    def __init__(self):
        gc.freeze()  # else DeepSpeed's collections would walk all that was imported, at every switch
        dist.barrier()  # of DeepSpeed's shared memory a rank gives up the name next, which others must have seen

    def count(self, length: int, *args, **kwargs) -> dict:
        """What an ordinary step of a run of these arguments sends, and the share of the model that trains in it."""
        run = Run(*args, interval=INTERVAL, **kwargs)
        run.steps(2 * INTERVAL - 1, length)
        run.begin()
        tokens = run._next_tokens(length)
        with CollectiveCounter() as counter:
            run.engine.backward(run.engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            run.engine.step()
        numel = {name: parameter_numel(one) for name, one in run.engine.module.named_parameters()}
        trained = [name for name, one in run.engine.module.named_parameters() if one.requires_grad]
        share = sum(numel[name] for name in trained) / sum(numel[name] for name in numel if ".lora_" not in name)
        counted, layers = dict(+counter.bytes), run.active_layers
        run.engine.destroy()
        step = {"counted": counted, "calls": dict(counter.calls), "wire": on_wire(counted, dist.get_world_size())}
        return {"active_share": share, "layers": layers, "moments": {"step": step}}


def on_wire(by_collective: dict[str, int], world: int) -> float:
    """Bytes that a rank sends, the mean of all, when every collective is a ring."""
    times = {name: 2 if "all_reduce" in name else 1 for name in by_collective}
    return sum(times[name] * size * (world - 1) / world for name, size in by_collective.items())


def ds_configs(num_elements: int) -> dict[str, str | dict]:
    """The shipped configs, and stage 3 as models meet it of which half, or nothing, is within the reuse distance."""
    found: dict[str, str | dict] = {name: name for name in ("zero1", "zero2", "zero3")}
    keeps_half = {"stage3_max_reuse_distance": num_elements // 2}
    for name, keys in {"zero3, keeps half": keeps_half, "zero3, keeps none": KEEPS_NONE}.items():
        config = read_ds_config("zero3")
        config["zero_optimization"] |= keys
        found[name] = config
    return found


def count_all(arguments: argparse.Namespace) -> dict[str, dict]:
    """Every method under every config; static trains the layers that LISA has sampled."""
    config = shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    counted: dict[str, dict] = {}
    with RankGroup(RANKS, Counting) as ranks:
        for name, ds_config in ds_configs(sum(one.numel() for one in model_of(config).parameters())).items():
            layers: Sequence[int] = ()
            methods = shrunk_methods(SIDE_BY_SIDE, arguments.shrink)
            for method in sorted(methods, key=lambda method: method is not LISA):
                found = ranks.call("count", arguments.length, method, config, ds_config, layers=layers)[0]
                counted.setdefault(name, {})[method.name] = found
                layers = layers or found["layers"]
    return counted


def main() -> None:
    """Count and write; the tables are those of the report."""
    parser = methods_parser(__doc__, "communication", shrink=16)
    parser.add_argument("--length", type=positive, default=32, help="tokens of a row")
    counted = count_all(parse(parser))
    write_results(parser.parse_args().results, {"counted": counted})


if __name__ == "__main__":
    main()
