"""What do a checkpoint and an export cost? Seconds and peak host memory under ZeRO-3, against the size of the model.

python -m benchmarks.cost.export --model .quickstart/model
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import lisa_dist
from benchmarks.common.arms import model_of
from benchmarks.common.ranks import run_on_ranks
from benchmarks.common.results import parser_of, print_table, write_results
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import write_configs, write_weights

SHARD_BYTES = 100_000_000
ACTIONS = ("save_checkpoint", "save_model", "load_checkpoint")


def memory(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS now, VmHWM at its peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def measure(action: Callable[[], object]) -> dict:
    """On a rank: seconds of an action, memory before it, and the most above that."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory("VmRSS"), time.perf_counter()
    action()
    dist.barrier()
    return {"seconds": time.perf_counter() - started, "rss_before": before, "peak_more": memory("VmHWM") - before}


def save_and_load(model_path: str, folder: Path) -> list[dict]:
    """On a rank: one step, then each of ACTIONS."""
    hidden = AutoConfig.from_pretrained(model_path).hidden_size
    ds_config = lisa_dist.load_ds_config("zero3", model=torch.nn.Linear(1, 1), micro_batch_size=1)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * hidden
    keep = HfDeepSpeedConfig(ds_config)  # has from_pretrained shard the weights as they come
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    del keep
    engine, lisa = lisa_dist.initialize(model, ds_config, lr=1e-5)
    tokens = torch.arange(64)[None]
    lisa.on_step_begin()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()

    def save_model() -> None:
        out, writes = folder / "saved", dist.get_rank() == 0
        if writes:
            out.mkdir()
            write_configs(engine.module, out)
        write_weights(engine, lisa.blocks, out, writes, SHARD_BYTES, True)

    saved = folder / "checkpoint-1"
    actions = (lambda: save_checkpoint(lisa, saved), save_model, lambda: load_checkpoint(lisa, saved))
    return [measure(action) for action in actions]


def main() -> None:
    """Start the ranks, run `lisa-dist export` on what they saved, print a table."""
    parser = parser_of(__doc__, "export")
    parser.add_argument("--model", required=True, help="folder or hub id")
    arguments = parser.parse_args()
    size = 4 * sum(one.numel() for one in model_of(AutoConfig.from_pretrained(arguments.model)).parameters())
    with tempfile.TemporaryDirectory() as folder:
        of_ranks = run_on_ranks(2, save_and_load, arguments.model, Path(folder))
        figures = {"model_bytes": size} | dict(zip(ACTIONS, map(list, zip(*of_ranks, strict=True)), strict=True))
        figures["checkpoint_bytes"] = sum(path.stat().st_size for path in Path(folder, "checkpoint-1").iterdir())
        started = time.perf_counter()
        command = [str(Path(sys.executable).with_name("lisa-dist")), "export"]
        subprocess.run([*command, f"{folder}/checkpoint-1", f"{folder}/exported"], check=True)
        figures["lisa_dist_export_seconds"] = time.perf_counter() - started
    print(f"model {size:,} bytes, checkpoint {figures['checkpoint_bytes']:,} bytes")
    rows = [
        [name, str(rank), f"{one['seconds']:.2f}", f"{one['rss_before']:,}", f"{one['peak_more']:,}"]
        for name in ACTIONS
        for rank, one in enumerate(figures[name])
    ]
    print_table(["what", "rank", "seconds", "resident before", "peak above it"], rows)
    print(f"lisa-dist export: {figures['lisa_dist_export_seconds']:.1f} s with the start of Python")
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
