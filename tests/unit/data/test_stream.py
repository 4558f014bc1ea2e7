"""Streams: each row once in a pass, whoever reads it; any place is one to go on from, to the same examples."""

import itertools
import json
from collections import Counter

import pytest
import test_sources
from datasets import Dataset
from test_data import names, tokenizer  # noqa: F401 - fixtures

from lisa_dist.data import stream as stream_module
from lisa_dist.data.dataset import DataArguments, load_data
from lisa_dist.data.stream import StreamLoader
from lisa_dist.errors import UserError


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(stream_module, "_GROUP_LENGTHS", 2)


def load(tokenizer, name, packing=None, max_length=32, seed=0, **arguments):  # noqa: F811
    given = DataArguments(dataset_name=name, streaming=True, **arguments)
    return load_data(given, tokenizer, max_length=max_length, seed=seed, packing=packing)


def rows_of(numbers) -> list[dict]:
    return [{"question": f"[{n}]", "answer": "a"} for n in numbers]


def folder_of(tmp_path, num_files: int, suffix: str = ".jsonl", count: int = 30) -> str:
    (tmp_path / "rows").mkdir()
    for file in range(num_files):
        test_sources.write(tmp_path / "rows" / f"{file}{suffix}", rows_of(range(file, count, num_files)))
    return str(tmp_path / "rows")


def questions(tokenizer, examples) -> list[int]:  # noqa: F811
    texts = [tokenizer.decode(example["input_ids"]) for example in examples]
    return [int(text.partition("]")[0]) for part in texts for text in part.split("[")[1:]]


def take(examples, count: int) -> list[dict]:
    return [example for example, _ in itertools.islice(examples, count)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_files", "suffix"), [(1, ".jsonl"), (3, ".parquet"), (4, ".csv"), (6, ".jsonl.gz")])
def test_each_row_is_read_once_in_a_pass(tokenizer, tmp_path, parts, num_files, suffix):  # noqa: F811
    """By all parts together; the second pass has them in another order, and where files are read others of them."""
    stream = load(tokenizer, folder_of(tmp_path, num_files, suffix)).train
    passes = [[], []]
    for part in range(parts):
        held = [(place["passes"][0], example) for example, place in take_pass(stream, part, parts, 2)]
        for number, seen in enumerate(passes):
            seen.append(questions(tokenizer, [example for of, example in held if of == number]))
    for seen in passes:
        assert sorted(itertools.chain(*seen)) == list(range(30))
    assert passes[0] != passes[1]
    assert all(one != sorted(one) for one in passes[0] if len(one) > 6)


def test_rows_are_shuffled_in_their_block_and_files_in_each_pass(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stream_module, "BLOCK_ROWS", 100)
    stream = load(tokenizer, folder_of(tmp_path, 6, count=60)).train
    one_file = load(tokenizer, test_sources.write(tmp_path / "one.jsonl", rows_of(range(60)))).train
    first = questions(tokenizer, take(one_file.examples(), 12))
    assert max(first) - min(first) > 40, "of all of the block, and not of its first rows"
    monkeypatch.setattr(stream_module, "BLOCK_ROWS", 10)
    orders = [[], []]
    for example, place in take_pass(stream, 0, 1, 2):
        orders[place["passes"][0]] += [number % 6 for number in questions(tokenizer, [example])]
    assert list(dict.fromkeys(orders[0])) != list(dict.fromkeys(orders[1]))


def take_pass(stream, part: int, parts: int, number: int):
    """What a part has before its pass `number`."""
    for example, place in stream.examples(part, parts):
        if place["passes"][0] == number:
            return
        yield example, place


def test_a_saved_dataset_and_one_of_the_hub(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    rows = Dataset.from_list(rows_of(range(30)))
    rows.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(stream_module.sources, "load_dataset", lambda *_, **how: rows.to_iterable_dataset(num_shards=4))
    for name in (str(tmp_path / "saved"), "someone/rows"):
        stream = load(tokenizer, name).train
        seen = [questions(tokenizer, [one for one, _ in take_pass(stream, part, 2, 1)]) for part in range(2)]
        assert sorted(itertools.chain(*seen)) == list(range(30))
        check_places(stream, 2)


def check_places(stream, parts: int, count: int = 40) -> None:
    """From each place the examples go on as they did, once it was written and read."""
    whole = list(itertools.islice(stream.examples(1, parts), count))
    for number in range(0, count - 9, 4):
        place = json.loads(json.dumps(whole[number][1]))
        assert take(stream.examples(1, parts, place), 9) == [example for example, _ in whole[number + 1 : number + 10]]


@pytest.mark.parametrize("packing", [None, "bfd"])
@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_a_resume_has_the_examples_that_were_to_come(tokenizer, tmp_path, packing, weights):  # noqa: F811
    """Of several sources, one of long texts that are split, of two files."""
    sums, texts = folder_of(tmp_path, 3), tmp_path / "texts.txt"
    texts.write_text("\n".join(f"[{n}]" + "story " * 20 for n in range(100, 111)))
    check_places(load(tokenizer, [sums, str(texts)], packing, dataset_weights=weights).train, 3)


def test_packing_is_trls_within_a_group(tokenizer, tmp_path):  # noqa: F811
    stream = load(tokenizer, folder_of(tmp_path, 1), "bfd", max_length=64).train
    packed = [example for example, _ in take_pass(stream, 0, 1, 1)]
    assert sorted(questions(tokenizer, packed)) == list(range(30))
    assert all(sum(one["seq_lengths"]) == len(one["input_ids"]) <= 64 for one in packed)
    assert len(packed) < 15


def test_weights_are_shares_and_a_source_begins_again(tokenizer, tmp_path):  # noqa: F811
    few = test_sources.write(tmp_path / "few.jsonl", rows_of(range(100, 103)))
    stream = load(tokenizer, [folder_of(tmp_path, 1), few], dataset_weights=[1, 3]).train
    seen = Counter(number >= 100 for number in questions(tokenizer, take(stream.examples(), 400)))
    assert 0.68 < seen[True] / 400 < 0.82
    mixed = load(tokenizer, [str(tmp_path / "rows"), few]).train
    for number in range(3):
        once = [one for one, at in itertools.islice(mixed.examples(), 120) if at["passes"][0] == number]
        assert sorted(questions(tokenizer, once)) == [*range(30), 100, 101, 102]


def test_held_out_rows_are_not_trained_on(tokenizer, tmp_path):  # noqa: F811
    """Nor rows of the same content elsewhere in the stream."""
    name = test_sources.write(tmp_path / "rows.jsonl", rows_of([*range(20), *range(20)]))
    data = load(tokenizer, name, eval_rows=4)
    held_out = set(questions(tokenizer, data.held_out))
    trained = [one for part in range(2) for one, _ in take_pass(data.train, part, 2, 1)]
    assert len(held_out) == 4
    assert Counter(questions(tokenizer, trained)) == {n: 2 for n in range(20) if n not in held_out}
    assert "held out: 4 examples of the first 10000 rows, sampled by --seed 0" in data.lines, "of the usual block"
    evaluated = load(tokenizer, name, eval_dataset_name=[name]).held_out
    assert len(evaluated) == 40


def test_parts_of_a_split_text_are_held_out_by_number(tokenizer, tmp_path):  # noqa: F811
    """Only the texts that the held-out parts come from are left out of training."""
    texts = [f"({number})" * 100 for number in range(10, 30)]
    name = test_sources.write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    data = load(tokenizer, name, eval_rows=5)
    assert len(data.held_out) == 5
    assert len(data.train.held_out) == 1
    assert any(line.startswith("held out: 5 examples of the first") for line in data.lines)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_goes_on_with_its_workers_in_turn(tokenizer, tmp_path, workers):  # noqa: F811
    stream = load(tokenizer, folder_of(tmp_path, 1), "bfd").train

    def loader() -> StreamLoader:
        return StreamLoader(stream, 1, 2, 2, list, num_workers=workers)

    whole, cut = list(itertools.islice(loader(), 12)), loader()
    list(itertools.islice(cut, 5))
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert list(itertools.islice(resumed, 7)) == whole[5:]
    said = []
    goes_round = StreamLoader(stream, 0, 1, 8, list, said.append, num_workers=workers)
    list(itertools.islice(goes_round, 12))
    assert said[0] == "the stream has ended, and begins again: pass 2"
    again = StreamLoader(stream, 0, 1, 8, list, said.append, num_workers=workers)
    again.load_state_dict(goes_round.state_dict())
    del said[:]
    next(iter(again))
    assert len(said) == again.passes - goes_round.passes, "a resume does not say it again"
    other = StreamLoader(stream, 0, 4, 3, list, num_workers=workers)
    with pytest.raises(UserError, match="its run streamed by other ranks, rows a batch; give what it had, or --ignore"):
        other.load_state_dict(cut.state_dict())


def test_all_that_changes_the_examples_changes_the_fingerprint(tokenizer, tmp_path):  # noqa: F811
    name = folder_of(tmp_path, 2)
    first = load(tokenizer, name).train.fingerprint()
    assert load(tokenizer, name).train.fingerprint() == first
    others = [{"seed": 1}, {"max_length": 31}, {"packing": "bfd"}, {"long_examples": "drop"}, {"eval_rows": 2}]
    others += [{"train_on_inputs": True}, {"dataset_weights": [2]}]
    assert len({first, *(load(tokenizer, name, **other).train.fingerprint() for other in others)}) == 8
    (tmp_path / "rows" / "more.jsonl").write_text(json.dumps(rows_of([1])[0]))
    assert load(tokenizer, name).train.fingerprint() != first


def test_invalid_rows_are_refused_before_a_run_or_in_its_step(tokenizer, tmp_path):  # noqa: F811
    rows = rows_of(range(1100))
    path = test_sources.write(tmp_path / "rows.jsonl", [*rows[:1050], {"question": "q", "reply": "a"}, *rows[1050:]])
    stream = load(tokenizer, path).train
    with pytest.raises(UserError, match=r"rows.jsonl, line 1051 .*; --skip_bad_rows true skips such rows"):
        take(stream.examples(), 1060)
    with pytest.raises(UserError, match=r"line 1051 has no answer"):
        list(itertools.islice(StreamLoader(stream, 0, 1, 2, list, num_workers=2), 530))
    skips = load(tokenizer, path, skip_bad_rows=True).train
    assert sorted(questions(tokenizer, [one for one, _ in take_pass(skips, 0, 1, 1)])) == list(range(1100))
    path = test_sources.write(tmp_path / "bad.jsonl", [*rows[:3], {"question": "q", "reply": "a"}])
    with pytest.raises(UserError, match=r"1 of 4 examples are invalid:\n.*line 4 has no answer"):
        load(tokenizer, path)


def test_a_stream_that_ends_early_says_so(tokenizer, tmp_path):  # noqa: F811
    stream = load(tokenizer, folder_of(tmp_path, 1, count=3)).train
    with pytest.raises(UserError, match="has no row for part 4 of 4; each loader worker of each rank reads one"):
        take(stream.examples(3, 4), 1)
    more = test_sources.write(tmp_path / "more.jsonl", rows_of(range(50, 60)))
    mixed = load(tokenizer, [str(tmp_path / "rows"), more]).train
    seen = questions(tokenizer, take(mixed.examples(3, 4), 6))
    assert set(seen) == {53, 57}, "of the smaller source another part has all"
    with pytest.raises(UserError, match="has no row for part 4 of 4"):
        take(load(tokenizer, [str(tmp_path / "rows"), more], dataset_weights=[1, 1]).train.examples(3, 4), 20)
    long = tmp_path / "long.jsonl"
    test_sources.write(long, [rows_of([1])[0], {"question": "q" * 50, "answer": "a"}])
    drops = load(tokenizer, str(long), long_examples="drop").train
    with pytest.raises(UserError, match="no row of a whole pass has a token to train on; raise --max_length"):
        take(drops.examples(1, 2), 1)
    path = tmp_path / "cut.jsonl.gz"
    test_sources.write(path, rows_of(range(5000)))
    path.write_bytes(path.read_bytes()[:-2000])
    cut = load(tokenizer, str(path)).train
    with pytest.raises(UserError, match=r"cut.jsonl.gz cannot be read \(Compressed file ended before"):
        take(cut.examples(), 5000)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="contains no example that can be read: it is empty"):
        load(tokenizer, str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="--eval_rows 3: must be fewer than the first 3 rows"):
        load(tokenizer, str(tmp_path / "rows"), eval_rows=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_rows": 0.1}, "--eval_rows 0.1 with --streaming: a stream has no length; give a number."),
        ({"dataset_name": "a.jsonl#5"}, "--dataset_name a.jsonl#5 with --streaming: a stream has no length; leave # "),
    ],
)
def test_what_needs_a_length_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        DataArguments(**{"dataset_name": "a.jsonl", "streaming": True} | given)
