"""`lisa-dist report`: write `report.html` of a run, or one page of several."""

from pathlib import Path

from lisa_dist.commands import exit_on_error
from lisa_dist.report.html import PAGE_NAME, write_comparison, write_report


def main(*folders: str) -> None:
    """Write the report and print its path; of several runs it is in the current folder."""
    with exit_on_error("lisa-dist report", OSError):
        if len(folders) == 1:
            print(f"wrote {write_report(folders[0])}")
        else:
            print(f"wrote {write_comparison(folders, Path(PAGE_NAME))}")
