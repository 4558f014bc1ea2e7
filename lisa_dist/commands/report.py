"""`lisa-dist report`: write `report.html` of a run, or one page of several; or serve it to this machine."""

from pathlib import Path

from lisa_dist.commands import exit_on_error
from lisa_dist.commands.verbs import folders_of_report
from lisa_dist.report.html import PAGE_NAME, write_comparison, write_report
from lisa_dist.report.serve import PORT, serve


def main(*words: str) -> None:
    """Write the report and print its path, of several runs in the current folder; with --serve write nothing."""
    with exit_on_error("lisa-dist report", OSError):
        folders = folders_of_report(words)
        if "--serve" in words:
            serve(folders, next(iter(words[len(folders) + 1 :]), str(PORT)))
        elif len(folders) == 1:
            print(f"wrote {write_report(folders[0])}")
        else:
            print(f"wrote {write_comparison(folders, Path(PAGE_NAME))}")
