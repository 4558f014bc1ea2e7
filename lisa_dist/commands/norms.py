"""`lisa-dist norms`: the layerwise norms of runs side by side, as a table, one CSV and the paper's figure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lisa_dist.commands import exit_on_error, writing
from lisa_dist.flags import FlagParser
from lisa_dist.report.norms import format_skew, plot_norms, read_runs, write_csv

USAGE = """lisa-dist norms RUN [RUN ...] --output_dir FOLDER

RUN is the output_dir of a run that was trained with --layer_norms N, or a lisa_norms.csv, by itself or with a label as
label=RUN; without one it is called by its method."""
HELP = {"What is written": ("output_dir",)}


@dataclass
class NormsArguments:
    """Runs and flags of `lisa-dist norms`."""

    runs: list[str] = field(metadata={"is_positional": True, "metavar": "RUN", "help": "Its folder, or its norms."})
    output_dir: str = field(
        metadata={"aliases": ["--out"], "help": "Folder for norms.csv and norms.png, the paper's figure."}
    )


ARGUMENTS = (NormsArguments,)


def main(argv: Sequence[str]) -> None:
    """Read, write and print the table."""
    with exit_on_error("lisa-dist norms"):
        (arguments,) = FlagParser(ARGUMENTS, USAGE, HELP).parse(argv)
        runs, out = read_runs(arguments.runs), Path(arguments.output_dir)
        with writing(f"--output_dir {out}"):
            out.mkdir(parents=True, exist_ok=True)
            write_csv(runs, out / "norms.csv")
            plot_norms(runs, out / "norms.png")
        print(format_skew(runs))
        print(f"wrote {out / 'norms.csv'} and {out / 'norms.png'}")
