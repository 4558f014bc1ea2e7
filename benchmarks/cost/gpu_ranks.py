"""Do several GPUs compute the same however they are set, and at what cost? Losses, peaks, steps, switches, and SIGTERM.

python -m benchmarks.cost.gpu_ranks --ranks 2        # five minutes on a host with so many GPUs, without a network
python -m benchmarks.cost.gpu_ranks --rehearse       # small, on whatever there is

Each method learns the same row of each rank by heart, so its losses are to be those of the first, but for 2%; what has
4 bits has losses of its own. At last one rank of `lisa-dist train` gets SIGTERM: all are to save after one step, and to
go on.
"""

import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import distributed as dist

from benchmarks.common import runs
from benchmarks.common.methods import LISA, Method
from benchmarks.common.ranks import Caller, RankError, RankGroup
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.cost.gpu import of_recipe, settled
from benchmarks.cost.gpu_train import make_folder
from benchmarks.tables.render import print_table
from lisa_dist.ds_config import read_ds_config
from lisa_dist.run_folder import LOG_NAME

STEPS, INTERVAL, TOLERANCE = 10, 4, 2e-2
HEADER = ("", "losses", "differ by", "peak GiB", "step s", "switch s", "tokens/s")
APART, OVERLAPPING = read_ds_config("zero2"), read_ds_config("zero2")
APART["zero_optimization"]["overlap_comm"], OVERLAPPING["zero_optimization"]["overlap_comm"] = False, True
METHODS = {
    "zero2, no overlap": (APART, LISA),
    "zero2, overlap": (OVERLAPPING, LISA),
    "zero2, overlap, rows": (OVERLAPPING, Method("rows", "lisa", optim="lisa_adamw")),
    "zero1": ("zero1", LISA),
    "zero3": ("zero3", LISA),
    "zero2, 4 bits": ("zero2", of_recipe("llama3_8b_16gb")),
}


class SameRows(runs.Run):
    """A run that has the same rows in every step."""

    def _next_tokens(self, length: int) -> torch.Tensor:
        self._tokens.manual_seed(dist.get_rank())
        return super()._next_tokens(length)


def measure(ds_config: str | dict, method: Method, arguments: Namespace) -> dict:
    """Losses of each rank, and the slowest rank's seconds."""
    config = runs.shrunk_config(arguments.model, *((64, 5) if arguments.rehearse else (1, arguments.num_layers)))
    kind = {"dtype": torch.bfloat16, "interval": INTERVAL, "lr": 1e-3 if arguments.rehearse else 2e-5}
    with RankGroup(arguments.ranks, SameRows, settled(method, config), config, ds_config, **kind) as ranks:
        steps = [ranks.call("step", arguments.length) for _ in range(STEPS)]
        losses, peak = ranks.call("get", "losses"), max(ranks.call("peak_bytes", arguments.length))
    seconds = [max(one["step"] for one in step) for step in steps]
    switches = [max(one["begin"] for one in steps[number]) for number in range(INTERVAL, STEPS, INTERVAL)]
    own = bool(method.config.frozen_flags)
    return {"losses": losses, "own": own, "peak": peak, "step": median(seconds[2:INTERVAL]), "switch": median(switches)}


def train(folder: Path, words: list[str], stops: bool) -> None:
    """On a rank: `lisa-dist train`; the last rank gets SIGTERM in the second period, where it is to stop."""
    from lisa_dist.commands import train as command

    rank = int(os.environ["RANK"])
    sys.stdout = open(folder / f"rank{rank}.txt", "w", encoding="utf-8")  # noqa: SIM115 - it lives as long as the rank
    command.end_process = lambda: None  # the group ends it

    def stop() -> None:
        log = folder / "run" / LOG_NAME
        while not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if stops and rank == int(os.environ["WORLD_SIZE"]) - 1:
        threading.Thread(target=stop, daemon=True).start()
    command.main(words)


def stop_and_resume(arguments: Namespace) -> dict:
    """A run that SIGTERM ends, and one that goes on for two steps."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name), arguments.model, 512, 128, 64, 4)
        given = (
            f"--model_name_or_path {name}/model --dataset_name {name}/rows.jsonl --output_dir {name}/run --bf16 true"
        )
        given += " --deepspeed zero2 --lisa_preset none --lr_scheduler_type constant --report_to none --max_length 128"
        given, saved = [*given.split(), "--lisa_interval_steps", str(INTERVAL), "--max_steps"], []
        for more in ([], ["--resume_from_checkpoint", "auto"]):
            words = [*given, str(saved[0] + 2 if saved else 1000), *more]
            with RankGroup(arguments.ranks, Caller) as ranks:
                ranks.call("run", train, Path(name), words, not saved)
            saved.append(max(int(path.name.partition("-")[2]) for path in Path(name, "run").glob("checkpoint-*")))
    return {"stopped_after": saved[0], "went_on_to": saved[1]}


def attempted(what: Callable[..., dict], *args) -> dict:
    """What came of it, or how a rank has failed."""
    try:
        return what(*args)
    except RankError as error:
        return {"not_run": str(error)[-600:]}


def cells_of(found: dict, first: dict, arguments: Namespace) -> list[str]:
    """A row of the table; `first` is the method that losses are compared with."""
    if "not_run" in found or "not_run" in first:
        return ["FAILED", found.get("not_run", "").strip().rpartition("\n")[2], *[""] * 4]
    pairs = zip(*(itertools.chain(*one["losses"]) for one in (found, first)), strict=True)
    by = max(abs(one - other) / abs(other) for one, other in pairs)
    learned = all(losses[-1] < 0.95 * losses[0] for losses in found["losses"])  # else all methods would have the same
    verdict = "the same" if by == 0 else "its own" if found["own"] else "passed" if by <= TOLERANCE else "FAILED"
    return [verdict if learned else "FAILED", f"{by:.1e}", f"{found['peak'] / 2**30:.2f}", f"{found['step']:.3f}",
            f"{found['switch']:.3f}", f"{arguments.ranks * arguments.length / found['step']:.0f}"]  # fmt: skip


def main() -> None:
    """Measure every method; print one table, and what came of SIGTERM; end with status 1 where something has failed."""
    parser = parser_of(__doc__, "gpu_ranks")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--model", default="llama3.1-8b", help="shipped config, folder or hub id; weights are random")
    parser.add_argument("--num_layers", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a rank's row")
    parser.add_argument("--rehearse", action="store_true", help="a 64th of the width")
    arguments = parser.parse_args()
    there = torch.cuda.device_count()
    if there < arguments.ranks and not arguments.rehearse:
        parser.error(f"--ranks {arguments.ranks}: there are {there} GPUs here; --rehearse runs the same on CPUs")
    figures = {"ranks": arguments.ranks, "arms": {}, "sigterm": {"not_run": "not reached"}}
    for name, (ds_config, method) in METHODS.items():
        figures["arms"][name] = attempted(measure, ds_config, method, arguments)
        print(f"{name}: {figures['arms'][name].get('not_run', 'measured')}", flush=True)
        write_results(arguments.results, figures, quiet=True)
    figures["sigterm"] = stopped = attempted(stop_and_resume, arguments)
    write_results(arguments.results, figures)
    first = next(iter(figures["arms"].values()))
    rows = [[name, *cells_of(found, first, arguments)] for name, found in figures["arms"].items()]
    print_table(list(HEADER), *rows)
    print("SIGTERM:", *(f"{key} {value}" for key, value in stopped.items()))
    is_well = "not_run" not in stopped and stopped["went_on_to"] == stopped["stopped_after"] + 2 < 1000
    raise SystemExit(not is_well or any(row[1] == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
