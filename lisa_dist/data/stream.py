"""Examples that are read, encoded and packed as training takes them, in constant memory (`--streaming`).

    sources -> blocks of rows, each shuffled by --seed -> groups of rows, encoded and packed -> batches

A part of the rows is read by each loader worker of each rank: whole files where their number is a multiple of the
parts', else every n-th row (`split_dataset_by_node` of datasets). With every example comes its place: where its block
began in the sources, and how many rows and examples came before it. A resume reads on from there: a block is read once
more, and nothing before it but what `datasets` cannot skip, the rows of a file or shard that was begun.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchDataset
from trl import pack_dataset

from lisa_dist.data import sources
from lisa_dist.data.encoding import Encoder, encode_parts
from lisa_dist.data.formats import ExampleError, refuse_examples
from lisa_dist.data.readers import ORIGIN, PROBLEM
from lisa_dist.data.sources import Source
from lisa_dist.errors import UserError
from lisa_dist.files import read_json

BLOCK_ROWS = 10_000  # that are shuffled together: the usual size of a buffer
_BLOCK_CHARACTERS = 64 * 2**20  # or fewer rows, where they are long
_GROUP_LENGTHS, _GROUP_TOKENS = 64, 2**17  # of --max_length: what is packed together; without one, so many tokens
HEAD_ROWS = 1_000  # of each source, looked at before a model is loaded
_COLUMNS = Features({name: List(Value("int64")) for name in ("input_ids", "labels")})
Place = dict[str, Any]  # of values that JSON has
_NEW_PASS: Place = {"pass": 0, "read": 0, "used": 0, "ended": False}


@dataclass(frozen=True)
class Opened:
    """A source whose format is known. `rows` and `convert` are those of `sources.recognize`."""

    source: Source
    rows: dict[str, Any]
    convert: dict[str, Any]

    def entries(self, seed: int, number: int) -> IterableDataset:
        """The entries of pass `number`, files in an order of its own."""
        if "table" in self.rows:
            table = self.rows["table"]
            table = table.to_iterable_dataset() if isinstance(table, Dataset) else table
            table.set_epoch(number)
            return table
        files = random.Random(f"{seed} files {number}").sample(self.rows["files"], len(self.rows["files"]))
        given = self.convert | {"files": files, "label": self.source.label}
        return IterableDataset.from_generator(_entries_of_files, gen_kwargs=given)

    def entry(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """The entry of what `entries` gives: of a table the row is one yet to be."""
        if "table" not in self.rows:
            return row
        return sources.entry_of("", f"row {number} of its part", row, None, **self.convert)


def _entries_of_files(files: list, label: str, **convert: Any) -> Iterator[dict]:
    for row in sources.read_rows({"files": files, "label": label}):
        yield sources.entry_of(*row, **convert)


class _Reading:
    """The usable entries of a part of a source, pass after pass."""

    def __init__(self, opened: Opened, stream: "Stream", part: int, parts: int, place: Place | None):
        self._opened, self._stream, self._part = opened, stream, (part, parts)
        self.place_in_pass = _NEW_PASS | (place or {})
        self._open(self.place_in_pass.pop("at", None))

    def _open(self, at: Place | None = None) -> None:
        entries = self._opened.entries(self._stream.seed, self.place_in_pass["pass"])
        self._rows = split_dataset_by_node(entries, *self._part)
        if at is not None:
            self._rows.load_state_dict(at)
        self._iterator = self._rows.iter(1)  # which a loader's workers do not share out once more

    @property
    def ended(self) -> bool:
        """Whether the pass has."""
        return bool(self.place_in_pass["ended"])

    @property
    def place(self) -> Place:
        """Where it is, for a reading that goes on from here."""
        return self.place_in_pass | {"at": self._rows.state_dict()}

    def take(self) -> dict[str, Any] | None:
        """The next entry; None at the end of a pass. Raises UserError for an invalid one that may not be skipped."""
        place = self.place_in_pass
        for batch in self._iterator:
            place["read"] += 1
            entry = self._opened.entry({name: values[0] for name, values in batch.items()}, place["read"])
            if self._stream.is_used(entry):
                place["used"] += 1
                return entry
        place["ended"] = True
        return None

    def begin_again(self, may_be_empty: bool) -> None:
        """Open the next pass. Raises UserError where this one had nothing for the part and `may_be_empty` is false."""
        if not may_be_empty and not self.place_in_pass["used"]:
            raise UserError(
                f"{self._opened.source.label}: has no row for part {self._part[0] + 1} of {self._part[1]}; each loader "
                "worker of each rank reads one: leave out --streaming, or --dataloader_num_workers."
            )
        self.place_in_pass = _NEW_PASS | {"pass": self.place_in_pass["pass"] + 1}
        self._open()


class Stream:
    """The examples of sources, without end.

    Rows of several sources are mixed at random until all have ended; by `weights` each gives its share of the rows,
    and begins again when it has ended. `packing` is TRL's strategy. Rows of `held_out`, by their digests, are left out.
    """

    def __init__(
        self,
        opened: Sequence[Opened],
        encoder: Encoder,
        *,
        weights: Sequence[float] | None,
        max_length: int | None,
        long_examples: str,
        packing: str | None,
        seed: int,
        skip_invalid: bool,
    ):
        self._opened, self._encoder, self._weights = list(opened), encoder, weights
        self._max_length, self._packing, self.seed, self._skip_invalid = max_length, packing, seed, skip_invalid
        self._encode = partial(encode_parts, encoder, max_length=max_length, long_examples=long_examples)
        self.held_out: frozenset[str] = frozenset()

    def as_dataset(self) -> IterableDataset:
        """For TRL, which looks at the first example; training takes a StreamLoader's batches."""
        return IterableDataset.from_generator(lambda: (example for example, _ in self.examples()), _COLUMNS)

    def fingerprint(self) -> str:
        """Of all that decides which example is where, but for what files contain."""
        files = [
            [(Path(path).name, size) for path, size, _ in each.rows.get("files", ())] or str(each.rows["table"].info)
            for each in self._opened
        ]
        of = [each.convert for each in self._opened]
        how = [self._weights, self._max_length, self._encode.keywords["long_examples"], self._packing, self.seed]
        content = json.dumps([of, files, how, self._encoder.fingerprint(), sorted(self.held_out)])
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, number: int) -> list[list[dict[str, Any]]]:
        """The valid ones of the first entries of each source. Raises UserError for those that are not."""
        heads = []
        for opened in self._opened:
            taken = islice(opened.entries(self.seed, 0), number)
            entries = [opened.entry(row, count) for count, row in enumerate(taken, 1)]
            problems = [f"{one[ORIGIN]} {one[PROBLEM]}" for one in entries if one[PROBLEM]]
            if problems and not self._skip_invalid:
                refuse_examples(problems, len(entries), opened.source.label)
            if len(problems) == len(entries):
                raise UserError(f"{opened.source.label}: none of its first {len(entries)} examples can be used.")
            heads.append([one for one in entries if not one[PROBLEM]])
        return heads

    def examples(self, part: int = 0, parts: int = 1, place: Place | None = None) -> Iterator[tuple[dict, Place]]:
        """The examples of a part, from a place on, each with the place after it."""
        at = place or {"block": 0, "sources": [None] * len(self._opened), "row": 0, "example": 0}
        readings = [
            _Reading(opened, self, part, parts, there)
            for opened, there in zip(self._opened, at["sources"], strict=True)
        ]
        passes_before: list[int] = []  # those at the last example
        for block in range(at["block"], 2**63):
            begins = [reading.place for reading in readings]
            generator = random.Random(f"{self.seed} {part} of {parts} {block}")
            rows = self._read_block(readings, generator)
            of_block: Place = {
                "block": block,
                "sources": begins,
                "passes": [one.place_in_pass["pass"] for one in readings],
            }
            passes_before = passes_before or of_block["passes"]
            if min(of_block["passes"]) > min(passes_before) + 1:
                raise UserError("--dataset_name: no row of a whole pass has a token to train on; raise --max_length.")
            generator.shuffle(rows)
            row, done = at["row"], at["example"]
            while row < len(rows):
                group, after = self._encode_group(rows, row)
                random.Random(f"{self.seed} {block} {row}").shuffle(group)
                for number, example in enumerate(group[done:], done + 1):
                    passes_before = of_block["passes"]
                    yield example, of_block | {"row": row, "example": number}
                row, done = after, 0
            at = {"row": 0, "example": 0}

    def _read_block(self, readings: list[_Reading], generator: random.Random) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        characters = 0
        while len(rows) < BLOCK_ROWS and characters < _BLOCK_CHARACTERS:
            if rows and all(reading.ended for reading in readings):  # a pass ends with its block
                break
            if self._weights or all(reading.ended for reading in readings):
                others_have = not self._weights and any(reading.place_in_pass["used"] for reading in readings)
                for reading in [one for one in readings if one.ended]:
                    reading.begin_again(may_be_empty=others_have)
            going = [reading for reading in readings if not reading.ended]
            chosen = generator.choices(going, self._weights)[0] if len(going) > 1 else going[0]
            if (entry := chosen.take()) is not None:
                rows.append(entry)
                characters += sum(len(turn["content"]) for turn in entry["turns"])
        return rows

    def is_used(self, entry: dict[str, Any]) -> bool:
        """Whether an entry is trained on. Raises UserError for an invalid one, unless such are skipped."""
        if entry[PROBLEM]:
            self._refuse(entry, entry[PROBLEM])
            return False
        return not self.held_out or digest(entry) not in self.held_out

    def _refuse(self, entry: dict[str, Any], problem: object) -> None:
        if not self._skip_invalid:
            raise UserError(f"{entry[ORIGIN]} {problem}; --skip_bad_rows true skips such rows.")

    def _encode_group(self, rows: list[dict[str, Any]], start: int) -> tuple[list[dict[str, Any]], int]:
        """Examples of the rows from `start` on, and the first row that is in none of them."""
        examples: list[dict[str, Any]] = []
        left = _GROUP_LENGTHS * self._max_length if self._max_length else _GROUP_TOKENS
        while left > 0 and start < len(rows):
            try:
                for ids, labels, _ in self._encode(rows[start]["turns"], rows[start]["tools"])[0]:
                    examples += [{"input_ids": ids, "labels": labels}] if ids else []
                    left -= len(ids)
            except ExampleError as error:
                self._refuse(rows[start], error)
            start += 1
        if self._packing is None or self._max_length is None or not examples:
            return examples, start
        whole = Dataset.from_list(examples, features=_COLUMNS).to_iterable_dataset()
        packed = pack_dataset(whole, self._max_length, self._packing, {"batch_size": len(examples)})
        columns = next(packed.iter(len(examples)))  # the rows themselves a loader's workers would share out
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], start


def describe_parts(stream: Stream, ranks: int, workers: int, batch_size: int) -> dict[str, Any]:
    """Describe what determines the rows that each loader worker reads, for a checkpoint."""
    given = {"ranks": ranks, "workers": max(1, workers), "rows a batch": batch_size}
    return given | {"data": stream.fingerprint()}


def check_same_parts(state: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Raise UserError if the run of a saved `StreamLoader.state_dict` read other parts, or other rows."""
    if differing := [name for name, value in parts.items() if state["of"][name] != value]:
        raise UserError(
            f"--resume_from_checkpoint: its run streamed by other {', '.join(differing)}; give what it had, or "
            "--ignore_data_skip true to begin the data anew."
        )


def read_stream_state(folder: str | Path, rank: int) -> dict[str, Any]:
    """Return the state of a rank's loader in a checkpoint. Raises UserError if there is none."""
    path = stream_path(folder, rank)
    if not path.exists():
        raise UserError(f"--resume_from_checkpoint: there is no {path}: its run had other ranks, or no stream.")
    return read_json(path)


def stream_path(folder: str | Path, rank: int) -> Path:
    """Return the file of a rank's loader in a checkpoint."""
    return Path(folder) / f"stream_{rank}.json"


def digest(entry: dict[str, Any]) -> str:
    """Of what an example says, by which rows of one content are known."""
    return hashlib.sha256(json.dumps([entry["turns"], entry["tools"]]).encode()).hexdigest()[:32]


@dataclass
class _Batches(TorchDataset):
    """Batches, each with the place after it; of an error the words, which a worker process would lose.

    Of `parts` each worker takes one, with the place to begin at. A worker that is spawned has all of it by pickle.
    """

    stream: Stream
    parts: list[tuple[int, int, Place | None]]
    batch_size: int
    collate: Callable[[list], Any]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = get_worker_info()
        examples = self.stream.examples(*self.parts[0 if worker is None else worker.id])
        try:
            while True:
                taken = list(islice(examples, self.batch_size))
                yield self.collate([example for example, _ in taken]), taken[-1][1]
        except UserError as error:
            yield None, str(error)


class StreamLoader:
    """The batches of a rank, without end, by torch's DataLoader; its workers read a part of the rows each.

    `rank` and `ranks` are of those that take rows of their own. Raises UserError, in a step, for a row that is invalid.
    """

    def __init__(
        self,
        stream: Stream,
        rank: int,
        ranks: int,
        batch_size: int,
        collate: Callable[[list], Any],
        say: Callable[[str], None] = print,
        **loading: Any,
    ):
        self.stream, self._batch_size, self._collate, self._say = stream, batch_size, collate, say
        self._workers, self._loading, self._rank, self._ranks = max(1, loading["num_workers"]), loading, rank, ranks
        self._turn = 0  # the batches that were taken, by which the workers take turns
        self._places: list[Place | None] = [None] * self._workers
        self.passes = 0  # that have ended for this rank

    def __iter__(self) -> Iterator[Any]:
        first, parts = self._rank * self._workers, self._ranks * self._workers
        turns = [(self._turn + number) % self._workers for number in range(self._workers)]
        of_workers = [(first + worker, parts, self._places[worker]) for worker in turns]
        batches = _Batches(self.stream, of_workers, self._batch_size, self._collate)
        for batch, place in DataLoader(batches, batch_size=None, **self._loading):
            if batch is None:
                raise UserError(place)
            self._places[self._turn % self._workers], self._turn = place, self._turn + 1
            if (passes := self._passes_ended()) > self.passes:
                self._say(f"the stream has ended, and begins again: pass {passes + 1}")
            self.passes = passes
            yield batch

    def _passes_ended(self) -> int:
        return min(min(place["passes"]) if place else 0 for place in self._places)

    def state_dict(self) -> dict[str, Any]:
        """What has been taken, of values that JSON has."""
        of = describe_parts(self.stream, self._ranks, self._workers, self._batch_size)
        return {"of": of, "turn": self._turn, "places": self._places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises UserError where other parts, or other rows, were read."""
        check_same_parts(state, describe_parts(self.stream, self._ranks, self._workers, self._batch_size))
        self._turn, self._places = state["turn"], state["places"]
        self.passes = self._passes_ended()
