"""How much memory of a host does loading a model take, by stage and rank? Peaks while from_pretrained runs.

python -m benchmarks.cost.loading --model random

Of each rank: its own pages (anonymous), and pages of files, which ranks share and the kernel may take back, above what
it had before. On these ranks the host's memory is the device's too, so a share of the weights is in their own pages.
`--model random` is a LLaMA of 1 B parameters, next to which the libraries' own memory is little; it takes 2 GB of disk.
"""

import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.common.arms import model_of
from benchmarks.common.ranks import run_on_ranks
from benchmarks.common.results import parser_of, print_table, write_results

RANKS = 4


def pages() -> tuple[int, int]:
    """Bytes of this process: anonymous ones, and those of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


def write_random_model(folder: str) -> None:
    """A LLaMA of 1 B parameters in bf16, in shards."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, vocab_size=32000, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def load(model_path: str, stage: int) -> dict:
    """On a rank: load the model as a run under the stage does; seconds, and bytes of pages at the peak."""
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    kept = HfDeepSpeedConfig(config)  # from_pretrained looks for it
    before = peak = pages()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = tuple(map(max, peak, pages()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    if stage == 2:  # what is mapped is read when it is used
        sum(float(parameter.sum()) for parameter in model.parameters())
    seconds = time.monotonic() - started
    done.set()
    thread.join()
    del kept
    return {"seconds": seconds, "peak": [after - first for after, first in zip(peak, before, strict=True)]}


def main() -> None:
    """Load under each stage; print and write what it took."""
    parser = parser_of(__doc__, "loading")
    parser.add_argument("--model", required=True, help="folder or hub id, or random")
    arguments = parser.parse_args()
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == "random":
            write_random_model(folder)
        model = folder if arguments.model == "random" else arguments.model
        size = 2 * sum(one.numel() for one in model_of(AutoConfig.from_pretrained(model)).parameters())
        for stage in (2, 3):
            found = run_on_ranks(RANKS, load, model, stage)
            peaks = [one["peak"] for one in found]
            figures[f"zero{stage}"] = {"model_bytes": size, "seconds": found[0]["seconds"], "peaks": peaks}
            own, of_files = zip(*peaks, strict=True)
            for rank, of_rank in [*enumerate(peaks), ("host", (sum(own), max(of_files)))]:
                rows.append([f"zero{stage}", str(rank), *(f"{part / size:.2f}" for part in of_rank)])
    print(f"in copies of the model, {size / 2**20:.0f} MiB in bf16")
    print_table(["stage", "rank", "own pages", "of files"], rows)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
