"""What does `lisa-dist train` itself take on a GPU, with rows of all lengths? Speed, and memory against its plan.

python -m benchmarks.cost.gpu_train                                                  # two minutes, 40 GB of disk
python -m benchmarks.cost.gpu_train --recipe llama3_8b_16gb --packing true           # other flags are the run's
python -m benchmarks.cost.gpu_train --rehearse                                       # small, on whatever there is

A hundred steps by a recipe, of a model of its shape with random weights and of rows of random words, as many of 16 as
of --max_length; no network is needed. llama3_8b_24gb trains as many layers as fit, so that little memory is left.
`measured` is of one step, as planned; `allocated` and `reserved` are of the steps after it, `used` is what nvidia-smi
sees at most, and `context` what it sees at the end besides what is reserved.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from statistics import median

import torch
import yaml

from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.tables.render import print_table
from lisa_dist import cli
from lisa_dist.distributed import launching

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
MIB_USED = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]


def make_folder(folder: Path, model: str, num_rows: int, longest: int, shrink: int, layers: int | None) -> None:
    """A model with random weights, a tokenizer of as many words, and rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    runs, draws = import_module("benchmarks.common.runs"), random.Random(0)
    config = runs.shrunk_config(model, shrink, layers)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.to_empty(device="cpu")
    some = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for parameter in made.parameters():
        for part in parameter.data.view(-1).split(len(some)):  # of new numbers for each it would be minutes
            part.copy_(some[: len(part)]) if parameter.ndim > 1 else part.fill_(1.0)
    made.save_pretrained(folder / "model")
    words = ["<unk>", "<pad>", "<end>", *(f"w{number}" for number in range(3, config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(folder / "model")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            row = draws.choices(words[3:], k=draws.randint(16, longest - 1))
            file.write(json.dumps({"text": " ".join(row)}) + "\n")


def watch(seen: list[int]) -> None:
    """Note MiB of the first GPU that all processes use, by nvidia-smi, now and every half of a second."""
    while shutil.which(MIB_USED[0]):
        seen.append(int(subprocess.run(MIB_USED, capture_output=True, text=True, check=True).stdout))
        time.sleep(0.5)


def figures_of(run: Path, watched: list[int]) -> dict:
    """What a run that has just ended in this process has taken; `watched` are MiB that nvidia-smi saw."""
    memory, state = (json.loads((run / f"{name}.json").read_text()) for name in ("lisa_memory", "trainer_state"))
    speeds = [entry["tokens_per_second"] for entry in state["log_history"] if "tokens_per_second" in entry]
    used = [(mib - watched[0]) << 20 for mib in watched] or [0]
    return {
        "steps": state["global_step"],
        "tokens_per_second": median(speeds),
        "planned": memory["planned"]["peak"],
        "measured": memory["measured"]["peak"],
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "used": max(used),
        "context": used[-1] - torch.cuda.memory_reserved(),
        "num_alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def main() -> None:
    """Make the folder in a process of its own, train in this one, and write what was found when the run ends."""
    parser = parser_of(__doc__, "gpu_train")
    parser.add_argument("--recipe", default="llama3_8b_24gb")
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--rehearse", action="store_true", help="a 64th of the width, eight layers and steps")
    parser.add_argument("--make", type=Path, help="make the model and the rows in this folder, and nothing else")
    arguments, others = parser.parse_known_args()
    recipe = RECIPES / f"{arguments.recipe}.yaml"
    flags = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    steps, longest = (8, 64) if arguments.rehearse else (arguments.steps, flags["max_length"])
    if arguments.make:
        shrunk = (64, 8) if arguments.rehearse else (1, None)
        return make_folder(arguments.make, flags["model_name_or_path"], 4 * steps, longest, *shrunk)
    with tempfile.TemporaryDirectory() as folder:
        # In another process, since what it imports begins CUDA, which `lisa-dist train` does when it is ready for it.
        making = [sys.executable, "-m", "benchmarks.cost.gpu_train", *sys.argv[1:], "--make", folder]
        subprocess.run(making, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
        run, end = Path(folder) / "run", launching.end_process
        given = {"config": recipe, "model_name_or_path": f"{folder}/model", "dataset_name": f"{folder}/rows.jsonl"}
        given |= {"output_dir": run, "max_steps": steps, "max_length": longest, "logging_steps": max(steps // 10, 2)}
        given |= {"packing": "false", "save_strategy": "no", "report_to": "none"}
        watched: list[int] = []
        threading.Thread(target=watch, args=(watched,), daemon=True).start()

        def note_and_end() -> None:
            """In the place of what ends the run, whose allocator tells of it as long as the process lives."""
            found = figures_of(run, watched)
            write_results(arguments.results, found)
            print_table(["", ""], *([key, f"{value}"] for key, value in found.items()))
            end()

        launching.end_process = note_and_end
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        cli.run_verb("train", words + others)


if __name__ == "__main__":
    main()
