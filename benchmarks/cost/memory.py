"""What does each method hold in memory, does LISA hold more after many switches, and was its peak planned?

python -m benchmarks.cost.memory

Every storage of tensors on every rank, by what it is: between two steps after the first one, after 10 and after 50
switches (one before every step; methods without switches take a step), then the peak of one longer step beside the plan
of it, and of one that begins with a switch. Static has the layers that LISA has first. Where embedding and head are
drawn, the peak is the larger of two: of a period as it comes, and of one that trains the embedding. On CPU host and
device are one: what a policy puts on the host counts too.
"""

from benchmarks.common import runs
from benchmarks.common.methods import EMBED_FROZEN, LISA, SIDE_BY_SIDE, Method, shrunk_methods
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.tables.declared import show

DRAWN = Method("lisa, embed and head drawn", "lisa", {"lisa_always_on": "rest"})
PERIOD, SHORT = 4, 16  # steps; tokens of a step that makes the time pass
POLICIES = (
    Method("lisa, always-on states 8 bit", "lisa", {"lisa_state_bits": "embed=8,head=8,rest=8"}),
    Method("lisa, always-on states on host", "lisa", {"lisa_offload": "embed,head,rest"}),
    Method("lisa, states kept", "lisa", {"lisa_state": "keep"}),
    DRAWN,
    Method("lisa, embed and head frozen", "lisa", EMBED_FROZEN),
)


def methods_of(ds_config: str, shrink: int) -> tuple[Method, ...]:
    """Everything side by side, and on one stage LISA's policies too; LISA first, whose layers static takes over."""
    others = [method for method in SIDE_BY_SIDE if method is not LISA]
    return shrunk_methods((LISA, *others, *(POLICIES if ds_config == "zero2" else ())), shrink)


def measure(method: Method, ds_config: str, layers: tuple[int, ...], arguments) -> dict:
    """One method on ranks of its own; of the ranks what the one takes that takes most."""
    config = runs.shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    with RankGroup(runs.RANKS, runs.Run, method, config, ds_config, interval=1, layers=layers) as ranks:
        found, taken = {"first_layers": ranks.call("get", "active_layers")[0], "live": {}}, 0
        for switches in (0, *arguments.switches):
            until = switches + 1 if method.kind in ("lisa", "callback") else taken + 1
            ranks.call("steps", until - taken, SHORT)
            live = max(ranks.call("live_bytes"), key=lambda parts: parts["total"])
            found["live"][str(switches)], taken = live, until
    # A step in the middle of a period, as nearly all are, has its moments before it begins.
    with RankGroup(runs.RANKS, runs.Run, method, config, ds_config, interval=PERIOD, layers=layers) as ranks:
        # Kept states come to be in as many periods as above.
        periods = arguments.switches[-1] if method.config.lisa_state == "keep" else 0
        ranks.call("steps", PERIOD * periods + 1, SHORT)
        found["drift"] = ranks.call("drift", SHORT)[0]
        peaks = [runs.peak_of(ranks, arguments.length, tries=2)]
        with_switch = max(ranks.call("peak_bytes", arguments.length))
        if method is DRAWN:
            ranks.call("steps", PERIOD - 1, SHORT)
            ranks.call("begin_with_embed", SHORT)
            ranks.call("steps", 1, SHORT)
            peaks.append(runs.peak_of(ranks, arguments.length, tries=2))
    # Where the embedding does not always train, the next period's layers may need more or less than the last one's.
    found["peak_with_switch"] = with_switch if "embed" in method.config.always_on else None
    return found | max(peaks, key=lambda one: one["peak"])


def main() -> None:
    """Measure every method under every config, one after another; print what they hold."""
    parser = runs.methods_parser(__doc__, "memory", shrink=16)
    stages = ("zero1", "zero2", "zero3")
    parser.add_argument("--configs", nargs="+", choices=stages, default=stages[1:])
    parser.add_argument("--switches", type=positive, nargs="+", default=[10, 50], help="after which to look")
    parser.add_argument("--length", type=positive, default=256, help="tokens of the step whose peak is measured")
    arguments = runs.parse(parser, 4)  # of fewer layers embedding and head cannot be drawn as often as a layer
    if arguments.switches != sorted(set(arguments.switches)):
        parser.error(f"--switches {' '.join(map(str, arguments.switches))}: each must be more than the one before")
    figures = {}
    for ds_config in arguments.configs:
        of_methods: dict[str, dict] = {}
        for method in methods_of(ds_config, arguments.shrink):
            layers = of_methods[LISA.name]["first_layers"] if of_methods else ()
            of_methods[method.name] = measure(method, ds_config, layers, arguments)
            figures[ds_config] = of_methods
            write_results(arguments.results, figures, quiet=True)  # in case a later one fails
            print(f"{ds_config}, {method.name}: measured", flush=True)
    write_results(arguments.results, figures)
    show("memory", figures)


if __name__ == "__main__":
    main()
