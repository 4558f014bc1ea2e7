"""Compare a revision with the working tree, bit for bit, on this machine: `make golden BASE=<revision>`.

Both run the same cases, one after the other: losses of every micro-batch, weights and optimizer states of every rank
after every step, the files of a checkpoint. Then each goes on from the other's checkpoint. Refusals are compared as
text; one that says the same in other words is listed, one that is none any more is a difference.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from golden_cases import CASES, CUT, SLICE

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


@dataclass
class Outcome:
    """What a comparison has found: cases and refusals by name, with what differs."""

    cases: int = 0
    refusals: int = 0
    differing: dict[str, str] = field(default_factory=dict)
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)  # old and new text

    @property
    def equal(self) -> bool:
        return not self.differing


class FailedError(RuntimeError):
    """A revision could not run what it was asked for; its traceback."""


class Revision:
    """A process that has imported one tree and runs cases in it."""

    def __init__(self, name: str, tree: Path):
        self.name = name
        self._files = tempfile.TemporaryDirectory(prefix="lisa_golden_", ignore_cleanup_errors=True)
        self.folder = Path(self._files.name)
        self._output = self.folder / "output.txt"  # of the worker and its ranks
        bin_folder = Path(sys.executable).parent  # has ninja, which builds DeepSpeed's ops
        paths = {"PYTHONPATH": f"{tree}:{ROOT / 'tests' / 'support'}", "HF_HOME": str(self.folder)}
        paths |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "TMPDIR": str(self.folder)}
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(self.folder), str(tree)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=self.folder,
                env=os.environ | ENVIRONMENT | paths,
                start_new_session=True,
            )

    def ask(self, *request) -> list | dict:
        """The answer of the worker; raises FailedError."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise FailedError(f"{self.name} ended: {self._output.read_text()[-3000:]}")
        answer = json.loads(line)
        if "failed" in answer:
            raise FailedError(f"{self.name} failed: {answer['failed']}")
        return answer["value"]

    def close(self) -> None:
        """End the worker and its ranks, and remove all that they have left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        for path in self.folder.glob("tmp*"):  # by which ranks have named shared memory
            for buffer in Path("/dev/shm").glob(f"*{path.name}*"):
                buffer.unlink()
        self._files.cleanup()


def compare(
    base: Path,
    tree: Path,
    cases: list[dict],
    resumed: list[dict],
    few_refusals: bool = False,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Run `cases`, and refusals, on two trees; of `resumed` each goes on from the other's checkpoint too.

    `report` takes a line for each case as soon as it is known.
    """
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        old, new = (Revision(name, folder) for name, folder in (("BASE", base), ("the working tree", tree)))
        stack.callback(old.close)
        stack.callback(new.close)
        for case in cases:
            started = time.monotonic()
            try:
                difference = compare_case(old, new, case, resumes=case in resumed)
            except FailedError as error:
                difference = str(error)
            outcome.cases += 1
            if difference is not None:
                outcome.differing[case["name"]] = difference
            verdict = "equal" if difference is None else f"DIFFERS: {difference}"
            report(f"{time.monotonic() - started:5.1f} s  {case['name']}: {verdict}")
        compare_refusals(old, new, few_refusals, outcome, report)
    return outcome


def compare_case(old: Revision, new: Revision, case: dict, resumes: bool) -> str | None:
    """The first difference of two revisions in one case."""
    for revision in (old, new):
        for folder in (revision.folder / "run", revision.folder / "resumed"):
            shutil.rmtree(folder, ignore_errors=True)
    runs = [revision.ask("run", case, str(revision.folder / "run")) for revision in (old, new)]
    difference = first_difference(*runs)
    if difference is not None or not resumes:
        return difference
    rest_of_run = [{"steps": rank["steps"][CUT:], "checkpoint": {}} for rank in runs[0]]
    for reader, writer in ((new, old), (old, new)):
        resumed = reader.ask("run", case, str(reader.folder / "resumed"), str(writer.folder / "run"))
        difference = first_difference(rest_of_run, resumed, first_step=CUT)
        if difference is not None:
            return f"{difference}, where {reader.name} resumes from a checkpoint of {writer.name}"
    return None


def first_difference(old: list[dict], new: list[dict], first_step: int = 0) -> str | None:
    """Where what the ranks of two revisions saw differs first: the step, what, and of which rank.

    `old` and `new` have for each rank its "steps", each a dict, and "checkpoint", another one.
    """
    lengths = sorted(len(rank["steps"]) for rank in (*old, *new))
    for step in range(lengths[0]):
        for name in old[0]["steps"][step]:
            for rank, (one, other) in enumerate(zip(old, new, strict=True)):
                before, after = one["steps"][step][name], other["steps"][step].get(name)
                if before != after:
                    return f"step {first_step + step}, {name} of rank {rank}{shown(before, after)}"
    if lengths[0] != lengths[-1]:
        return f"step {first_step + lengths[0]}, which not all have taken"
    for rank, (one, other) in enumerate(zip(old, new, strict=True)):
        saved, saved_now = one["checkpoint"], other["checkpoint"]
        for name in saved | saved_now:
            of_one_alone = name.startswith(("setting ", "field ")) and name in saved.keys() ^ saved_now.keys()
            before, after = saved.get(name), saved_now.get(name)
            if before != after and not of_one_alone:
                return f"the checkpoint, {name}, by rank {rank}{shown(before, after)}"
    return None


def shown(before: object, after: object) -> str:
    """Two values for a message, unless they are sums that say nothing."""
    return "" if isinstance(before, str) else f": {before} and {after}"


def compare_refusals(old: Revision, new: Revision, few: bool, outcome: Outcome, report: Callable[[str], None]) -> None:
    """Ask both revisions for what they refuse, and how they say it."""
    try:
        refused, refused_now = (revision.ask("refuse", few) for revision in (old, new))
    except FailedError as error:
        outcome.differing["refusals"] = str(error)
        report(f"refusals: DIFFERS: {error}")
        return
    for name, (status, before) in refused.items():
        status_now, after = refused_now[name]
        outcome.refusals += 1
        if status != status_now or status not in (2, "ValueError", "RuntimeError"):
            ends = (f"{how} {said.splitlines()[-1:]}" for how, said in ((status, before), (status_now, after)))
            outcome.differing[name] = " and ".join(ends)
            report(f"{name}: DIFFERS: {outcome.differing[name]}")
        elif before != after:
            outcome.messages[name] = (before, after)
            report(f"{name}: message changed:\n  old: {before}\n  new: {after}")


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A revision of this repository in a temporary worktree."""
    with tempfile.TemporaryDirectory(prefix="lisa_base_") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def default_base() -> str:
    """The last release tag before this commit or, without one, its parent."""
    try:
        return git("describe", "--tags", "--abbrev=0", "HEAD^")
    except subprocess.CalledProcessError:
        return git("rev-parse", "--verify", "HEAD^")


def git(*words: str) -> str:
    """Output of git in this repository; raises CalledProcessError."""
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the revision; by default the last release tag or, without one, the parent")
    parser.add_argument("--slice", action="store_true", help="a few cases, in a minute")
    parser.add_argument("--only", default="", help="cases with this in their names")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended and removed
    base = arguments.base or default_base()
    cases = [case for case in (SLICE if arguments.slice else CASES) if arguments.only in case["name"]]
    started = time.monotonic()
    print(f"BASE {base} ({git('log', '-1', '--format=%h %s', base)}) and the working tree, {len(cases)} cases")
    with checkout(base) as tree:
        outcome = compare(tree, ROOT, cases, cases[:1] if arguments.slice else cases, arguments.slice)
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{'equal' if outcome.equal else 'NOT EQUAL'}: {outcome.cases} cases, {outcome.refusals} refusals, "
        f"{len(outcome.messages)} of them with other words; {minutes:.1f} minutes"
    )
    for name, difference in outcome.differing.items():
        print(f"  {name}: {difference.splitlines()[0]}")
    raise SystemExit(0 if outcome.equal else 1)


if __name__ == "__main__":
    main()
