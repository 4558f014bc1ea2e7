"""How large are the weights of each block, and what a step changes of them, under full training, LISA and LoRA?

python -m benchmarks.quality.norms --model stories260k-hf --dataset gsm8k/train.jsonl --steps 100 --rows 8

The paper's motivation (section 3.1): under LoRA the norms of embedding and head are far above those of the layers. All
arms take the same rows in the same order from the same weights. LoRA has its adapters on the linear layers of the
decoder ("lora"), on embedding and head too ("lora_ends"), and there with the embedding's random factor drawn as the
linear layers' is ("lora_ends_even").
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from benchmarks.common.ranks import run_on_ranks
from benchmarks.common.results import RESULTS, parser_with_data, positive, print_table, write_results
from benchmarks.quality.training import read_tokens
from benchmarks.tables.show import show
from lisa_dist import LisaConfig, LisaMixin
from lisa_dist.report.norms import format_skew, plot_norms, read_runs
from lisa_dist.train.layer_norms import LayerNorms

ARMS = ("full", "lisa", "lora", "lora_ends", "lora_ends_even")
LENGTH, INTERVAL, RANK = 256, 5, 16  # tokens of a row; K of LISA; of the adapters
RATE, LORA_RATE = 1e-4, 1e-3


class LisaPlain(LisaMixin, Trainer): ...


def adapted(model: torch.nn.Module, arm: str) -> torch.nn.Module:
    """The model with the adapters of an arm."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    targets = [name for name in linear if name != head] + ([embedding, head] if arm != "lora" else [])
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    if arm == "lora_ends_even":
        for name, parameter in model.named_parameters():
            if "lora_embedding_B" in name:  # drawn with a deviation of 1; a linear layer's is uniform
                parameter.data.mul_(1 / math.sqrt(3 * parameter.shape[0]))
    return model


def run(arguments: argparse.Namespace, arm: str, folder: str) -> list[float]:
    """On a rank: an arm in the plain Hugging Face Trainer, which leaves its norms in the folder; its losses."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = []
    for row in read_tokens(tokenizer, arguments.dataset, arguments.rows * arguments.steps, LENGTH):
        padding = LENGTH - len(row)
        rows.append({"input_ids": row + [tokenizer.eos_token_id or 0] * padding, "labels": row + [-100] * padding})
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        learning_rate=LORA_RATE if arm.startswith("lora") else RATE,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        deepspeed=str(Path(__file__).parents[2] / "ds_configs" / "zero2.json"),
    )
    kind, own = Trainer, {}
    if arm == "lisa":
        kind, own = LisaPlain, {"lisa_config": LisaConfig(lisa_interval_steps=INTERVAL)}
    model = adapted(model, arm) if arm.startswith("lora") else model
    trainer = kind(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=[LayerNorms(1)], **own)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    """Run every arm, call `lisa-dist norms` on them, and write its figures and its picture."""
    parser = parser_with_data(__doc__, "norms")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--rows", type=positive, default=2, help="of a step")
    parser.add_argument("--plot", type=Path, help="draw the norms to this .png")
    parser.set_defaults(results=None)
    arguments = parser.parse_args()
    results = arguments.results or RESULTS / f"norms_{Path(arguments.model).name}.json"
    with tempfile.TemporaryDirectory() as folder:
        losses = {arm: run_on_ranks(1, run, arguments, arm, f"{folder}/{arm}")[0] for arm in ARMS}
        runs = read_runs([f"{arm}={folder}/{arm}" for arm in ARMS])
    figures = {one.label: {"blocks": one.blocks, "losses": losses[one.label]} for one in runs}
    write_results(results, figures)
    if arguments.plot:
        plot_norms(runs, arguments.plot)
    print(format_skew(runs))
    print_table(["arm", "first loss", "last loss"], [[arm, f"{x[0]:.3f}", f"{x[-1]:.3f}"] for arm, x in losses.items()])
    show("norms", figures)


if __name__ == "__main__":
    main()
