"""Do examples that share a row lose anything? Loss of each example packed, padded and alone, in fp32.

python benchmarks/packing.py --model stories260k-hf --dataset gsm8k/train.jsonl
"""

import argparse
from pathlib import Path

import torch
from bench import print_table, write_results
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lisa_dist.data.dataset import DataArguments, load_data
from lisa_dist.data.encoding import set_chat_template


def losses_of(model, batch: dict, wanted: int) -> dict[tuple[int, ...], float]:
    """The mean loss of each example in a batch, by its tokens; a packed row has a position 0 where one begins."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    found = {}
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" in batch:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            places = list(zip(starts, [*starts[1:], len(ids)], strict=True))
        else:
            places = [(0, int(batch["attention_mask"][row].sum()))]
        for start, end in places:
            loss = cross_entropy(logits[row, start : end - 1], labels[start + 1 : end], ignore_index=-100)
            found[tuple(ids[start:end].tolist())] = loss.item()
    assert len(found) == wanted, f"{len(found)} of {wanted} examples found again"
    return found


def main() -> None:
    """Pack, pad and run alone; print the largest differences, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    set_chat_template(tokenizer, None)
    asked = DataArguments(dataset_name=f"{arguments.dataset}#{arguments.examples}")
    rows = load_data(asked, tokenizer, max_length=arguments.max_length, seed=0).train
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0)
    collate_packed = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0, padding_free=True)
    packed = pack_dataset(rows.with_format("arrow"), arguments.max_length, "bfd").with_format(None)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    figures, table = {}, []
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation=attention
        ).eval()
        alone = {}
        for row in rows:
            alone |= losses_of(model, collate([row]), 1)
        runs = {"padded": losses_of(model, collate(list(rows)), len(rows)), "packed": {}}
        for row in packed:
            runs["packed"] |= losses_of(model, collate_packed([row]), len(row["seq_lengths"]))
        for name, found in runs.items():
            gap = max(abs(found[tokens] - loss) for tokens, loss in alone.items())
            figures[f"{attention}, {name}"] = gap
            table.append([attention, name, str(len(found)), f"{lengths[0]} to {lengths[-1]}", f"{gap:.1e}"])
        gap = max(abs(runs["packed"][tokens] - loss) for tokens, loss in runs["padded"].items())
        figures[f"{attention}, packed against padded"] = gap
        table.append([attention, "packed against padded", str(len(alone)), "", f"{gap:.1e}"])
    print(f"{len(rows)} examples in {len(packed)} rows of at most {arguments.max_length} tokens")
    print_table(["attention", "", "examples", "tokens", "largest difference of a loss"], table)
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
