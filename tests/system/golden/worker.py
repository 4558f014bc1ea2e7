"""One revision of the golden comparison: imports it once, then does what standard input asks for, a line at a time.

    python worker.py FOLDER TREE DESCRIPTOR

A request is JSON, [method of `Server`, its arguments]; the answer is a line of JSON to the file descriptor. Ranks are
forked when they are first wanted and serve all cells. FOLDER is for files, TREE where the revision is.
"""

import functools
import gc
import json
import os
import re
import sys
import traceback
from importlib import import_module
from itertools import count
from multiprocessing import connection, get_context
from pathlib import Path

import cpuinfo
import deepspeed
import refusals
import torch

import lisa_dist

TIMEOUT = 300  # seconds of one cell on a loaded machine
fork = get_context("fork")


class Ranks:
    """A process group of so many ranks, which call one function after another; `store` is a file of its own."""

    def __init__(self, world_size: int, store: Path):
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=serve, args=(rank, world_size, store, theirs, ours), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, module: str, function: str, *arguments) -> list:
        """What every rank returned; raises RuntimeError with the traceback of one that could not."""
        for end in self.connections:
            end.send((module, function, arguments))
        answers = {}
        while len(answers) < len(self.connections):
            waiting = [end for end in self.connections if end not in answers]
            ready = connection.wait(waiting, TIMEOUT)
            if not ready:
                raise RuntimeError(f"no answer in {TIMEOUT} s")
            for end in ready:
                try:
                    failed, answers[end] = end.recv()
                except EOFError:
                    failed, answers[end] = True, "a rank died"
                if failed:
                    raise RuntimeError(answers[end])
        return [answers[end] for end in self.connections]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, world_size: int, store: Path, requests: connection.Connection, other_end) -> None:
    other_end.close()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    # DeepSpeed names its shared memory by the port, though the store is a file.
    os.environ |= {"LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.name}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo")
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeed asks in a new process each time
    while True:
        gc.collect()
        gc.freeze()  # else every collection would walk all that was imported
        try:
            module, function, arguments = requests.recv()
        except EOFError:
            return
        try:
            answer = (False, getattr(import_module(module), function)(*arguments))
        except BaseException:  # noqa: BLE001 - whatever it is, the comparison must tell it
            answer = (True, traceback.format_exc())
        requests.send(answer)


class Server:
    """The functions that can be asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.groups: dict[int, Ranks] = {}  # by their numbers of ranks
        self.stores = (folder / f"{folder.name}_{number}" for number in count())

    def run(self, cell: dict, save_to: str, resume_from: str | None = None) -> list:
        """`cell_runs.run` on the ranks of a cell."""
        return self._call(cell["ranks"], "cell_runs", "run", cell, save_to, resume_from)

    def refuse(self, few: bool) -> dict[str, list]:
        """How each command and each call of `refusals` ended, and what it said."""
        self._call(1, "refusals", "prepare", self.folder)
        answers = {}
        for words in refusals.FEW_COMMANDS if few else refusals.COMMANDS:
            name = " ".join(["lisa-dist", *words]).replace(" ".join(refusals.TRAIN), "train ...")
            answers[name] = self._command(words)
        for call in refusals.FEW_CALLS if few else refusals.CALLS:
            (answers[call.__name__],) = self._call(1, "refusals", "refused_call", call.__name__, self.folder)
        tree = Path(lisa_dist.__file__).parents[1]
        places = {str(self.folder): "FOLDER", str(tree): "TREE"}
        return {name: [status, by_other_names(said, places)] for name, (status, said) in answers.items()}

    def _command(self, words: list[str]) -> list:
        """Exit status and output of `lisa-dist`, in a process of its own."""
        output = self.folder / "refusal.txt"
        process = fork.Process(target=run_command, args=([word.format(folder=self.folder) for word in words], output))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        said = output.read_text()
        return [process.exitcode, "\n".join(re.findall(r"^lisa-dist.*", said, re.MULTILINE)) or said]

    def _call(self, world_size: int, *request) -> list:
        if world_size not in self.groups:
            self.groups[world_size] = Ranks(world_size, next(self.stores))
        try:
            return self.groups[world_size].call(*request)
        except RuntimeError:
            self.groups.pop(world_size).kill()
            raise


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
    folder, tree, answers = Path(sys.argv[1]), Path(sys.argv[2]), os.fdopen(int(sys.argv[3]), "w")
    assert Path(lisa_dist.__file__).is_relative_to(tree), f"{lisa_dist.__file__} is not of {tree}"
    (folder / "weights.json").write_text("[1, 2, 3, 4, 5, 6]")  # of layers, for a cell
    server = Server(folder)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(server, name)(*arguments)}
        except RuntimeError as error:
            answer = {"failed": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
