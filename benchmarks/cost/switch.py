"""What does a switch cost in seconds, by model size, gamma, ranks and stage?

python -m benchmarks.cost.switch

Periods of three steps. The first begins with the switch, and it and the second may take longer besides: stage 3 learns
the order of modules anew. So what a switch costs is both, less two steps like the third. Seconds are of the slowest
rank, medians over the switches.
"""

from dataclasses import dataclass, replace
from statistics import median

from benchmarks.common.methods import LISA
from benchmarks.common.ranks import RankGroup
from benchmarks.common.results import positive, write_results
from benchmarks.common.runs import Run, methods_parser, parse, shrunk_config
from benchmarks.tables.rows import show

PERIOD, SHORT = 3, 16  # steps, tokens of a step that is not timed
INTERVALS = (1, 5, 20, 50)
WHICH = ("switch", "first_step", "second_step", "step")  # the first step has the switch
GAMMAS = (1, 4, 8)


@dataclass(frozen=True)
class Case:
    """What is varied; everything but the stage by a factor of its own."""

    ds_config: str
    shrink: int
    gamma: int = 2
    ranks: int = 2

    @property
    def name(self) -> str:
        return f"{self.ds_config}, 1/{self.shrink} width, gamma {self.gamma}, {self.ranks} ranks"


def cases_of(shrink: int) -> list[Case]:
    """A star around one case: every stage, then on two of them size, gamma and ranks by turns."""
    cases = [Case(ds_config, shrink) for ds_config in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")]
    for ds_config in ("zero2", "zero3"):
        small = Case(ds_config, 2 * shrink)
        cases += [small, replace(small, shrink=4 * shrink)]
        cases += [replace(small, gamma=gamma) for gamma in GAMMAS]
        cases += [replace(small, ranks=ranks) for ranks in (1, 4)]
    return cases


def measure(case: Case, arguments) -> dict:
    """Switches and steps of one case."""
    config = shrunk_config(arguments.model, case.shrink, arguments.num_layers)
    method = replace(LISA, settings={"lisa_activated_layers": case.gamma})
    with RankGroup(case.ranks, Run, method, config, case.ds_config, interval=PERIOD) as ranks:
        ranks.call("steps", 2 * PERIOD, SHORT)  # the first switch meets what is done once
        times: dict[str, list[float]] = {f"{which}_seconds": [] for which in WHICH}
        for _ in range(arguments.switches):
            steps = [ranks.call("step", arguments.length) for _ in range(PERIOD)]
            slowest = [max(rank["step"] for rank in step) for step in steps]
            seconds = [max(rank["begin"] for rank in steps[0]), *slowest]
            for which, one in zip(times.values(), seconds, strict=True):
                which.append(one)
        return times | {
            "cost_seconds": cost(times),
            "share_of_period": {str(interval): share(times, interval) for interval in INTERVALS},
        }


def cost(times: dict[str, list[float]], steps: int = 2) -> float:
    """Seconds that a period takes beyond so many ordinary steps; no less than the switch itself."""
    of_periods = zip(*(times[f"{which}_seconds"] for which in ("first_step", "second_step", "step")), strict=True)
    beyond = median(sum((first, second)[:steps]) - steps * step for first, second, step in of_periods)
    return max(beyond, median(times["switch_seconds"]))


def share(times: dict[str, list[float]], interval: int) -> float:
    """The part of a period of so many steps that its switch costs."""
    seconds = cost(times, min(interval, 2))
    return seconds / (seconds + interval * median(times["step_seconds"]))


def main() -> None:
    """Measure every case; print seconds and shares."""
    parser = methods_parser(__doc__, "switch", shrink=8)
    parser.add_argument("--length", type=positive, default=256, help="tokens of a step that is timed")
    parser.add_argument("--switches", type=positive, default=5)
    arguments = parse(parser, max(GAMMAS))
    figures = {}
    for case in cases_of(arguments.shrink):
        figures[case.name] = measure(case, arguments)
    write_results(arguments.results, figures)
    show("switch", figures)


if __name__ == "__main__":
    main()
