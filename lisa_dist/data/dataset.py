"""What a run trains on and is evaluated on: from the flags to token ids and labels, in the cache of `datasets`.

    sources.py    files, folders, the hub; samples and weights       -> rows
    formats.py    alpaca, sharegpt, messages, ...                    -> turns
    encoding.py   chat template, what counts for the loss, length    -> input_ids, labels

TRL's trainer takes these columns as they are, shuffles and packs them.
"""

import json
import random
import zlib
from dataclasses import dataclass, field
from itertools import zip_longest

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import UserError
from lisa_dist.data.encoding import LONG_EXAMPLES, Encoder, encode_rows
from lisa_dist.data.formats import FORMATS
from lisa_dist.data.sources import Source, load_turns, weigh

_SHOWN = 1500  # characters of the example in the header of a run


@dataclass
class DataArguments:
    """Which rows, and what is made of them."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files (.jsonl, .json, .csv, .tsv, .parquet, .txt, and .gz of them), folders of such, or datasets "
            "of the hub; one or several. name#1000 draws so many rows of one."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One for each --dataset_name: 2 takes its rows twice in an epoch, 0.5 half of them."},
    )
    dataset_format: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(FORMATS)}; left out, the columns tell."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "What columns are, as question=QUESTION answer=LONG_ANSWER."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out hub datasets; left out, that of --dataset_split."}
    )
    eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out rows, as --dataset_name."})
    eval_rows: float = field(
        default=0,
        metadata={"help": "Hold out so many rows, or below 1 this part of them, drawn by --seed, for evaluation."},
    )
    long_examples: str = field(
        default="auto",
        metadata={
            "help": "Examples of more than --max_length tokens: truncate, drop, or auto, which splits texts and "
            "truncates all else."
        },
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "Let prompts count for the loss too, and not only what the assistant says."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave rows out that break a rule, in place of an error that names them."}
    )

    def __post_init__(self):
        if isinstance(self.dataset_name, str):  # of a recipe
            self.dataset_name = [self.dataset_name]
        if isinstance(self.eval_dataset_name, str):
            self.eval_dataset_name = [self.eval_dataset_name]
        if isinstance(self.dataset_columns, str):
            self.dataset_columns = self.dataset_columns.split()
        if not self.dataset_name or not all(self.dataset_name):
            raise UserError("--dataset_name is missing: give a file, a folder, or a dataset of the hub.")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise UserError(
                f"--dataset_weights {' '.join(f'{weight:g}' for weight in self.dataset_weights)}: needed is one for "
                f"each of the {len(self.dataset_name)} sources of --dataset_name."
            )
        if self.long_examples not in LONG_EXAMPLES:
            raise UserError(f"--long_examples {self.long_examples}: unknown; choose one of {', '.join(LONG_EXAMPLES)}.")
        if self.eval_rows < 0 or (self.eval_rows >= 1 and self.eval_rows != int(self.eval_rows)):
            raise UserError(f"--eval_rows {self.eval_rows:g}: give a number of rows, or a part of them below 1.")
        if self.eval_rows and self.eval_dataset_name:
            raise UserError(
                f"--eval_rows {self.eval_rows:g} and --eval_dataset_name {' '.join(self.eval_dataset_name)}: give one "
                "of them."
            )
        self.sources()

    def sources(self) -> tuple[list[Source], list[Source]]:
        """Those to train on, and those that are held out."""
        shared = {"format": self.dataset_format, "columns": self._columns(), "config": self.dataset_config}
        train = [
            Source(name, weight=weight, split=self.dataset_split, **shared)
            for name, weight in zip_longest(self.dataset_name, self.dataset_weights or [], fillvalue=1.0)
        ]
        held_out = [
            Source(name, flag="--eval_dataset_name", split=self.eval_dataset_split or self.dataset_split, **shared)
            for name in self.eval_dataset_name or []
        ]
        return train, held_out

    def _columns(self) -> tuple[tuple[str, str], ...]:
        pairs = [tuple(pair.split("=", 1)) for pair in self.dataset_columns or []]
        for pair in pairs:
            if len(pair) != 2 or not all(pair):
                raise UserError(f"--dataset_columns {'='.join(pair)}: give what a column is, as answer=LONG_ANSWER.")
        return tuple(pairs)


@dataclass
class Data:
    """Rows with the columns input_ids and labels, and what is to be said of them."""

    train: Dataset
    held_out: Dataset | None
    lines: list[str]


def load_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    seed: int,
    num_proc: int | None = None,
) -> Data:
    """Everything from the flags to tokens; the ranks of a host find there what the first of them has done.

    The tokenizer has its chat template. Raises UserError naming the flag, the file, the row and the rule.
    """
    encoder, lines = Encoder(tokenizer, not arguments.train_on_inputs), []

    def load(sources: list[Source]) -> list[Dataset]:
        parts = []
        for source in sources:
            rows, told = load_turns(source, arguments.skip_bad_rows, seed)
            encoded, told_of_long = encode_rows(
                rows, encoder, source.said, max_length, arguments.long_examples, arguments.skip_bad_rows, num_proc
            )
            parts.append(encoded)
            lines.extend([told, *(f"  {line}" for line in told_of_long)])
        return parts

    train_sources, held_out_sources = arguments.sources()
    parts, held_out = load(train_sources), None
    if not held_out_sources and arguments.eval_rows:
        parts, held_out = _hold_out(parts, arguments, seed)
    weighted = []
    for source, rows in zip(train_sources, parts, strict=True):
        weighted.append(weigh(rows, source, seed) if len(rows) else rows)
        if source.weight != 1:
            lines.append(f"{source.name}: {len(rows)} as {len(weighted[-1])} by its weight of {source.weight:g}")
    train = concatenate_datasets(weighted).remove_columns("origin")
    lines.append(_show(encoder, train[0]))
    if held_out is not None:
        lines.append(f"held out: {len(held_out)} of these rows, drawn by --seed {seed}")
    elif held_out_sources:
        lines.append("held out:")
        held_out = concatenate_datasets(load(held_out_sources))
    return Data(train, held_out if held_out is None else held_out.remove_columns("origin"), lines)


def _hold_out(parts: list[Dataset], arguments: DataArguments, seed: int) -> tuple[list[Dataset], Dataset]:
    """Draw `--eval_rows` of all rows: before any weight repeats them, and with all examples that one was cut into."""
    origins = [part["origin"] for part in parts]
    rows = [(index, origin) for index, of_part in enumerate(origins) for origin in dict.fromkeys(of_part)]
    number = int(arguments.eval_rows) if arguments.eval_rows >= 1 else round(arguments.eval_rows * len(rows))
    if not 0 < number < len(rows):
        raise UserError(
            f"--eval_rows {arguments.eval_rows:g}: {', '.join(arguments.dataset_name)} has {len(rows)} rows; at least "
            "one must be left, and one held out."
        )
    drawn = set(random.Random(seed).sample(rows, number))

    def choose(wanted: bool) -> list[Dataset]:
        places = [
            [place for place, origin in enumerate(of_part) if ((index, origin) in drawn) == wanted]
            for index, of_part in enumerate(origins)
        ]
        return [part.select(of_part) for part, of_part in zip(parts, places, strict=True)]

    return choose(False), concatenate_datasets(choose(True))


def describe_rows(rows: Dataset) -> str:
    """Their number, and a checksum of a hundred of them: the same on every rank."""
    checksum = 0
    for index in range(0, len(rows), max(1, len(rows) // 100)):
        checksum = zlib.crc32(json.dumps(rows[index], sort_keys=True).encode(), checksum)
    return f"{len(rows)} rows with checksum {checksum:08x}"


def _show(encoder: Encoder, example: dict[str, list[int]]) -> str:
    """The first example as text; lines with tokens that count for the loss begin with >."""
    ids, labels = example["input_ids"], example["labels"]
    counting = sum(label >= 0 for label in labels)
    lines = [f"first example: {len(ids)} tokens, {counting} of them count for the loss (lines with >)"]
    left, shown = _SHOWN, False
    for text, counts in encoder.describe(ids, labels):
        if left < 0 and shown:
            lines.append("  ...")
            break
        if len(text) > _SHOWN // 2:  # of a long prompt the beginning and the end, or the answer would not be seen
            text = f"{text[: _SHOWN // 3]} ... {text[-(_SHOWN // 6) :]}"
        lines += [f"{'> ' if counts else '  '}{line}" for line in text.split("\n") if line.strip()]
        left -= len(text)
        shown |= counts
    return "\n".join(lines)
