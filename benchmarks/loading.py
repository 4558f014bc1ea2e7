"""How much memory of a host does loading a model take, by stage and rank? Peaks while from_pretrained runs.

python benchmarks/loading.py --model random

Of each rank: its own pages (anonymous), and pages of files, which ranks share and the kernel may take back, above what
it had before. On these ranks the host's memory is the device's too, so a share of the weights is in their own pages.
`--model random` is a LLaMA of 1 B parameters, beside which the libraries' own memory is little; it takes 2 GB of disk.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

RANKS = 4


def pages() -> tuple[int, int]:
    """Bytes of this process: anonymous ones, and those of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def write_random_model(folder: str) -> None:
    """A LLaMA of 1 B parameters in bf16, in shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, vocab_size=32000, **heads)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def worker(arguments: argparse.Namespace) -> None:
    """Load the model as a run under the stage does, and note the peaks."""
    import deepspeed
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    config["zero_optimization"] = {"stage": int(arguments.stage[-1])}
    kept = HfDeepSpeedConfig(config)  # from_pretrained looks for it
    before = peak = pages()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = tuple(map(max, peak, pages()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begun = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    if arguments.stage == "zero2":  # what is mapped is read when it is used
        sum(float(parameter.sum()) for parameter in model.parameters())
    seconds = time.monotonic() - begun
    done.set()
    thread.join()
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, [after - first for after, first in zip(peak, before, strict=True)])
    if dist.get_rank() == 0:
        numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        figures = {
            "model_bytes": 2 * numel,
            "seconds": seconds,
            "peaks": every,
            "stage": kept.config["zero_optimization"],
        }
        Path(arguments.folder, "figures.json").write_text(json.dumps(figures))


def main() -> None:
    """Load under each stage; print and write what it took."""
    parser = worker_parser(__doc__.splitlines()[0], "loading.json")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == "random":
            write_random_model(folder)
        model = folder if arguments.model == "random" else arguments.model
        for stage in ("zero2", "zero3"):
            launch(Path(__file__), ["--folder", folder, "--model", model, "--stage", stage], RANKS)
            figures[stage] = json.loads(Path(folder, "figures.json").read_text())
    for stage, found in figures.items():
        size = found["model_bytes"]
        rows += [
            [stage, str(rank), *(f"{part / size:.2f}" for part in peak)] for rank, peak in enumerate(found["peaks"])
        ]
        own, of_files = zip(*found["peaks"], strict=True)
        rows.append([stage, "host", f"{sum(own) / size:.2f}", f"{max(of_files) / size:.2f}"])
    print(f"in copies of the model, {size / 2**20:.0f} MiB in bf16")
    print_table(["stage", "rank", "own pages", "of files"], rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
