"""Ranks of a run are killed, stopped, or find the disk full, at every moment of saves, switches and loads.

python tests/system/faults.py --faults 1000 --seed 0
python tests/system/faults.py --faults 200 --method lora

A LISA run is a loop of one's own on two CPU ranks, which saves every other step and is started again after each fault,
from what it finds. Runs of the other methods are those of `lisa-dist train`, on one rank and on two. Nothing is lost:
whatever has the name of a checkpoint is whole, the newest is never older than before the fault, and the run ends with
the bits of one that nothing has happened to. Prints a table of moments and faults. test_faults.py runs a few of them.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from models import tiny_llama, token_batches
from ranks import free_port, rank_context
from runs import flags_for, save_tiny_run

STEPS, INTERVAL, SAVES = 12, 3, 2
DRAWN = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.5"}
GRACE = 3  # seconds for a rank to end by itself once another one has
PATIENCE = 120  # seconds after which a start has hung
RUNS = (
    {"ds_config": "zero2", "in_background": True},
    {"ds_config": "zero3", "in_background": True, "lisa": {"lisa_state": "keep"}},
    {"ds_config": "zero1", "in_background": False, "optim": "lisa_adamw"},
    {"ds_config": "zero2_offload", "in_background": True},
    {"ds_config": "zero3", "in_background": False},
    {"ds_config": "zero2", "in_background": True, "lisa": DRAWN},
)
# Functions by whose calls moments are told, how often each is called at most in a start, whether a full disk may come
# there, and whether rank 0 alone calls it.
MOMENTS = {
    "copy to the host": ("lisa_dist.checkpoint.save", "copy_on_host", 30, False, False),
    "link": ("os", "link", 5, True, True),
    "write": ("lisa_dist.checkpoint.save", "save_file", 5, True, False),
    "sum": ("lisa_dist.distributed.collectives", "describe_file", 12, True, False),
    "state": ("lisa_dist.checkpoint.save", "write_json", 2, True, True),
    "rename": ("lisa_dist.checkpoint.save", "put_in_place", 2, True, True),
    "rotation": ("shutil", "rmtree", 4, False, True),
    "switch": ("lisa_dist.core.selection", "BlockSelection.activate", 2, False, False),
    "partition": ("lisa_dist.zero.partitions", "ZeroPartitions.repartition", 2, False, False),
    "check of the sums": ("lisa_dist.checkpoint.resume", "check_files", 1, False, False),
    "load of the weights": ("lisa_dist.checkpoint.resume", "read_weights", 1, False, False),
    "load of the states": ("lisa_dist.checkpoint.optimizer_states", "StateFiles.read", 1, False, False),
    "step": ("deepspeed.runtime.engine", "DeepSpeedEngine.step", 4, False, False),
}
# The same for --method full and lora, whose faults are kills and signals.
TRAINER_RUNS = (
    {"deepspeed": "zero2", "ranks": 1},
    {"deepspeed": "zero3", "ranks": 2},
    {"deepspeed": "zero2", "ranks": 2},
)
TRAINER_MOMENTS = {
    "begin of a save": ("lisa_dist.train.baseline", "make_staging", 4, False, False),
    "write": ("torch", "save", 12, False, False),
    "optimizer": ("deepspeed.runtime.engine", "DeepSpeedEngine.save_checkpoint", 4, False, False),
    "sum": ("lisa_dist.distributed.collectives", "describe_file", 20, False, False),
    "state": ("lisa_dist.checkpoint.trainer_checkpoint", "write_json", 4, False, True),
    "rename": ("lisa_dist.checkpoint.trainer_checkpoint", "put_in_place", 4, False, True),
    "card": ("lisa_dist.report.hub", "metadata_save", 4, False, True),
    "rotation": ("shutil", "rmtree", 6, False, True),
    "evaluation": ("transformers", "Trainer.evaluation_loop", 3, False, False),
    "load": ("deepspeed.runtime.engine", "DeepSpeedEngine.load_checkpoint", 1, False, False),
    "step": ("deepspeed.runtime.engine", "DeepSpeedEngine.step", 6, False, False),
    "final model": ("lisa_dist.train.baseline", "move_model", 1, False, True),
}
KINDS = ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk", "torn file")


@dataclass(frozen=True)
class Fault:
    """The `number`-th call of a moment's function on a rank ends in a fault, before or after it."""

    moment: str
    kind: str
    rank: int
    number: int
    after: bool


def draw(generator: random.Random, run: dict) -> Fault:
    moments = MOMENTS if run.get("method") is None else TRAINER_MOMENTS
    moment = generator.choice(list(moments))
    _, _, most, may_be_full, of_rank_0 = moments[moment]
    unfit = {"full disk": not may_be_full, "torn file": moment != "write", "SIGSTOP": moments is TRAINER_MOMENTS}
    kind = generator.choice([kind for kind in KINDS if not unfit.get(kind)])
    rank = 0 if of_rank_0 else generator.randrange(run.get("ranks", 2))
    return Fault(moment, kind, rank, generator.randint(1, most), generator.random() < 0.5)


# On a rank


def strike(fault: Fault, moments: dict) -> None:
    """Have the fault come. A process that is stopped goes on no more."""
    module, attribute, *_ = moments[fault.moment]
    *inner, name = attribute.split(".")
    owner: Any = functools.reduce(getattr, inner, importlib.import_module(module))
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != fault.number:
            return function(*args, **kwargs)
        if fault.after:
            outcome = function(*args, **kwargs)
        Path(os.environ["STRUCK"]).touch()
        if fault.kind == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.kind == "torn file":
            function(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), getattr(signal, fault.kind))
        return outcome if fault.after else function(*args, **kwargs)

    setattr(owner, name, wrapped)


def run_rank(rank: int, store: str, folder: str, run: dict, fault: Fault | None, said: str) -> None:
    """Go on from what is in `folder` to the end, unless the fault comes."""
    with open(said, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=Path(store).parent.name, DS_ACCELERATOR="cpu", STRUCK=f"{said}.struck",
    )  # fmt: skip
    if run.get("method") is not None:
        train_rank(rank, store, folder, run, fault)
    import lisa_dist
    from lisa_dist.checkpoint.folders import rotate_checkpoints
    from lisa_dist.checkpoint.resume import find_checkpoint
    from lisa_dist.zero.cpu_ops import start_deepspeed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    start_deepspeed()
    if fault is not None and fault.rank == rank:
        strike(fault, MOMENTS)
    found = find_checkpoint(folder)
    config = lisa_dist.LisaConfig(**{"lisa_interval_steps": INTERVAL} | run.get("lisa", {}))
    model = tiny_llama(seed=0 if found is None else 9, num_layers=4)
    optim = run.get("optim", "adamw_torch")
    engine, lisa = lisa_dist.initialize(model, run["ds_config"], config, lr=1e-3, optim=optim)
    if found is not None:
        lisa_dist.load_checkpoint(lisa, *found)
    batches = token_batches(STEPS, rows=2, length=8)
    while engine.global_steps < STEPS:
        lisa.on_step_begin()
        rows = batches[engine.global_steps, 0, rank : rank + 1]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
        if engine.global_steps % SAVES == 0:
            saved = Path(folder) / f"checkpoint-{engine.global_steps}"

            def rotate(saved: Path = saved) -> None:
                if rank == 0:
                    rotate_checkpoints(saved, 2)

            lisa_dist.save_checkpoint(lisa, saved, in_background=run["in_background"], then=rotate)
    lisa_dist.finish_save(lisa)
    torch.distributed.barrier()
    if rank == 0:
        (Path(folder) / "done").touch()
    os._exit(0)


def train_rank(rank: int, store: str, folder: str, run: dict, fault: Fault | None) -> None:
    """Run `lisa-dist train`, which resumes from what is in `folder`, unless the fault comes."""
    from lisa_dist.commands import train

    ranks, data = str(run["ranks"]), Path(run["data"])
    os.environ.update(WORLD_SIZE=ranks, LOCAL_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=Path(store).read_text())
    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        strike(fault, TRAINER_MOMENTS)
    changes = {name: run[name] for name in ("method", "deepspeed")} | {"max_steps": STEPS, "lora_r": 4, "eval_steps": 3}
    changes |= {"save_strategy": "steps", "save_steps": SAVES, "save_total_limit": 2, "resume_from_checkpoint": "auto"}
    train._write_report = lambda finished: (finished / "done").touch()  # the model is saved
    train.main(flags_for(data, Path(folder), **changes))


# Around the ranks


def start(folder: Path, run: dict, fault: Fault | None) -> tuple[bool, str]:
    """Start both ranks and wait for their end: whether the fault came, and what the ranks said."""
    with tempfile.TemporaryDirectory() as meeting:
        said = [f"{meeting}/{rank}.txt" for rank in range(run.get("ranks", 2))]
        if run.get("method") is not None:
            Path(meeting, "store").write_text(str(free_port()))
        ranks = [
            rank_context().Process(
                target=run_rank, args=(rank, f"{meeting}/store", str(folder), run, fault, said[rank]), daemon=True
            )
            for rank in range(len(said))
        ]
        for one in ranks:
            one.start()
        began, ended = time.monotonic(), None
        while any(one.is_alive() for one in ranks):
            stopped = any(one.is_alive() and is_stopped(one.pid) for one in ranks)
            if ended is None and any(one.exitcode not in (None, 0) for one in ranks):
                ended = time.monotonic()
            hangs = ended is None and not stopped and time.monotonic() > began + PATIENCE
            # As launchers do: ranks that set up a group wait for a peer that is gone as long as the backend lets them.
            if stopped or hangs or (ended is not None and time.monotonic() > ended + GRACE):
                for one in ranks:
                    one.kill()
            if hangs:
                raise AssertionError(f"{fault} in {run}: hung\n" + "".join(Path(one).read_text() for one in said))
            time.sleep(0.01)
        for one in ranks:
            one.join()
        came = any(Path(f"{one}.struck").exists() for one in said)
        return came, "".join(Path(one).read_text(errors="replace") for one in said)


def is_stopped(process: int | None) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder; AssertionError for one that is not whole."""
    from lisa_dist.checkpoint.resume import read_state
    from lisa_dist.checkpoint.trainer_checkpoint import check_complete
    from lisa_dist.run_folder import STATE_NAME

    found = []
    for path in folder.glob("checkpoint-*"):
        # Both raise where a file is not as it was written.
        (read_state if (path / STATE_NAME).exists() else check_complete)(path)
        found.append(int(path.name.removeprefix("checkpoint-")))
    return sorted(found)


def digest(folder: Path) -> str:
    """A hash of a finished run's weights and states by name: kept states are in the order in which they came.

    Of a trainer's run: of the weights, and of the loss and the norm of the gradients in each step.
    """
    total = hashlib.sha256()
    if (folder / "trainer_state.json").exists():
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [(one["step"], one["loss"], one["grad_norm"]) for one in log if "loss" in one]
        assert [step for step, *_ in losses] == list(range(1, STEPS + 1))
        total.update(json.dumps(losses).encode())
    files = [*folder.glob("*.safetensors"), *(folder / f"checkpoint-{STEPS}").glob("*.safetensors")]
    assert files
    for path in sorted(files):
        with safe_open(path, framework="pt") as file:
            partitions = json.loads((file.metadata() or {}).get("partitions", "[]"))
            total.update("".join([path.name, *sorted(map(json.dumps, partitions))]).encode())
            for name in sorted(file.keys()):
                total.update(name.encode() + file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def campaign(
    number: int, seed: int, report: Callable[[str], None] = print, method: str = "lisa"
) -> collections.Counter:
    """Have `number` faults come; how many by moment and kind. Raises AssertionError where anything is lost."""
    if method == "lisa":
        return _campaign(number, seed, report, RUNS)
    with tempfile.TemporaryDirectory() as data:
        save_tiny_run(Path(data))
        return _campaign(number, seed, report, [one | {"method": method, "data": data} for one in TRAINER_RUNS])


def _campaign(number: int, seed: int, report: Callable[[str], None], runs: Sequence[dict]) -> collections.Counter:
    generator = random.Random(seed)
    came: collections.Counter[tuple[str, str]] = collections.Counter()
    expected: dict[int, str] = {}
    for chain in itertools.count():
        if came.total() >= number:
            return came
        index = (chain + seed) % len(runs)
        run = runs[index]
        with tempfile.TemporaryDirectory() as temporary:
            if index not in expected:
                whole = Path(temporary) / "whole"
                _, said = start(whole, run, None)
                assert (whole / "done").exists(), said[-3000:]
                expected[index] = digest(whole)
            folder, newest, left = Path(temporary) / "run", 0, min(12, number - came.total())
            while not (folder / "done").exists():
                fault = draw(generator, run) if left else None
                struck, said = start(folder, run, fault)
                assert struck or (folder / "done").exists(), f"{fault} in {run} did not come\n{said[-3000:]}"
                steps = whole_checkpoints(folder)
                assert max(steps, default=0) >= newest, f"{fault} in {run}: {steps} after {newest}"
                newest = max(steps, default=0)
                if struck:
                    left -= 1
                    came[fault.moment, fault.kind] += 1
            assert digest(folder) == expected[index], f"another end than undisturbed: {run}"
        report(f"{came.total()} faults, run {chain + 1}: {run}")


def main() -> None:
    """Print how many faults of each kind came at each moment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("lisa", "full", "lora"), default="lisa")
    arguments = parser.parse_args()
    started = time.monotonic()
    came = campaign(arguments.faults, arguments.seed, lambda line: print(line, flush=True), arguments.method)
    print(f"{'':20}" + "".join(kind.rjust(11) for kind in KINDS))
    for moment in MOMENTS if arguments.method == "lisa" else TRAINER_MOMENTS:
        print(moment.ljust(20) + "".join(f"{came[moment, kind]:11}" for kind in KINDS))
    print(f"{came.total()} faults in {time.monotonic() - started:.0f} s: 0 lost, 0 hung")


if __name__ == "__main__":
    main()
