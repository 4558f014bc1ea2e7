"""What does a checkpoint cost where blocks that have not changed are linked? Bytes written, and seconds of waiting.

python -m benchmarks.cost.checkpoints --model .quickstart/model

LISA trains on two CPU ranks and saves at the end of every period, in three ways: all blocks, what has changed, and
that in the background, where training waits for the copies on the host alone. And by arithmetic, from the bytes of
each block: a stop signal to a model of 70B on two hosts of eight GPUs, one or two periods after its last checkpoint.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

import lisa_dist
from benchmarks.common.arms import model_of
from benchmarks.common.ranks import run_on_ranks
from benchmarks.common.results import parser_of, positive, print_table, write_results
from lisa_dist import LisaConfig
from lisa_dist.checkpoint.block_files import assign, block_files, host_by_host
from lisa_dist.checkpoint.save import finish_save, save_checkpoint
from lisa_dist.core.blocks import find_blocks
from lisa_dist.memory.plan import load_model_config

WAYS = ("all blocks", "what has changed", "in the background")
HOSTS, RANKS_OF_HOST = 2, 8
DISK = 2e9  # bytes a second that a host writes
COPY = 5e9  # bytes a second from a GPU to memory of its host that is not pinned


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


def after_a_signal(periods: int) -> dict[str, float]:
    """Bytes and seconds of the save that a stop signal begins, `periods` after the last checkpoint, in bf16."""
    config = load_model_config("llama2-70b")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files = {file.block: file for file in block_files(model, find_blocks(model))}
    outer = [file for block, file in files.items() if not block.startswith("layers.")]
    layers = [file for block, file in files.items() if block.startswith("layers.")]
    gamma = LisaConfig().lisa_activated_layers
    changed = [*outer, *layers[: gamma * periods]]
    hosts = [str(rank // RANKS_OF_HOST) for rank in range(HOSTS * RANKS_OF_HOST)]
    owners = assign(changed, host_by_host(hosts))
    # Each rank has the masters and both moments of its part of what is active, in fp32.
    states = 12 * sum(file.nbytes // 2 for file in [*outer, *layers[:gamma]]) / len(hosts)
    of_ranks = [states] * len(hosts)
    for file in changed:
        of_ranks[owners[file.name]] += file.nbytes
    of_hosts = [sum(of_ranks[host * RANKS_OF_HOST :][:RANKS_OF_HOST]) for host in range(HOSTS)]
    return {
        "model_bytes": sum(file.nbytes for file in files.values()),
        "bytes": sum(of_ranks),
        "most_of_a_host": max(of_hosts),
        "most_of_a_rank": max(of_ranks),
        "seconds": max(of_hosts) / DISK,
        "seconds_of_copies": max(of_ranks) / COPY,
    }


def main() -> None:
    """Each way in ranks of its own."""
    parser = parser_of(__doc__, "checkpoints")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--configs", nargs="+", default=["zero2", "zero3"])
    parser.add_argument("--saves", type=positive, default=4)
    parser.add_argument("--interval", type=positive, default=5, help="K, and the steps between two saves")
    arguments = parser.parse_args()
    size = 4 * sum(one.numel() for one in model_of(AutoConfig.from_pretrained(arguments.model)).parameters())
    figures: dict = {"model_bytes": size, "saves": {}}
    rows = []
    for ds_config in arguments.configs:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                run = (arguments.model, ds_config, way, arguments.saves, arguments.interval, Path(folder))
                found = run_on_ranks(2, save_in_periods, *run)[0]
            figures["saves"].setdefault(ds_config, {})[way] = found
            means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
            rows.append([ds_config, way, f"{means['bytes']:,.0f}", *(f"{means[n]:.2f}" for n in ("waited", "seconds"))])
    print_table(["config", "way", "bytes written", "s of waiting", "s until it is there"], rows)
    figures["llama2-70b on 16 GPUs"] = {periods: after_a_signal(periods) for periods in (1, 2)}
    for periods, found in figures["llama2-70b on 16 GPUs"].items():
        print(
            f"llama2-70b on 2 hosts of 8 GPUs, {periods} period(s) after the last checkpoint: "
            f"{found['bytes'] / 1e9:.1f} GB, of weights of {found['model_bytes'] / 1e9:.1f} and the states, in "
            f"{found['seconds']:.1f} s at 2 GB/s a host; copies of a rank {found['most_of_a_rank'] / 1e9:.2f} GB, "
            f"{found['seconds_of_copies']:.2f} s at 5 GB/s"
        )
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
