"""`lisa-dist report`: write `report.html` of a run."""

from lisa_dist.commands import exit_on_error
from lisa_dist.report.html import write_report


def main(folder: str) -> None:
    """Write the report and print its path."""
    with exit_on_error("lisa-dist report", OSError):
        print(f"wrote {write_report(folder)}")
