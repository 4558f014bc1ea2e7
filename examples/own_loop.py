"""LISA in a DeepSpeed loop of one's own, on raw text.

deepspeed examples/own_loop.py --model HuggingFaceTB/SmolLM2-135M --data text.txt --output_dir runs/own_loop

`--data` is a .txt file, a text a line, or a .jsonl file with `text` in every row. The last checkpoint is the model:
from_pretrained loads it. `--resume` goes on from a checkpoint as if the run had not been cut; the learning rate is
constant. On CPU ranks set DS_ACCELERATOR=cpu.
"""

import json
import os
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import lisa_dist


def read_rows(path: str, tokenizer, length: int) -> torch.Tensor:
    """All texts one after another, in rows of `length` tokens; what is left at the end is dropped."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = [json.loads(line)["text"] for line in lines] if path.endswith(".jsonl") else lines
    tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def main() -> None:
    """Train for `--steps` steps, with a checkpoint every `--save_steps` and at the end."""
    parser = HfArgumentParser(lisa_dist.LisaConfig)  # --lisa_activated_layers, --lisa_interval_steps, ...
    parser.add_argument("--model", required=True, help="folder, or model of the hub")
    parser.add_argument("--data", required=True, help=".txt or .jsonl")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--resume", help="a checkpoint to go on from")
    parser.add_argument("--deepspeed", default="zero2", help="short name of a shipped config, or a path")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a rank in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    lisa_config, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read_rows(args.data, tokenizer, args.length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    engine, lisa = lisa_dist.initialize(
        model,
        args.deepspeed,
        lisa_config,
        lr=args.learning_rate,
        weight_decay=0.1,
        micro_batch_size=args.batch_size,
        output_dir=args.output_dir,
    )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.resume:
        lisa_dist.load_checkpoint(lisa, args.resume)

    engine.train()
    for step in range(engine.global_steps, args.steps):
        lisa.on_step_begin()  # switches when a period begins; else free
        # Rows follow from the step alone, so a resumed run takes those that the whole one would have taken.
        begin = (step * world_size + rank) * args.batch_size
        batch = rows[order[torch.arange(begin, begin + args.batch_size) % len(rows)]].to(engine.device)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {step}  loss {loss.item():.4f}  layers {list(lisa.active_layers)}", flush=True)
        if (step + 1) % args.save_steps == 0 or step + 1 == args.steps:
            checkpoint = f"{args.output_dir}/checkpoint-{step + 1}"
            lisa_dist.save_checkpoint(lisa, checkpoint)  # every rank
            if rank == 0:
                tokenizer.save_pretrained(checkpoint)
    lisa.close()
    dist.barrier()
    dist.destroy_process_group()
    if engine.device.type == "cpu":
        os._exit(0)  # threads of gloo may still abort a process that takes its interpreter down


if __name__ == "__main__":
    main()
