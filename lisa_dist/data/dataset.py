"""Training and held-out data, from the flags to token ids and labels, in the cache of `datasets`.

    sources.py      files, folders, the hub; samples and weights   -> examples
    stream.py       the same as they are read, by --streaming
    readers.py      the kinds of files                             -> examples
    formats.py      alpaca, sharegpt, messages, ...                -> turns
    encoding.py     chat template, labels, maximum length          -> input_ids, labels

TRL's trainer uses these columns as they are, shuffles and packs them. It tokenizes rows with images (image_rows.py) and
rows of other tasks (task_rows.py) itself.
"""

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.encoding import LONG_EXAMPLES, Encoder, encode_examples
from lisa_dist.data.formats import FORMATS
from lisa_dist.data.readers import ORIGIN
from lisa_dist.data.sources import Source, apply_weight, dataset_of, load_turns, open_source, recognize
from lisa_dist.data.stream import BLOCK_ROWS, HEAD_ROWS, Opened, Stream, digest
from lisa_dist.definitions import setting
from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

_NUM_SHOWN = 1500  # characters of the first example in the header of a run


@dataclass
class DataArguments:
    """Flags of the data: sources, formats, lengths, held-out examples."""

    dataset_name: list[str] | None = setting(
        None,
        "Files (.jsonl, .json, .csv, .tsv, .parquet, .txt, also .gz), folders of them, or datasets of the hub; one or "
        "several. name#1000 samples so many examples.",
    )
    dataset_weights: list[float] | None = setting(
        None, "One for each --dataset_name: 2 repeats its examples, 0.5 samples half of them."
    )
    dataset_format: str | None = setting(None, f"One of {', '.join(FORMATS)}; left out, recognized by columns.")
    dataset_columns: list[str] | None = setting(None, "Renamed columns, as question=QUESTION answer=LONG_ANSWER.")
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.")
    dataset_split: str = setting("train", "Split of a hub dataset.")
    eval_dataset_split: str | None = setting(None, "Split of held-out hub datasets; left out, --dataset_split.")
    eval_dataset_name: list[str] | None = setting(None, "Held-out data, given as --dataset_name.")
    eval_rows: float = setting(
        0, "Examples to hold out for evaluation: a number, or below 1 a fraction, sampled by --seed."
    )
    long_examples: str = setting(
        "auto",
        "For examples longer than --max_length tokens: truncate, drop, or auto, which splits texts and truncates the "
        "others.",
    )
    train_on_inputs: bool = setting(False, "Train on prompts too, and not only on the assistant's turns.")
    skip_bad_rows: bool = setting(False, "Skip invalid examples, in place of an error that lists them.")
    streaming: bool = setting(
        False, "Read, encode and pack examples as training takes them, in constant memory; needs --max_steps."
    )

    def __post_init__(self) -> None:
        for name in ("dataset_name", "eval_dataset_name", "dataset_weights"):
            if isinstance(value := getattr(self, name), str | int | float):  # from a recipe
                setattr(self, name, [value])
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
        if self.streaming and 0 < self.eval_rows < 1:
            raise UserError(f"--eval_rows {self.eval_rows:g} with --streaming: a stream has no length; give a number.")
        if self.streaming and (sampled := [name for name in self.dataset_name if re.search(r"#\d+$", name)]):
            raise UserError(f"--dataset_name {sampled[0]} with --streaming: a stream has no length; leave # out.")
        self.sources()

    def sources(self) -> tuple[list[Source], list[Source]]:
        """The sources of training data, and those of held-out data."""
        columns = []
        for pair in self.dataset_columns or []:
            name, _, column = pair.partition("=")
            if not name or not column:
                raise UserError(f"--dataset_columns {pair}: give the format's name of a column, as answer=LONG_ANSWER.")
            columns.append((name, column))
        settings: Any = {"format": self.dataset_format, "columns": tuple(columns), "config": self.dataset_config}
        names = self.dataset_name or []
        weights = zip(names, self.dataset_weights or [1.0] * len(names), strict=True)
        train = [Source(name, weight=weight, split=self.dataset_split, **settings) for name, weight in weights]
        settings |= {"flag": "--eval_dataset_name", "split": self.eval_dataset_split or self.dataset_split}
        return train, [Source(name, **settings) for name in self.eval_dataset_name or []]


@dataclass
class Data:
    """Examples with the columns input_ids and labels, or rows for TRL, lines for a run's header and its report."""

    train: Any  # a Dataset or, by --streaming, a Stream
    held_out: Dataset | None
    lines: list[str]
    more: list[str] = field(default_factory=list)  # of the report alone


def load_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    seed: int,
    num_proc: int | None = None,
    packing: str | None = None,
) -> Data:
    """Load and encode all data. The first rank of a host fills the cache, the others read it.

    Of streams the first rows are read; `packing` is what packs them, where TRL does not.

    The tokenizer has its chat template. Raises UserError naming the flag, the file, the line and the rule.
    """
    encoder, skip_invalid = Encoder(tokenizer, not arguments.train_on_inputs), arguments.skip_bad_rows

    def encode(examples: Dataset, source: Source) -> tuple[Dataset, list[str]]:
        encoded, details = encode_examples(
            examples, encoder, source.label, max_length, arguments.long_examples, skip_invalid, num_proc
        )
        return encoded, [f"  {detail}" for detail in details]

    def load(source: Source) -> tuple[Dataset, list[str]]:
        examples, line = load_turns(source, skip_invalid, seed)
        encoded, details = encode(examples, source)
        return encoded, [line, *details]

    def describe(example: dict[str, Any]) -> str:
        return _format_example(encoder, example)

    if not arguments.streaming:
        data = put_together(arguments, seed, load, describe)
        data.more = _more_of(encoder, data.train)
        return data
    stream, lines = _open_stream(arguments, encoder, seed, max_length, packing)
    heads = stream.head(BLOCK_ROWS if arguments.eval_rows else HEAD_ROWS)
    train_sources, held_out_sources = arguments.sources()
    lines.append(describe(encode(dataset_of(heads[0][:HEAD_ROWS]), train_sources[0])[0][0]))
    held_out = None
    if arguments.eval_rows:
        sampled = _sample_heads(heads, arguments, seed)
        encoded = encode(dataset_of(sampled), train_sources[0])[0]
        encoded = encoded.select(range(min(len(encoded), int(arguments.eval_rows))))
        used = set(encoded[ORIGIN])  # fewer rows where texts are split
        stream.held_out = frozenset(digest(row) for row in sampled if row[ORIGIN] in used)
        held_out = _join([encoded], "--dataset_name")
        lines.append(f"held out: {len(held_out)} examples of the first {BLOCK_ROWS} rows, sampled by --seed {seed}")
    elif held_out_sources:
        loaded = [load(source) for source in held_out_sources]
        held_out = _join([part for part, _ in loaded], "--eval_dataset_name")
        lines += ["held out:", *(line for _, told in loaded for line in told)]
    return Data(stream, held_out, lines)


def _open_stream(
    arguments: DataArguments, encoder: Encoder, seed: int, max_length: int | None, packing: str | None
) -> tuple[Stream, list[str]]:
    """The stream of the training data, and a line of each source."""
    opened, lines = [], []
    for source in arguments.sources()[0]:
        rows = open_source(source, streaming=True)
        convert, columns = recognize(source, rows)
        opened.append(Opened(source, rows, convert))
        lines.append(f"{source.name}: {columns}, streamed, {BLOCK_ROWS} rows shuffled at a time")
    stream = Stream(
        opened,
        encoder,
        weights=arguments.dataset_weights,
        max_length=max_length,
        long_examples=arguments.long_examples,
        packing=packing,
        seed=seed,
        skip_invalid=arguments.skip_bad_rows,
    )
    return stream, lines


def _sample_heads(heads: list[list[dict[str, Any]]], arguments: DataArguments, seed: int) -> list[dict[str, Any]]:
    """`--eval_rows` of the first rows of a stream: rows of those contents are not trained on."""
    rows, number = [row for head in heads for row in head], int(arguments.eval_rows)
    if number >= len(rows):
        raise UserError(
            f"--eval_rows {number}: must be fewer than the first {len(rows)} rows of --dataset_name, of which a stream "
            "samples them."
        )
    return random.Random(seed).sample(rows, number)


def put_together(
    arguments: DataArguments,
    seed: int,
    load: Callable[[Source], tuple[Dataset, list[str]]],
    describe: Callable[[dict[str, Any]], str],
) -> Data:
    """The examples of all sources, held out and by their weights.

    `load` has the examples of a source, with their ORIGIN, and lines about them; `describe` shows the first one.
    """
    lines: list[str] = []

    def load_all(sources: list[Source]) -> list[Dataset]:
        loaded = [load(source) for source in sources]
        lines.extend(line for _, told in loaded for line in told)
        return [examples for examples, _ in loaded]

    train_sources, held_out_sources = arguments.sources()
    parts, held_out = load_all(train_sources), None
    if arguments.eval_rows:
        parts, held_out = _hold_out(parts, arguments, seed, lines)
    weighted = []
    for source, examples in zip(train_sources, parts, strict=True):
        weighted.append(apply_weight(examples, source, seed))
        if source.weight != 1:
            lines.append(f"{source.name}: {len(examples)} become {len(weighted[-1])} by the weight {source.weight:g}")
    train = _join(weighted, "--dataset_name")
    lines.append(describe(train[0]))
    if held_out is not None:
        lines.append(f"held out: {len(held_out)} of these examples, sampled by --seed {seed}")
    elif held_out_sources:
        lines.append("held out:")
        held_out = _join(load_all(held_out_sources), "--eval_dataset_name")
    return Data(train, held_out, lines)


def _hold_out(
    parts: list[Dataset], arguments: DataArguments, seed: int, lines: list[str]
) -> tuple[list[Dataset], Dataset]:
    """Sample `--eval_rows` of all examples, before weights repeat them.

    Parts of one text, which have one ORIGIN, stay together. Only of the text that was sampled last some parts may be
    held out and the others trained on, so that the number is what was asked for.

    The `lines` about the sources, which count the examples that were dropped, are part of the error message.
    """
    parts_of = Counter((index, name) for index, part in enumerate(parts) for name in part[ORIGIN])
    rows, total = arguments.eval_rows, parts_of.total()
    number = int(rows) if rows >= 1 else round(rows * total)
    if not 0 < number < total:
        raise UserError(
            f"--eval_rows {rows:g}: {total} examples of {', '.join(arguments.dataset_name or [])} can be used "
            f"({'; '.join(line.strip() for line in lines)}). At least one must be held out, and one left to train on."
        )
    wanted: Counter[tuple[int, str]] = Counter()
    missing = number
    for one in random.Random(seed).sample(list(parts_of), min(number, len(parts_of))):
        wanted[one] = min(parts_of[one], missing)
        missing -= wanted[one]
    left, held_out = [], []
    for index, part in enumerate(parts):
        rows_left: list[int] = []
        rows_out: list[int] = []
        for row, name in enumerate(part[ORIGIN]):
            is_out = wanted[index, name] > 0
            wanted[index, name] -= is_out
            (rows_out if is_out else rows_left).append(row)
        left.append(part.select(rows_left))
        held_out.append(part.select(rows_out))
    return left, _join(held_out, "--dataset_name")


def _join(parts: list[Dataset], flag: str) -> Dataset:
    """The examples of several sources in one, without their ORIGIN."""
    columns = [", ".join(sorted(set(part.column_names) - {ORIGIN})) for part in parts]
    if len(set(columns)) > 1:
        raise UserError(f"{flag}: its sources have other columns each: {'; '.join(columns)}; give them the same ones.")
    try:
        return concatenate_datasets(parts).remove_columns(ORIGIN)
    except ValueError as error:  # features that do not align
        raise UserError(f"{flag}: rows of its sources are not of one kind ({in_one_line(error)}).") from error


def describe_examples(examples: Dataset | Stream) -> str:
    """The number of examples, and a checksum of a hundred of them, to compare ranks."""
    if isinstance(examples, Stream):
        return f"rows with checksum {examples.fingerprint()[:8]}"
    checksum = 0
    if "images" in examples.column_names:
        examples = examples.remove_columns("images")
    for index in range(0, len(examples), max(1, len(examples) // 100)):
        checksum = zlib.crc32(json.dumps(examples[index], sort_keys=True, default=str).encode(), checksum)
    return f"{len(examples)} examples with checksum {checksum:08x}"


def _more_of(encoder: Encoder, examples: Dataset) -> list[str]:
    """Lengths, and two more examples, of a thousand at most from the first to the last."""
    some = examples.select(range(0, len(examples), 1 + len(examples) // 1000))
    lengths = sorted(map(len, some["input_ids"]))
    half = lengths[(len(lengths) - 1) // 2]
    places = sorted({len(some) // 2, len(some) - 1} - {0})
    others = [_format_example(encoder, some[at], "another training") for at in places]
    return [f"tokens of a training example: {lengths[0]} to {lengths[-1]}, half of them at most {half}", *others]


def _format_example(encoder: Encoder, example: dict[str, Any], which: str = "first") -> str:
    """An example as text; lines with labels begin with >."""
    ids, labels = example["input_ids"], example["labels"]
    num_labels = sum(label >= 0 for label in labels)
    lines = [f"{which} example: {len(ids)} tokens, {num_labels} of them with loss (lines with >)"]
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
