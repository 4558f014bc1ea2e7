"""One revision of the golden comparison: imports it once, then does what standard input asks for, a line at a time.

    python worker.py FOLDER TREE

A request is JSON, [method of `Server`, its arguments]; the answer is a line of JSON to standard output. FOLDER is for
files, TREE where the revision is.
"""

import contextlib
import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import case_runs
import ranks
import refusals

import lisa_dist

TIMEOUT = 300  # seconds of one case on a loaded machine


class Server:
    """The functions that can be asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, case: dict, save_to: str, resume_from: str | None = None) -> list:
        """`case_runs.run` on the ranks of a case."""
        return ranks.run_ranks(case_runs.run, case["ranks"], case, save_to, resume_from, timeout=TIMEOUT)

    def refuse(self, few: bool) -> dict[str, list]:
        """How each command and each call of `refusals` ended, and what it said."""
        ranks.run_ranks(refusals.prepare, 1, self.folder, timeout=TIMEOUT)
        answers = {}
        for words in refusals.FEW_COMMANDS if few else refusals.COMMANDS:
            name = " ".join(["lisa-dist", *words]).replace(" ".join(refusals.TRAIN), "train ...")
            answers[name] = self._command(words)
        for name in refusals.FEW_CALLS if few else refusals.CALLS:
            (answers[name],) = ranks.run_ranks(refusals.refused_call, 1, name, self.folder, timeout=TIMEOUT)
        tree = Path(lisa_dist.__file__).parents[1]
        places = {str(self.folder): "FOLDER", str(tree): "TREE"}
        return {name: [status, by_other_names(said, places)] for name, (status, said) in answers.items()}

    def _command(self, words: list[str]) -> list:
        """Exit status and output of `lisa-dist`, in a process of its own."""
        output = self.folder / "refusal.txt"
        words = [word.format(folder=self.folder) for word in words]
        process = ranks.rank_context().Process(target=run_command, args=(words, output))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        said = output.read_text()
        return [process.exitcode, "\n".join(re.findall(r"^lisa-dist.*", said, re.MULTILINE)) or said]


def by_other_names(said: str, places: dict[str, str]) -> str:
    """What was said, of places by their names here, and of a folder that is being written without its random end."""
    for place, name in places.items():
        said = said.replace(place, name)
    return re.sub(r"(tmp-checkpoint-\d+-)[0-9a-f]+", r"\1RANDOM", said).strip()


def run_command(words: list[str], output: Path) -> None:
    """`lisa-dist` with these words, by the entry point that the revision declares."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tree = Path(lisa_dist.__file__).parents[1]
    declared = "".join((tree / name).read_text() for name in ("setup.py", "pyproject.toml"))
    module, function = re.search(r"lisa-dist\W+([\w.]+):(\w+)", declared).groups()
    sys.argv = ["lisa-dist", *words]
    try:
        getattr(import_module(module), function)()
    finally:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_0"):
            buffer.unlink()


def main() -> None:
    folder, tree = map(Path, sys.argv[1:])
    assert Path(lisa_dist.__file__).is_relative_to(tree), f"{lisa_dist.__file__} is not of {tree}"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes elsewhere
    # Ranks are of this process, with the revision's library, whose other names are not known.
    ranks.START_METHOD, ranks.as_in_a_run = "fork", contextlib.nullcontext
    (folder / "weights.json").write_text("[1, 2, 3, 4, 5, 6]")  # of layers, for a case
    server = Server(folder)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(server, name)(*arguments)}
        except ranks.RankError as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
