"""Rows with images beside their texts, for a model that sees: TRL makes pixels and tokens of them, batch by batch.

A row has a column `images`, a list, or `image`: paths, from the file's folder on, or images of `datasets`; and the
columns of any format with turns. It becomes `images`, `prompt` and `completion`, which is its last answer and has the
labels; with train_on_inputs `images` and `messages`, all with labels. TRL puts the images before the first user's text,
and a mark of theirs in a text, <image>, goes.
"""

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Image, List

from lisa_dist.data.dataset import Data, DataArguments, put_together
from lisa_dist.data.readers import IMAGE_COLUMNS
from lisa_dist.data.sources import Source, first_row, load_turns, open_source

_MARK = re.compile(r"\s*<image>\s*")
_ROLES = {"prompt": "user", "completion": "assistant"}


def have_images(arguments: DataArguments) -> bool:
    """Whether rows of any source have images, by the first row of each."""
    train, held_out = arguments.sources()
    firsts = (source.renamed(first_row(open_source(source))) for source in (*train, *held_out))
    return any(set(IMAGE_COLUMNS).intersection(first) for first in firsts)


def load_image_data(arguments: DataArguments, seed: int) -> Data:
    """Load all rows. The first rank of a host fills the cache, the others read it.

    Raises UserError naming the flag, the file, the line and the rule.
    """

    def load(source: Source) -> tuple[Dataset, list[str]]:
        examples, line = load_turns(source, arguments.skip_bad_rows, seed, with_images=True)
        return _for_trl(examples, arguments.train_on_inputs), [line]

    return put_together(arguments, seed, load, _describe)


def _for_trl(examples: Dataset, all_labels: bool) -> Dataset:
    undecoded = examples.cast_column("images", List(Image(decode=False)))

    def convert(turns: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
        found = []
        for turn in turns:  # where a mark was, a blank stays, or the line's end
            text = _MARK.sub(lambda mark: "\n" if "\n" in mark[0] else " ", turn["content"]).strip()
            found.append({"role": _ROLES.get(turn["role"], turn["role"]), "content": text})
        last = max(place for place, turn in enumerate(found) if turn["role"] == "assistant")
        return {"messages": found} if all_labels else {"prompt": found[:last], "completion": found[last : last + 1]}

    converted = undecoded.map(convert, input_columns=["turns"], remove_columns=["turns", "tools"])
    return converted.cast_column("images", List(Image()))


def _describe(row: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{image.width} x {image.height}" for image in row["images"])
    turns = row.get("messages") or [*row["prompt"], *row["completion"]]
    texts = [f"  {turn['role']}: {turn['content']}" for turn in turns]
    return "\n".join([f"first example: images of {sizes} pixels", *texts])
