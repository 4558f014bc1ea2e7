"""Which changes of the engine does `make test` see? `make mutants` makes some, each by itself, until a test fails.

First the tests are run as they are, and the lines that each executes are written down, on its ranks too. Then each
mutant, in a copy of the tree, is given to the tests that execute its line, the nearest and quickest first. Two
processes that have imported all that is not the library's fork a child for each.

    python tests/mutants.py --only zero --count 20 --seed 1
    python tests/mutants.py --at lisa_dist/zero/layout.py:54 --budget 600       those of one line, and more tests
"""

import argparse
import ast
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The folders of tests/unit that matter to a package of lisa_dist, the nearest first.
PACKAGES = {
    "core": ("core", "checkpoint", "train", "run"),
    "loss": ("loss", "run", "train"),
    "zero": ("zero", "optim", "core", "checkpoint", "train"),
    "optim": ("optim", "core", "checkpoint"),
    "checkpoint": ("checkpoint", "train", "run", "commands"),
}
# In the process of pytest they start threads of torch's, beside which its fork of a next one hangs.
NOT_FORKED = ("test_compiled_layers.py",)
FLIPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Or: ast.And,
    ast.And: ast.Or, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of one part of a file."""

    path: str  # below the root
    line: int
    begin: int  # in bytes of the file
    end: int
    new: str
    in_function: bool  # else it runs at the import, whatever is tested

    def apply(self, tree: Path) -> str:
        """Write it into a copy of the tree; the text that it replaces."""
        content = (ROOT / self.path).read_bytes()
        changed = content[: self.begin] + self.new.encode() + content[self.end :]
        (tree / self.path).write_bytes(changed)
        return content[self.begin : self.end].decode()


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All that can be made of a file. Messages, annotations, assertions and docstrings stay as they are."""
    content = path.read_bytes()
    starts = [0]
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def mutant(node: ast.AST, new: str) -> Mutant:
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        in_function = any(first <= node.lineno <= last for first, last in bodies)
        return Mutant(str(path.relative_to(ROOT)), node.lineno, begin, end, new, in_function)

    def with_operator(node: ast.AST, **changes) -> str:
        return f"({ast.unparse(type(node)(**{name: getattr(node, name) for name in node._fields} | changes))})"

    def visit(node: ast.AST) -> Iterator[Mutant]:
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Expr(value=ast.Call() | ast.Await()):
                yield mutant(node, "pass")
            case ast.Compare(ops=[kind]):
                yield mutant(node, with_operator(node, ops=[FLIPS[type(kind)]()]))
            case ast.BinOp(op=ast.Div()) if re.search(r"folder|path|name|dir\b|['\"]", ast.unparse(node), re.I):
                pass  # of files: no more than a TypeError
            case ast.BinOp() | ast.BoolOp() if type(node.op) in FLIPS:
                yield mutant(node, with_operator(node, op=FLIPS[type(node.op)]()))
            case ast.AugAssign() if type(node.op) in FLIPS:
                yield mutant(node, ast.unparse(ast.AugAssign(node.target, FLIPS[type(node.op)](), node.value)))
            case ast.Constant(value=bool()):
                yield mutant(node, str(not node.value))
            case ast.Constant(value=int() | float()):
                yield mutant(node, repr(node.value + 1))
            case ast.UnaryOp(op=ast.Not()):
                yield mutant(node, f"({ast.unparse(node.operand)})")
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield mutant(node.test, f"(not ({ast.unparse(node.test)}))")
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "format_spec"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    tree = ast.parse(content)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    parts = [node.body if isinstance(node.body, list) else [node.body] for node in functions]
    bodies = [(part[0].lineno, part[-1].end_lineno) for part in parts]
    for found in visit(tree):
        if content[found.begin : found.end].decode() not in (found.new, found.new[1:-1]):
            yield found


# In the children: pytest with what it writes down


def call_traced(folder: str, function: Callable, *args):
    """On a rank: what a function returns, and the lines that it has executed."""
    with traced(folder) as lines:
        value = function(*args)
    return value, lines


@contextlib.contextmanager
def traced(folder: str) -> Iterator[set[tuple[str, int]]]:
    """The lines of files below a folder that this thread executes."""
    lines: set[tuple[str, int]] = set()

    def note(frame, event, _):
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    sys.settrace(lambda frame, *_: note if frame.f_code.co_filename.startswith(folder) else None)
    try:
        yield lines
    finally:
        sys.settrace(None)


class Plugin:
    """Has ranks forked from here, where all is imported; writes lines and seconds of each test, where it is told to."""

    def __init__(self, tree: Path, record: str | None):
        self._tree, self._record, self._lines, self.found = tree, record, set(), {}

    def pytest_configure(self) -> None:
        import ranks

        ranks.START_METHOD = "fork"
        if self._record:
            run_ranks, folder = ranks.run_ranks, str(self._tree / "lisa_dist")

            def run_traced(function, *args, **options):
                outcomes = run_ranks(functools.partial(call_traced, folder, function), *args, **options)
                self._lines.update(*(lines for _, lines in outcomes))
                return [value for value, _ in outcomes]

            ranks.run_ranks = run_traced

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self._lines, begun = set(), time.monotonic()
        with traced(str(self._tree / "lisa_dist")) if self._record else contextlib.nullcontext(set()) as lines:
            done = yield
        named = {f"{os.path.relpath(path, self._tree)}:{line}" for path, line in lines | self._lines}
        self.found[item.nodeid] = (time.monotonic() - begun, sorted(named))
        return done

    def pytest_sessionfinish(self) -> None:
        if self._record:
            Path(self._record).write_text(json.dumps(self.found))


def run_tests(tree: Path, tests: list[str], record: str | None, output: Path) -> None:
    """Run pytest, with what it says in a file, and end as it ends."""
    os.setsid()
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code: int = 3
    try:
        from mutants import Plugin  # of this name, for ranks to know its functions by

        options = ["-x", "-q", "-m", "not full", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
        code = pytest.main([*options, *tests], plugins=[Plugin(tree, record)])
    finally:
        os._exit(code)


def serve(connection, tree: Path) -> None:
    """Import what is not the library's; then fork a child for each list of tests, and answer how it ended."""
    sys.dont_write_bytecode = True
    for name in ("bitsandbytes", "deepspeed", "peft", "trl.trainer.sft_trainer"):
        importlib.import_module(name)
    os.chdir(tree)
    temporary, output = tree.with_name(f"{tree.name}_temporary"), tree / "output.txt"
    temporary.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None  # what tests leave goes with the tree
    sys.path[:0] = [str(tree), str(tree / "tests")]  # where ranks find this file
    while True:
        try:
            tests, seconds, record = connection.recv()
        except EOFError:
            return
        begun = time.monotonic()
        child = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, tests, record, output))
        child.start()
        child.join(seconds)
        code = "timeout" if child.is_alive() else child.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it has left
        child.join()
        connection.send((code, output.read_text(errors="replace"), time.monotonic() - begun))


class Worker:
    """A copy of the tree, and a process that runs tests in it."""

    def __init__(self, folder: Path, name: str):
        self.tree = folder / name
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build")
        shutil.copytree(ROOT, self.tree, symlinks=True, ignore=ignored)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.tree))
        self._process.start()
        theirs.close()

    def run(self, tests: list[str], seconds: float, record: str | None = None) -> tuple[int | str, str, float]:
        """How pytest ended, what it said and how long it took; more than `seconds` is a timeout."""
        self._connection.send((tests, seconds, record))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()  # which ends the process
        self._process.join()


def record(workers: list[Worker], folders: list[str]) -> dict[str, tuple[float, set[str]]]:
    """Seconds and executed lines of every test of these folders, all of which pass."""
    files = [str(path.relative_to(ROOT)) for name in folders for path in (ROOT / "tests/unit" / name).glob("test_*.py")]
    files = [file for file in files if not file.endswith(NOT_FORKED)]
    files.sort(key=lambda file: -(ROOT / file).stat().st_size)
    found = {}

    def run(worker: Worker) -> None:
        while files:
            file, written = files.pop(0), worker.tree / "lines.json"
            code, said, seconds = worker.run([file], 3600, str(written))
            if code not in (0, 5):
                sys.exit(f"{file} fails as it is:\n{said[-3000:]}")
            print(f"recorded {file} ({seconds:.0f} s)", flush=True)
            found.update(json.loads(written.read_text()) if code == 0 else {})

    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(run, workers))
    return {test: (seconds, set(lines)) for test, (seconds, lines) in found.items()}


def tests_for(mutant: Mutant, recorded: dict[str, tuple[float, set[str]]], budget: float) -> list[str]:
    """Tests that execute its line, for so many seconds: one case of each first, the nearest and quickest first."""
    last = mutant.line + (ROOT / mutant.path).read_bytes()[mutant.begin : mutant.end].count(b"\n")
    lines = {f"{mutant.path}:{line}" for line in range(mutant.line, last + 1)}
    package = Path(mutant.path).parts[1]
    of_function: dict[str, int] = {}
    ranked = []
    for test, (seconds, executed) in sorted(recorded.items(), key=lambda item: item[1][0]):
        folder, function = Path(test.split("::")[0]).parts[2], test.split("[")[0]
        if folder in PACKAGES[package] and (executed & lines or not mutant.in_function):
            case = of_function[function] = of_function.get(function, -1) + 1
            ranked.append((case, PACKAGES[package].index(folder), seconds, test))
    chosen, total = [], 0.0
    for _, _, seconds, test in sorted(ranked):
        if not chosen or total + seconds <= budget:
            chosen.append(test)
            total += seconds
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PACKAGES, help="the one package to change")
    parser.add_argument("--count", type=int, default=150, help="how many mutants")
    parser.add_argument("--at", nargs="+", metavar="PATH:LINE", help="of the chosen ones those of these lines alone")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests, as they are, for each mutant")
    flags = parser.parse_args()
    packages = [flags.only] if flags.only else list(PACKAGES)
    paths = [path for package in packages for path in sorted((ROOT / "lisa_dist" / package).glob("*.py"))]
    made = [mutant for path in paths for mutant in mutants_of(path)]
    chosen = random.Random(flags.seed).sample(made, min(flags.count, len(made)))
    chosen = [mutant for mutant in chosen if not flags.at or f"{mutant.path}:{mutant.line}" in flags.at]
    begun, survivors, done = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="lisa_dist_mutants_") as folder, contextlib.ExitStack() as stack:
        workers = [Worker(Path(folder), str(number)) for number in range(2)]
        for worker in workers:
            stack.callback(worker.close)
        recorded = record(workers, list(dict.fromkeys(name for package in packages for name in PACKAGES[package])))

        def attempt(worker: Worker) -> None:
            nonlocal done
            while chosen:
                mutant = chosen.pop()
                tests = tests_for(mutant, recorded, flags.budget)
                old, killer, seconds = mutant.apply(worker.tree), "", 0.0
                if tests:
                    limit = 60 + 5 * sum(recorded[test][0] for test in tests)
                    code, said, seconds = worker.run(tests, limit)
                    if code == 5:
                        sys.exit(f"none of {tests} was run:\n{said[-3000:]}")
                    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
                    killer = "" if code == 0 else failed[1] if failed else f"pytest ends with {code}"
                shutil.copyfile(ROOT / mutant.path, worker.tree / mutant.path)
                done += 1
                line = f"{mutant.path}:{mutant.line}: {' '.join(old.split())}  ->  {mutant.new}"
                verdict = f"killed by {killer}" if killer else f"SURVIVED {len(tests)} tests"
                print(f"{done:3d} {verdict} in {seconds:.1f} s  {line}", flush=True)
                if not killer:
                    survivors.append(f"{line}  ({len(tests)} tests)")

        total = len(chosen)
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(attempt, workers))
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{total - len(survivors)} of {total} mutants killed, of {len(made)} that can be made; {minutes:.0f} min")
    print("\n".join(["survivors:", *sorted(survivors)] if survivors else []))


if __name__ == "__main__":
    main()
