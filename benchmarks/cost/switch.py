"""What does a switch cost: seconds and bytes, by model size, gamma, ranks and stage; and where does the time go?

python -m benchmarks.cost.switch

Periods of three steps. The first begins with the switch, and it and the second may take longer besides: stage 3 learns
the order of modules anew. So what a switch costs is both, less two steps like the third; its share is of a period of K
steps. Seconds are of the slowest rank, medians over the switches. Where the time goes is from a profile of more of
them, as shares, since profiling itself takes time.
"""

import cProfile
import pstats
from collections import Counter
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.common.methods import LISA
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.common.runs import Run, methods_parser, parse, shrunk_config
from benchmarks.tables.declared import show

PERIOD, SHORT = 3, 16  # steps, tokens of a step that is not timed
INTERVALS = (1, 5, 20, 50)
GAMMAS = (1, 4, 8)


@dataclass(frozen=True)
class Cell:
    """What is varied; everything but the stage by a factor of its own."""

    ds_config: str
    shrink: int
    gamma: int = 2
    ranks: int = 2

    @property
    def name(self) -> str:
        return f"{self.ds_config}, 1/{self.shrink} width, gamma {self.gamma}, {self.ranks} ranks"


class SwitchedRun(Run):
    """A run of LISA that tells of its switches."""

    def last_record(self) -> dict[str, int]:
        """Of this rank, in bytes: its states now, and what the last switch let go of; and the steps since."""
        record = self.lisa.records[-1]
        held = sum(state.nbytes for state in self.lisa.partition_states().values())
        steps = self.lisa.engine.global_steps - record.step
        return {"state_bytes": held, "bytes_released": record.bytes_released, "steps": steps}

    def profiled_switch(self, length: int) -> dict[str, float]:
        """A step that begins with a switch: seconds of what the switch calls, and in turn of what re-partitions."""
        profile = cProfile.Profile()
        begin = self.begin

        def profiled() -> None:
            profile.enable()
            begin()
            profile.disable()

        self.begin = profiled
        self.step(length)
        del self.begin
        stats = pstats.Stats(profile).stats
        seconds: Counter[str] = Counter()
        for (_, _, name), (*_, callers) in stats.items():
            for (_, _, caller), (*_, cumulative) in callers.items():
                if caller in ("_switch", "repartition"):
                    seconds["repartition: " * (caller == "repartition") + name.strip("<>_")] += cumulative
        return dict(seconds)


def cells_of(shrink: int) -> list[Cell]:
    """A star around one cell: every stage, then on two of them size, gamma and ranks by turns."""
    cells = [Cell(ds_config, shrink) for ds_config in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")]
    for ds_config in ("zero2", "zero3"):
        small = Cell(ds_config, 2 * shrink)
        cells += [small, replace(small, shrink=4 * shrink)]
        cells += [replace(small, gamma=gamma) for gamma in GAMMAS]
        cells += [replace(small, ranks=ranks) for ranks in (1, 4)]
    return cells


def measure(cell: Cell, arguments) -> dict:
    """Switches and steps of one cell."""
    config = shrunk_config(arguments.model, cell.shrink, arguments.num_layers)
    method = replace(LISA, settings={"lisa_activated_layers": cell.gamma})
    with RankGroup(cell.ranks, SwitchedRun, method, config, cell.ds_config, interval=PERIOD) as ranks:
        ranks.call("steps", 2 * PERIOD, SHORT)  # the first switch meets what is done once
        switches, firsts, seconds, steps, records = [], [], [], [], []
        for _ in range(arguments.switches):
            first = ranks.call("step", arguments.length)
            switches.append(max(times["begin"] for times in first))
            firsts.append(max(times["step"] for times in first))
            for taken in (seconds, steps):
                taken.append(max(times["step"] for times in ranks.call("step", arguments.length)))
            records.append(ranks.call("last_record")[0])
            assert records[-1]["steps"] == PERIOD, "a period that began with the first of these steps"
        shares: Counter[str] = Counter()
        for _ in range(3):
            shares.update(ranks.call("profiled_switch", SHORT)[0])
            ranks.call("steps", PERIOD - 1, SHORT)
        whole = sum(seconds for name, seconds in shares.items() if not name.startswith("repartition: "))
        times = {
            "switch_seconds": switches,
            "first_step_seconds": firsts,  # with the switch
            "second_step_seconds": seconds,
            "step_seconds": steps,
        }
        return times | {
            "cost_seconds": cost(times),
            "share_of_period": {str(interval): share(times, interval) for interval in INTERVALS},
            "state_bytes_of_rank_0": records[-1]["state_bytes"],
            "bytes_released": median(record["bytes_released"] for record in records),
            "of_time": {name: seconds / whole for name, seconds in shares.most_common() if seconds > 0.01 * whole},
            "parameters": ranks.call("numel")[0],
        }


def cost(times: dict[str, list[float]], steps: int = 2) -> float:
    """Seconds that a period takes beyond so many ordinary steps: the switch, and what it makes slower after it.

    On stages 1 and 2 that is noise alone. It counts against the switch, but not below it.
    """
    of_periods = zip(*(times[f"{which}_seconds"] for which in ("first_step", "second_step", "step")), strict=True)
    beyond = median(sum((first, second)[:steps]) - steps * step for first, second, step in of_periods)
    return max(beyond, median(times["switch_seconds"]))


def share(times: dict[str, list[float]], interval: int) -> float:
    """Of a period of so many steps, what its switch costs."""
    seconds = cost(times, min(interval, 2))
    return seconds / (seconds + interval * median(times["step_seconds"]))


def main() -> None:
    """Measure every cell; print seconds, shares, bytes, and where the time goes."""
    parser = methods_parser(__doc__, "switch", shrink=8)
    parser.add_argument("--length", type=positive, default=256, help="tokens of a step that is timed")
    parser.add_argument("--switches", type=positive, default=5)
    arguments = parse(parser, max(GAMMAS))
    figures = {}
    for cell in cells_of(arguments.shrink):
        figures[cell.name] = measure(cell, arguments)
        print(f"{cell.name}: measured", flush=True)
    write_results(arguments.results, figures)
    show("switch", figures)


if __name__ == "__main__":
    main()
