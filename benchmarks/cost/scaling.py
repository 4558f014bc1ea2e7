"""How long is a step on many GPUs, what of it waits for the network, and what is sent between nodes? By calculation.

python -m benchmarks.cost.scaling [--network 50 --nvlink 450 ...]

Layers run one after the other, each checkpointed, one row a GPU. While one computes the weights of the next are
gathered and the gradients of the last are reduced: a layer takes the longer of the two. Collectives are rings: bytes
over the slowest link, and for each hop a latency, which small gathers pay as often as large ones.
"""

from typing import Any, NamedTuple

from benchmarks.common.results import parser_of, write_results
from benchmarks.tables.rows import show
from lisa_dist.core.blocks import find_blocks, model_without_weights
from lisa_dist.memory.plan import load_model_config

MODELS, GPUS = ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"), (8, 64, 256, 1024)
SHOWN = "llama3.1-70b", (64, 1024)
NODE = 8  # GPUs
BYTES = 2  # of a weight and of a gradient
STATES = 24  # bytes that AdamW reads and writes for an element that trains, with its gradient
# Whether layers train in turn, gathers in a layer's pass, and whether a node keeps a copy of what is frozen.
WAYS = {
    "full, zero3": (False, 5, False),
    "LISA, zero3, a gather a matrix": (True, 5, False),
    "LISA, zero3": (True, 1, False),
    "LISA, zero3_hpz": (True, 1, True),
}


class Link(NamedTuple):
    """A ring of so many ranks: bytes a second, and seconds before the first byte."""

    ranks: int
    rate: float
    latency: float

    def seconds(self, nbytes: float, calls: int) -> float:
        """Of so many collectives that have these bytes in all."""
        return calls * self.latency + (self.ranks - 1) / self.ranks * nbytes / self.rate


def links(gpus: int, about: Any) -> tuple[Link, Link]:
    """The ring of all GPUs, and that of a node's."""
    in_node = min(gpus, NODE)
    inside = about.call + (in_node - 1) * about.hop
    node = Link(in_node, about.nvlink * 1e9, inside * 1e-6)
    if gpus <= NODE:
        return node, node
    hops = (gpus - gpus // NODE) * about.hop + gpus // NODE * about.hop_between
    return Link(gpus, NODE * about.network * 1e9, (about.call + hops) * 1e-6), node


def step(model: Any, gpus: int, way: tuple[bool, int, bool], about: Any) -> dict[str, float]:
    """Seconds of a step, those in which it waits for the network and its latency, and bytes between nodes."""
    in_turn, calls, shared = way
    every, node = links(gpus, about)
    blocks = find_blocks(model)
    outer = blocks.embed.numel + blocks.head.numel + blocks.rest.numel
    active = range(about.gamma) if in_turn else range(len(blocks.layers))
    flops = about.tokens / (about.tflops * 1e12 * about.utilization)
    seconds = waits = latency = between = 0.0
    for number, layer in enumerate(blocks.layers):
        trains = number in active
        weights, gather = BYTES * layer.numel, node if shared and not trains else every
        # Products: forward; then forward again, of the gradient of the input, and of that of the weights.
        for products, reduces in ((1, False), (3 if trains else 2, trains)):
            computes = 2 * products * layer.numel * flops
            sends = gather.seconds(weights, calls) + (every.seconds(weights, 1) if reduces else 0.0)
            latency += calls * gather.latency + reduces * every.latency
            between += weights * ((gather is every) + reduces)
            seconds += max(computes, sends)
            waits += max(0.0, sends - computes)
    head = every.seconds(BYTES * outer, 2) * 3  # gathered in both passes, and reduced, with nothing beside it
    seconds += 6 * blocks.head.numel * flops + head
    stepped = outer + sum(blocks.layers[number].numel for number in active)
    seconds += STATES * stepped / gpus / (about.memory * 1e9)
    between = (between + 3 * BYTES * outer) * (every.ranks - 1) / every.ranks if gpus > NODE else 0.0
    rate = gpus * about.tokens / seconds
    return {"seconds": seconds, "waits": waits + head, "latency": latency, "between": between, "tokens": rate}


def main() -> None:
    """Calculate each model, number of GPUs and way."""
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row, one a GPU")
    parser.add_argument("--gamma", type=int, default=4, help="layers that train in a period")
    assumed = {"tflops": 989, "utilization": 0.45, "memory": 3350, "nvlink": 450, "network": 50}
    assumed |= {"call": 8.4, "hop": 3.4, "hop_between": 9.6}  # microseconds
    units = "of a GPU: Tflop/s of bf16, part of them, GB/s of memory, of NVLink, of its adapter; us of a collective"
    for name, value in assumed.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=units)
    arguments = parser.parse_args()
    rows = []
    for name in MODELS:
        model = model_without_weights(load_model_config(name))
        rows += [(name, way, gpus, step(model, gpus, how, arguments)) for gpus in GPUS for way, how in WAYS.items()]
    shown = [row[1:] for row in rows if row[0] == SHOWN[0] and row[2] in SHOWN[1]]
    figures = {"assumed": {one: getattr(arguments, one) for one in ("tokens", "gamma", *assumed)}}
    figures |= {"rows": rows, "shown": shown}
    write_results(arguments.results, figures)
    show("scaling_70b", figures)


if __name__ == "__main__":
    main()
