"""What does a checkpoint cost where blocks that have not changed are linked? Bytes written, and seconds of waiting.

python -m benchmarks.cost.checkpoints --model .quickstart/model

LISA trains on two CPU ranks and saves at the end of every period, in three ways: all blocks, what has changed, and
that in the background, where training waits for the copies on the host alone.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import lisa_dist
from benchmarks.common.ranks import Caller, RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.tables.rows import show
from lisa_dist import LisaConfig
from lisa_dist.checkpoint.save import finish_save, save_checkpoint

WAYS = ("all blocks", "what has changed", "in the background")


def save_in_periods(model_path: str, ds_config: str, way: str, saves: int, interval: int, folder: Path) -> list[dict]:
    """On a rank: bytes that all ranks have written, and seconds, for each save but the first, which writes all."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    engine, lisa = lisa_dist.initialize(model, ds_config, LisaConfig(lisa_interval_steps=interval), lr=1e-5)
    tokens = torch.arange(64)[None]
    found = []
    for number in range(saves + 1):
        for _ in range(interval):
            lisa.on_step_begin()
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        if way == "all blocks":
            lisa.changes.forget()
        dist.barrier()
        checkpoint, started = folder / f"checkpoint-{number}", time.perf_counter()
        save_checkpoint(lisa, checkpoint, in_background=way == "in the background")
        waited = time.perf_counter() - started
        finish_save(lisa)
        dist.barrier()
        seconds = time.perf_counter() - started
        # Of files that are linked no new bytes are on the disk.
        sizes = [path.stat() for path in checkpoint.iterdir()]
        written = sum(one.st_size for one in sizes if one.st_nlink == 1)
        dist.barrier()
        if number > 0:
            found.append({"waited": waited, "seconds": seconds, "bytes": written})
    return found


def main() -> None:
    """Each way in ranks of its own."""
    run_on_cpu()
    parser = parser_of(__doc__, "checkpoints")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--configs", nargs="+", default=["zero2", "zero3"])
    parser.add_argument("--saves", type=positive, default=4)
    parser.add_argument("--interval", type=positive, default=5, help="K, and the steps between two saves")
    arguments = parser.parse_args()
    figures: dict = {"saves": {}}
    for ds_config in arguments.configs:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                run = (arguments.model, ds_config, way, arguments.saves, arguments.interval, Path(folder))
                with RankGroup(2, Caller) as ranks:
                    found = ranks.call("run", save_in_periods, *run)[0]
            figures["saves"].setdefault(ds_config, {})[way] = found
    write_results(arguments.results, figures)
    show("checkpoints", figures)


if __name__ == "__main__":
    main()
