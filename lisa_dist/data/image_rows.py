"""Rows with images beside their texts, for a model that sees: TRL makes pixels and tokens of them, batch by batch.

A row has a column `images`, a list, or `image`: paths, from the file's folder on, or images of `datasets`; and the
columns of any format with turns. It becomes `images`, `prompt` and `completion`, which is its last answer and has the
labels; with train_on_inputs `images` and `messages`, all with labels. TRL puts the images before the first user's text,
and a mark of theirs in a text, <image>, goes.
"""

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Image, List, concatenate_datasets

from lisa_dist.data.dataset import Data, DataArguments, hold_out
from lisa_dist.data.images import COLUMNS
from lisa_dist.data.sources import Source, apply_weight, first_columns, load_turns

_MARK = re.compile(r"\s*<image>\s*")
_ROLES = {"prompt": "user", "completion": "assistant"}


def have_images(arguments: DataArguments) -> bool:
    """Whether rows of any source have images, by the first row of each."""
    train, held_out = arguments.sources()
    return any(set(COLUMNS).intersection(first_columns(source)) for source in (*train, *held_out))


def load_image_data(arguments: DataArguments, seed: int) -> Data:
    """Load all rows. The first rank of a host fills the cache, the others read it.

    Raises UserError naming the flag, the file, the line and the rule.
    """
    lines: list[str] = []

    def load(sources: list[Source]) -> list[Dataset]:
        parts = []
        for source in sources:
            examples, description = load_turns(source, arguments.skip_bad_rows, seed, with_images=True)
            lines.append(description)
            parts.append(_for_trl(examples, arguments.train_on_inputs))
        return parts

    train_sources, held_out_sources = arguments.sources()
    parts, held_out = load(train_sources), None
    if not held_out_sources and arguments.eval_rows:
        parts, held_out = hold_out(parts, arguments, seed)
    given = zip(parts, train_sources, strict=True)
    train = concatenate_datasets([apply_weight(rows, source, seed) if len(rows) else rows for rows, source in given])
    lines.append(_describe(train[0]))
    if held_out is not None:
        lines.append(f"held out: {len(held_out)} of these examples, sampled by --seed {seed}")
    elif held_out_sources:
        lines.append("held out:")
        held_out = concatenate_datasets(load(held_out_sources))
    return Data(train.remove_columns("origin"), held_out and held_out.remove_columns("origin"), lines, has_images=True)


def _for_trl(examples: Dataset, all_labels: bool) -> Dataset:
    undecoded = examples.cast_column("images", List(Image(decode=False)))

    def convert(turns: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
        found = [
            {"role": _ROLES.get(turn["role"], turn["role"]), "content": _without_marks(turn["content"])}
            for turn in turns
        ]
        last = max(place for place, turn in enumerate(found) if turn["role"] == "assistant")
        return {"messages": found} if all_labels else {"prompt": found[:last], "completion": found[last : last + 1]}

    converted = undecoded.map(convert, input_columns=["turns"], remove_columns=["turns", "tools"])
    return converted.cast_column("images", List(Image()))


def _without_marks(text: str) -> str:
    """The text without `<image>`, where a blank, or the line's end that was there, stays."""
    return _MARK.sub(lambda found: "\n" if "\n" in found[0] else " ", text).strip()


def _describe(row: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{image.width} x {image.height}" for image in row["images"])
    turns = row.get("messages") or [*row["prompt"], *row["completion"]]
    texts = [f"  {turn['role']}: {turn['content']}" for turn in turns]
    return "\n".join([f"first example: images of {sizes} pixels", *texts])
