"""What do a checkpoint and an export cost? Seconds and peak host memory under ZeRO-3, against the size of the model.

python benchmarks/export.py --model .quickstart/model
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results


def memory(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def worker(arguments: argparse.Namespace) -> None:
    """One step, then each kind of save, measured on each rank."""
    import torch
    from torch import distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import lisa_dist
    from lisa_dist.checkpoint.resume import load_checkpoint
    from lisa_dist.checkpoint.save import save_checkpoint
    from lisa_dist.checkpoint.weights import write_configs, write_weights
    from lisa_dist.zero.parameters import parameter_numel

    dtype = getattr(torch, arguments.dtype)
    hidden = AutoConfig.from_pretrained(arguments.model).hidden_size
    ds_config = lisa_dist.load_ds_config("zero3", model=torch.nn.Linear(1, 1, dtype=dtype), micro_batch_size=1)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * hidden
    keep = HfDeepSpeedConfig(ds_config)  # has from_pretrained shard the weights as they come
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    del keep
    engine, lisa = lisa_dist.initialize(model, ds_config, lr=1e-5)
    tokens = torch.arange(64)[None]
    lisa.on_step_begin()
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    folder = Path(arguments.folder)
    size = sum(parameter_numel(parameter) * parameter.element_size() for parameter in model.parameters())
    figures: dict = {"model_bytes": size}

    def measure(name: str, action) -> None:
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, started = memory("VmRSS"), time.perf_counter()
        action()
        dist.barrier()
        mine = {"seconds": time.perf_counter() - started, "rss_before": before, "peak_more": memory("VmHWM") - before}
        every: list = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        figures[name] = every

    def export() -> None:
        out = folder / "saved"
        if dist.get_rank() == 0:
            out.mkdir()
            write_configs(engine.module, out)
        write_weights(engine, lisa.blocks, out, dist.get_rank() == 0, arguments.max_shard_size, True)

    measure("save_checkpoint", lambda: save_checkpoint(lisa, folder / "checkpoint-1"))
    measure("save_model", export)
    measure("load_checkpoint", lambda: load_checkpoint(lisa, folder / "checkpoint-1"))
    if dist.get_rank() == 0:
        figures["checkpoint_bytes"] = sum(p.stat().st_size for p in (folder / "checkpoint-1").iterdir())
        (folder / "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Launch the ranks, run `lisa-dist export` on what they saved, print a table."""
    parser = worker_parser(__doc__.splitlines()[0], "export.json")
    parser.add_argument("--num_ranks", type=int, default=2)
    parser.add_argument("--max_shard_size", type=int, default=100_000_000, help="bytes")
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model": arguments.model, "dtype": arguments.dtype, "folder": folder}
        flags["max_shard_size"] = arguments.max_shard_size
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        launch(Path(__file__), words, arguments.num_ranks)
        figures = json.loads((Path(folder) / "figures.json").read_text())
        command = [str(Path(sys.executable).with_name("lisa-dist")), "export"]
        started = time.perf_counter()
        subprocess.run([*command, f"{folder}/checkpoint-1", f"{folder}/exported"], check=True)
        figures["lisa_dist_export_seconds"] = time.perf_counter() - started
    print(f"model {figures['model_bytes']:,} bytes, checkpoint {figures['checkpoint_bytes']:,} bytes")
    rows = [
        [name, str(rank), f"{one['seconds']:.2f}", f"{one['rss_before']:,}", f"{one['peak_more']:,}"]
        for name in ("save_checkpoint", "save_model", "load_checkpoint")
        for rank, one in enumerate(figures[name])
    ]
    print_table(["what", "rank", "seconds", "resident before", "peak above it"], rows)
    print(f"lisa-dist export: {figures['lisa_dist_export_seconds']:.1f} s with the start of Python")
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
