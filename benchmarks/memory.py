"""What does each method hold in memory, does LISA hold more after many switches, and was its peak planned?

python benchmarks/memory.py

Every storage of tensors on every rank, by what it is: between two steps after the first one, after 10 and after 50
switches (one before every step; methods without switches take a step), then the peak of one longer step beside the plan
of it, and of one that begins with a switch. Static has the layers that LISA has first. Where embedding and head are
drawn, the peak is the larger of two: of a period as it comes, and of one that trains the embedding. On CPU host and
device are one: what a policy puts on the host counts too.
"""

from pathlib import Path

import arms
from arms import EMBED_FROZEN, LISA, Arm, Run, parsed, shrunk_arms, shrunk_config
from bench import group_parser, positive, print_table, stacked_bars, write_results
from rank_group import RankGroup

DRAWN = Arm("lisa, embed and head drawn", "lisa", {"lisa_always_on": "rest"})
PERIOD, SHORT = 4, 16  # steps; tokens of a step that makes the time pass
POLICIES = (
    Arm("lisa, always-on states 8 bit", "lisa", {"lisa_state_bits": "embed=8,head=8,rest=8"}),
    Arm("lisa, always-on states on host", "lisa", {"lisa_offload": "embed,head,rest"}),
    Arm("lisa, states kept", "lisa", {"lisa_state": "keep"}),
    DRAWN,
    Arm("lisa, embed and head frozen", "lisa", EMBED_FROZEN),
)
KINDS = ("weights", "gradients", "masters", "moments", "other")
HEADER = ("held", "since first step", "of static", "peak", "planned", "peak with a switch", "asleep, changed")
MIB = 2**20


def arms_of(ds_config: str, shrink: int) -> tuple[Arm, ...]:
    """Everything side by side, and on one stage LISA's policies too; LISA first, whose layers static takes over."""
    others = [arm for arm in arms.SIDE_BY_SIDE if arm is not LISA]
    return shrunk_arms((LISA, *others, *(POLICIES if ds_config == "zero2" else ())), shrink)


def measure(arm: Arm, ds_config: str, layers: tuple[int, ...], arguments) -> dict:
    """One arm on ranks of its own; of the ranks what the one takes that takes most."""
    config = shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    with RankGroup(arguments.ranks, Run, arm, config, ds_config, interval=1, layers=layers) as ranks:
        found, taken = {"first_layers": ranks.call("get", "active_layers")[0], "live": {}}, 0
        for switches in (0, *arguments.switches):
            until = switches + 1 if arm.method in ("lisa", "callback") else taken + 1
            ranks.call("steps", until - taken, SHORT)
            live = max(ranks.call("live_bytes"), key=lambda parts: parts["total"])
            found["live"][str(switches)], taken = live, until
    # A step in the middle of a period, as nearly all are, has its moments before it begins.
    with RankGroup(arguments.ranks, Run, arm, config, ds_config, interval=PERIOD, layers=layers) as ranks:
        # Kept states come to be in as many periods as above.
        periods = arguments.switches[-1] if arm.config.lisa_state == "keep" else 0
        ranks.call("steps", PERIOD * periods + 1, SHORT)
        found["drift"] = ranks.call("drift", SHORT)[0]
        peaks = [peak_of(ranks, arguments.length)]
        with_switch = max(ranks.call("peak_bytes", arguments.length))
        if arm is DRAWN:
            ranks.call("steps", PERIOD - 1, SHORT)
            ranks.call("begin_with_embed", SHORT)
            ranks.call("steps", 1, SHORT)
            peaks.append(peak_of(ranks, arguments.length))
    # Where the embedding does not always train, the next period's layers may need more or less than the last one's.
    found["peak_with_switch"] = with_switch if "embed" in arm.config.always_on else None
    return found | max(peaks, key=lambda one: one["peak"])


def peak_of(ranks: RankGroup, length: int) -> dict:
    """The most that a rank takes in a step, what was planned, and for what.

    The less of two steps: now and then a thread of gloo's still holds a bucket that it has reduced.
    """
    planned = ranks.call("planned_bytes", length)
    return {
        "planned": None if None in planned else max(planned),
        "active_layers": ranks.call("get", "active_layers")[0],
        "active_blocks": ranks.call("get", "active_blocks")[0],
        "peak": min(max(ranks.call("peak_bytes", length)) for _ in range(2)),
    }


def main() -> None:
    """Measure every arm under every config, one after another; print and draw what they hold."""
    parser = group_parser(__doc__, "memory.json", shrink=16)
    stages = ("zero1", "zero2", "zero3")
    parser.add_argument("--configs", nargs="+", choices=stages, default=stages[1:])
    parser.add_argument("--switches", type=positive, nargs="+", default=[10, 50], help="after which to look")
    parser.add_argument("--length", type=positive, default=256, help="tokens of the step whose peak is measured")
    arguments = parsed(parser, 4)  # of fewer layers embedding and head cannot be drawn as often as a layer
    if arguments.switches != sorted(set(arguments.switches)):
        parser.error(f"--switches {' '.join(map(str, arguments.switches))}: each must be more than the one before")
    figures = {}
    for ds_config in arguments.configs:
        of_arms: dict[str, dict] = {}
        for arm in arms_of(ds_config, arguments.shrink):
            layers = of_arms[LISA.name]["first_layers"] if of_arms else ()
            of_arms[arm.name] = measure(arm, ds_config, layers, arguments)
            figures[ds_config] = of_arms
            write_results(arguments.results, figures, quiet=True)  # in case a later one fails
            print(f"{ds_config}, {arm.name}: measured", flush=True)
    for ds_config, of_arms in figures.items():
        print_table([ds_config, *(f"{kind} MiB" for kind in KINDS), *HEADER], rows_of(of_arms))
    write_results(arguments.results, figures)
    plot(figures, arguments.results.with_suffix(".png"))


def last(found: dict) -> dict[str, int]:
    """Bytes after the last switch."""
    return list(found["live"].values())[-1]


def rows_of(of_arms: dict) -> list[list[str]]:
    """A row of each arm: what it holds after the last switch, how that has grown, its peak and plan, what drifted."""
    rows, static = [], last(of_arms["static"])["total"]
    for name, found in of_arms.items():
        held, drift = last(found), found["drift"]
        rows.append(
            [
                name,
                *(f"{held[kind] / MIB:.2f}" for kind in KINDS),
                f"{held['total'] / MIB:.2f}",
                f"{held['total'] / found['live']['0']['total'] - 1:+.2%}",
                f"{held['total'] / static:.3f}",
                f"{found['peak'] / MIB:.2f}",
                "-" if found["planned"] is None else f"{found['planned'] / found['peak'] - 1:+.2%}",
                "-" if found["peak_with_switch"] is None else f"{found['peak_with_switch'] / MIB:.2f}",
                "-" if drift is None else f"{drift['changed'] / drift['elements']:.1%}",
            ]
        )
    return rows


def plot(figures: dict, path: Path) -> None:
    """Bars of what is held after the last switch, by what it is, and a mark at the peak of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(figures), squeeze=False)[0]
    for axes, (ds_config, of_arms) in zip(panels, figures.items(), strict=True):
        names = list(of_arms)[::-1]
        stacked_bars(axes, names, {kind: [last(of_arms[name])[kind] / MIB for name in names] for kind in KINDS})
        axes.plot([of_arms[name]["peak"] / MIB for name in names], names, "k|", markersize=14, label="peak of a step")
        axes.set(title=ds_config, xlabel="MiB of a rank after the last switch")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
