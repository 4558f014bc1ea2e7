"""Training and held-out data, from the flags to token ids and labels, in the cache of `datasets`.

    sources.py    files, folders, the hub; samples and weights   -> examples
    readers.py    the kinds of files                             -> examples
    formats.py    alpaca, sharegpt, messages, ...                -> turns
    encoding.py   chat template, labels, maximum length          -> input_ids, labels

TRL's trainer uses these columns as they are, shuffles and packs them.
"""

import json
import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.encoding import LONG_EXAMPLES, Encoder, encode_examples
from lisa_dist.data.formats import FORMATS
from lisa_dist.data.sources import Source, apply_weight, load_turns
from lisa_dist.errors import UserError

_NUM_SHOWN = 1500  # characters of the first example in the header of a run


@dataclass
class DataArguments:
    """Flags of the data: sources, formats, lengths, held-out examples."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files (.jsonl, .json, .csv, .tsv, .parquet, .txt, also .gz), folders of them, or datasets of the "
            "hub; one or several. name#1000 samples so many examples."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One for each --dataset_name: 2 repeats its examples, 0.5 samples half of them."},
    )
    dataset_format: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(FORMATS)}; left out, recognized by columns."}
    )
    dataset_columns: list[str] | None = field(
        default=None, metadata={"help": "Renamed columns, as question=QUESTION answer=LONG_ANSWER."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of held-out hub datasets; left out, --dataset_split."}
    )
    eval_dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Held-out data, given as --dataset_name."}
    )
    eval_rows: float = field(
        default=0,
        metadata={"help": "Examples to hold out for evaluation: a number, or below 1 a fraction, sampled by --seed."},
    )
    long_examples: str = field(
        default="auto",
        metadata={
            "help": "For examples longer than --max_length tokens: truncate, drop, or auto, which splits texts and "
            "truncates the others."
        },
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "Train on prompts too, and not only on the assistant's turns."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip invalid examples, in place of an error that lists them."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # from a recipe
            self.dataset_name = [self.dataset_name]
        if isinstance(self.eval_dataset_name, str):
            self.eval_dataset_name = [self.eval_dataset_name]
        if isinstance(self.dataset_weights, int | float):
            self.dataset_weights = [self.dataset_weights]
        if isinstance(self.dataset_columns, str):
            self.dataset_columns = self.dataset_columns.split()
        if not self.dataset_name or not all(self.dataset_name):
            raise UserError("--dataset_name is missing: give a file, a folder, or a dataset of the hub.")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset_name):
            raise UserError(
                f"--dataset_weights {' '.join(f'{weight:g}' for weight in self.dataset_weights)}: give one for each "
                f"of the {len(self.dataset_name)} sources of --dataset_name."
            )
        if self.long_examples not in LONG_EXAMPLES:
            raise UserError(f"--long_examples {self.long_examples}: unknown; choose one of {', '.join(LONG_EXAMPLES)}.")
        if self.eval_rows < 0 or (self.eval_rows >= 1 and self.eval_rows != int(self.eval_rows)):
            raise UserError(f"--eval_rows {self.eval_rows:g}: give a number of examples, or a fraction below 1.")
        if self.eval_rows and self.eval_dataset_name:
            raise UserError(
                f"--eval_rows {self.eval_rows:g} and --eval_dataset_name {' '.join(self.eval_dataset_name)}: give one "
                "of them."
            )
        paths = [re.sub(r"#\d+$", "", name) for name in self.dataset_name]
        if self.eval_rows and len(set(paths)) < len(paths):  # held out of one, trained in the other
            raise UserError(
                f"--eval_rows {self.eval_rows:g}: --dataset_name has {max(paths, key=paths.count)} twice; give it "
                "once, and --dataset_weights 2 to repeat it."
            )
        self.sources()

    def sources(self) -> tuple[list[Source], list[Source]]:
        """The sources of training data, and those of held-out data."""
        settings: Any = {"format": self.dataset_format, "columns": self._columns(), "config": self.dataset_config}
        names = self.dataset_name or []
        weights = self.dataset_weights or [1.0] * len(names)
        train = [
            Source(name, weight=weight, split=self.dataset_split, **settings)
            for name, weight in zip(names, weights, strict=True)
        ]
        held_out = [
            Source(name, flag="--eval_dataset_name", split=self.eval_dataset_split or self.dataset_split, **settings)
            for name in self.eval_dataset_name or []
        ]
        return train, held_out

    def _columns(self) -> tuple[tuple[str, str], ...]:
        pairs = []
        for pair in self.dataset_columns or []:
            name, _, column = pair.partition("=")
            if not name or not column:
                raise UserError(f"--dataset_columns {pair}: give the format's name of a column, as answer=LONG_ANSWER.")
            pairs.append((name, column))
        return tuple(pairs)


@dataclass
class Data:
    """Examples with the columns input_ids and labels, or rows for TRL, and lines for the header of the run."""

    train: Dataset
    held_out: Dataset | None
    lines: list[str]
    has_images: bool = False


def load_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    seed: int,
    num_proc: int | None = None,
) -> Data:
    """Load and encode all data. The first rank of a host fills the cache, the others read it.

    The tokenizer has its chat template. Raises UserError naming the flag, the file, the line and the rule.
    """
    encoder = Encoder(tokenizer, not arguments.train_on_inputs)
    lines: list[str] = []

    def load(sources: list[Source]) -> list[Dataset]:
        parts = []
        for source in sources:
            examples, description = load_turns(source, arguments.skip_bad_rows, seed)
            encoded, details = encode_examples(
                examples,
                encoder,
                source.label,
                max_length,
                arguments.long_examples,
                arguments.skip_bad_rows,
                num_proc,
            )
            parts.append(encoded)
            lines.extend([description, *(f"  {line}" for line in details)])
        return parts

    train_sources, held_out_sources = arguments.sources()
    parts, held_out = load(train_sources), None
    if not held_out_sources and arguments.eval_rows:
        parts, held_out = hold_out(parts, arguments, seed)
    weighted = []
    for source, examples in zip(train_sources, parts, strict=True):
        weighted.append(apply_weight(examples, source, seed) if len(examples) else examples)
        if source.weight != 1:
            lines.append(f"{source.name}: {len(examples)} become {len(weighted[-1])} by the weight {source.weight:g}")
    train = concatenate_datasets(weighted).remove_columns("origin")
    lines.append(_format_example(encoder, train[0]))
    if held_out is not None:
        lines.append(f"held out: {len(held_out)} of these examples, sampled by --seed {seed}")
    elif held_out_sources:
        lines.append("held out:")
        held_out = concatenate_datasets(load(held_out_sources))
    return Data(train, held_out if held_out is None else held_out.remove_columns("origin"), lines)


def hold_out(
    parts: list[Dataset], arguments: DataArguments, seed: int, origin: str = "origin"
) -> tuple[list[Dataset], Dataset]:
    """Sample `--eval_rows` of all examples, before weights repeat them; those of an `origin` stay together."""
    origins = [list(part[origin]) for part in parts]
    examples = [(index, name) for index, names in enumerate(origins) for name in dict.fromkeys(names)]
    fraction_or_number = arguments.eval_rows
    number = int(fraction_or_number) if fraction_or_number >= 1 else round(fraction_or_number * len(examples))
    if not 0 < number < len(examples):
        raise UserError(
            f"--eval_rows {arguments.eval_rows:g}: {', '.join(arguments.dataset_name or [])} has {len(examples)} "
            "examples; at least one must be held out, and one left to train on."
        )
    sampled = set(random.Random(seed).sample(examples, number))

    def select(held_out: bool) -> list[Dataset]:
        selected = []
        for index, (part, names) in enumerate(zip(parts, origins, strict=True)):
            selected.append(part.select([n for n, name in enumerate(names) if ((index, name) in sampled) == held_out]))
        return selected

    return select(False), concatenate_datasets(select(True))


def describe_examples(examples: Dataset) -> str:
    """The number of examples, and a checksum of a hundred of them, to compare ranks."""
    checksum = 0
    examples = examples.remove_columns([name for name in ("images",) if name in examples.column_names])
    for index in range(0, len(examples), max(1, len(examples) // 100)):
        checksum = zlib.crc32(json.dumps(examples[index], sort_keys=True, default=str).encode(), checksum)
    return f"{len(examples)} examples with checksum {checksum:08x}"


def _format_example(encoder: Encoder, example: dict[str, list[int]]) -> str:
    """The first example as text; lines with labels begin with >."""
    ids, labels = example["input_ids"], example["labels"]
    num_labels = sum(label >= 0 for label in labels)
    lines = [f"first example: {len(ids)} tokens, {num_labels} of them with loss (lines with >)"]
    left, has_shown_labels = _NUM_SHOWN, False
    for text, has_labels in encoder.describe(ids, labels):
        if left < 0 and has_shown_labels:
            lines.append("  ...")
            break
        if len(text) > _NUM_SHOWN // 2:  # of a long prompt the start and the end, so that the answer is shown
            text = f"{text[: _NUM_SHOWN // 3]} ... {text[-(_NUM_SHOWN // 6) :]}"
        lines += [f"{'> ' if has_labels else '  '}{line}" for line in text.split("\n") if line.strip()]
        left -= len(text)
        has_shown_labels |= has_labels
    return "\n".join(lines)
