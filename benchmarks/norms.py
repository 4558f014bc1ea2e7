"""How large are the weights of each block, and what a step changes of them, under full training, LISA and LoRA?

python benchmarks/norms.py --model stories260k-hf --dataset gsm8k/train.jsonl --steps 100 --rows 8

The paper's motivation (section 3.1): under LoRA the norms of embedding and head are far above those of the layers. All
arms take the same rows in the same order from the same weights. LoRA has its adapters on the linear layers of the
decoder ("lora"), on embedding and head too ("lora_ends"), and there with the embedding's random factor drawn as the
linear layers' is ("lora_ends_even").
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

ARMS = ("full", "lisa", "lora", "lora_ends", "lora_ends_even")


def worker(arguments: argparse.Namespace) -> None:
    """Run every arm on one rank in the plain Hugging Face Trainer, each in a folder of its name."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from lisa_dist import LisaConfig, LisaMixin
    from lisa_dist.train.layer_norms import LayerNorms

    class LisaPlain(LisaMixin, Trainer): ...

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = Path(arguments.dataset).read_text(encoding="utf-8").splitlines()[: arguments.rows * arguments.steps]
    texts = [f"{row['question']} {row['answer']}" for row in map(json.loads, lines)]
    tokens = [tokenizer(text)["input_ids"][: arguments.length] for text in texts]
    rows = []
    for row in tokens:
        padding = arguments.length - len(row)
        rows.append({"input_ids": row + [tokenizer.eos_token_id or 0] * padding, "labels": row + [-100] * padding})

    def adapted(model: torch.nn.Module, arm: str) -> torch.nn.Module:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        targets = [name for name in linear if name != head] + ([embedding, head] if arm != "lora" else [])
        config = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=targets)
        model = get_peft_model(model, config)
        if arm == "lora_ends_even":
            for name, parameter in model.named_parameters():
                if "lora_embedding_B" in name:  # drawn with a deviation of 1; a linear layer's is uniform
                    parameter.data.mul_(1 / math.sqrt(3 * parameter.shape[0]))
        return model

    for arm in arguments.arms:
        folder = Path(arguments.folder, arm)
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rows,
            learning_rate=arguments.lora_rate if arm.startswith("lora") else arguments.rate,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            deepspeed=str(Path(__file__).parents[1] / "ds_configs" / "zero2.json"),
        )
        kind, own = Trainer, {}
        if arm == "lisa":
            kind, own = LisaPlain, {"lisa_config": LisaConfig(lisa_interval_steps=arguments.interval)}
        model = adapted(model, arm) if arm.startswith("lora") else model
        trainer = kind(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=[LayerNorms(1)], **own)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (folder / "losses.json").write_text(json.dumps(losses))
        print(arm, losses[0], losses[-1], flush=True)


def main() -> None:
    """Run every arm, call `lisa-dist norms` on them, and write its figures and its picture."""
    parser = worker_parser(__doc__.splitlines()[0], "norms.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--interval", type=int, default=5, help="K of LISA")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rate", type=float, default=1e-4, help="of full training and of LISA")
    parser.add_argument("--lora_rate", type=float, default=1e-3)
    parser.set_defaults(results=None)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    from lisa_dist.report.norms import format_skew, plot_norms, read_runs

    results = arguments.results or Path(__file__).parent / "results" / f"norms_{Path(arguments.model).name}.json"
    with tempfile.TemporaryDirectory() as folder:
        words = []
        for name, value in (vars(arguments) | {"folder": folder}).items():
            if name not in ("results", "local_rank"):
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        launch(Path(__file__), words, 1)
        runs = read_runs([f"{arm}={folder}/{arm}" for arm in arguments.arms])
        losses = {arm: json.loads(Path(folder, arm, "losses.json").read_text()) for arm in arguments.arms}
        write_results(results, {run.label: {"blocks": run.blocks, "losses": losses[run.label]} for run in runs})
        plot_norms(runs, results.with_suffix(".png"))
    print(format_skew(runs))
    rows = [[arm, f"{one[0]:.3f}", f"{one[-1]:.3f}"] for arm, one in losses.items()]
    print_table(["arm", "first loss", "last loss"], rows)


if __name__ == "__main__":
    main()
