"""Rows from files, folders, saved datasets; what cannot be read is named by file, row and rule."""

import csv
import gzip
import json

import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from lisa_dist.config import UserError
from lisa_dist.data import sources
from lisa_dist.data.readers import ORIGIN
from lisa_dist.data.sources import Source, apply_weight, load_turns

ROW = {"question": "q", "answer": "a"}


def write(path, rows: list[dict]) -> str:
    """Rows in a file of the kind that its name says."""
    path.parent.mkdir(exist_ok=True)
    suffix = path.suffixes[0]
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w", newline="") as file:
        if suffix == ".jsonl":
            file.write("\n".join(map(json.dumps, rows)) + "\n\n")
        elif suffix == ".json":
            json.dump(rows, file)
        elif suffix == ".txt":
            file.write("\n".join(row["text"] for row in rows))
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def load(name: str, skip: bool = False, seed: int = 0, **options) -> tuple[list[dict], str]:
    rows, told = load_turns(Source(name, **options), skip, seed)
    return rows.to_list(), told


def questions(rows: list[dict]) -> list[str]:
    return [row["turns"][0]["content"] for row in rows]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, suffix):
    rows = [{"question": f'q {n}, "x"\n\n{n}', "answer": "ä\u2028"} for n in range(3)]
    found, told = load(write(tmp_path / f"rows{suffix}", rows))
    assert questions(found) == [row["question"] for row in rows]
    assert found[0]["turns"][1] == {"role": "assistant", "content": "ä\u2028"}
    assert "question_answer (question, answer), 3 examples" in told
    what = "line 2" if "jsonl" in suffix else "row 2"
    assert found[1][ORIGIN] == f"{tmp_path}/rows{suffix}, {what}"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (("Question", "ANSWER"), "question_answer (question, answer)"),
        (("input", "output"), "question_answer (question, answer)"),
        (("Prompt", "Response"), "prompt_completion (prompt, completion)"),
        (("Instruction", "Output"), "alpaca (instruction, output)"),
    ],
)
def test_columns_of_another_case_and_synonyms_are_taken(tmp_path, columns, told):
    found, said = load(write(tmp_path / "rows.csv", [dict(zip(columns, ("q", "a"), strict=True))]))
    assert [turn["content"] for turn in found[0]["turns"]] == ["q", "a"]
    assert told in said


def test_a_line_of_a_text_file_is_a_row(tmp_path):
    found, told = load(write(tmp_path / "rows.txt", [{"text": "one"}, {"text": " "}, {"text": "two"}]))
    assert questions(found) == ["one", "two"]
    assert [row[ORIGIN].rpartition(", ")[2] for row in found] == ["line 1", "line 3"]
    assert "text (text), 2 examples" in told


def test_objects_a_line_in_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    assert len(load(str(path))[0]) == 2


def test_a_folder_has_the_rows_of_its_files_in_order(tmp_path):
    write(tmp_path / "rows" / "2.json", [{"question": "third", "answer": "a"}])
    write(tmp_path / "rows" / "1.jsonl", [{"question": "first", "answer": "a"}, {"question": "second", "answer": "a"}])
    (tmp_path / "rows" / "README.md").write_text("no rows")
    assert questions(load(str(tmp_path / "rows"))[0]) == ["first", "second", "third"]


def test_a_column_of_times_that_python_has_not(tmp_path):
    times = pyarrow.array([10**12], pyarrow.timestamp("s"))
    table = pyarrow.table({"question": ["q"], "answer": ["a"], "at": times})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read"):
        load(str(tmp_path / "rows.parquet"))


def test_a_saved_dataset(tmp_path):
    Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "saved")
    found, _ = load(str(tmp_path / "saved"))
    assert [row[ORIGIN] for row in found] == ["row 1", "row 2"]
    DatasetDict({"test": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has no split train; it has test"):
        load(str(tmp_path / "splits"))


def test_what_the_hubs_library_refuses_is_said_of_the_flag(monkeypatch):
    """As of a split or a config that a dataset has not: no hub can be asked here, so the library's words are given."""

    def refuse(name, config, split, streaming):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['test'].")

    monkeypatch.setattr(sources, "load_dataset", refuse)
    with pytest.raises(UserError, match=r'--dataset_name someone/rows: Unknown split "train"'):
        load("someone/rows")


def test_a_sample_and_a_weight_are_drawn_by_the_seed(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"question": str(n), "answer": "a"} for n in range(100)])
    found, told = load(f"{name}#10")
    drawn = [int(question) for question in questions(found)]
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn)
    assert "100 examples, 10 of them sampled by --seed 0" in told
    assert load(f"{name}#10")[0] == found
    assert load(f"{name}#10", seed=1)[0] != found
    rows = load_turns(Source(name), False, 0)[0]
    assert len(apply_weight(rows, Source(name, weight=0.25), 0)) == 25
    found = apply_weight(rows, Source(name, weight=2.5), 0).to_list()
    counts = sorted(questions(found).count(str(n)) for n in range(100))
    assert counts == [2] * 50 + [3] * 50
    with pytest.raises(ValueError, match=r"--dataset_weights 0\.001 of .*: leaves none of 100 examples"):
        apply_weight(rows, Source(name, weight=0.001), 0)


def test_a_file_with_the_mark_of_a_sample_in_its_name(tmp_path):
    assert len(load(write(tmp_path / "rows#1.jsonl", [ROW, ROW]))[0]) == 2


def test_columns_and_format_can_be_told(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"QUESTION": "q", "LONG_ANSWER": "a", "text": "t"}])
    columns = (("question", "QUESTION"), ("answer", "LONG_ANSWER"))
    assert questions(load(name, columns=columns)[0]) == ["q"]
    assert questions(load(name)[0]) == ["t"]
    assert questions(load(name, columns=columns, format="text")[0]) == ["t"]
    with pytest.raises(ValueError, match=r"--dataset_columns: .* has no QUERY; its columns are QUESTION, LONG_ANSWER"):
        load(name, columns=(("question", "QUERY"),))


UTF_16 = "question,answer\nq,a\n".encode("utf-16")


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        (None, ".jsonl", "no such file"),
        ("x", ".xml", "unknown kind of file; give one of .json, .jsonl, .csv, .tsv, .parquet, .txt"),
        ("", ".jsonl", "contains no example that can be read: it is empty"),
        (" \n", ".json", "is not JSON"),
        ("[1,", ".json", "is not JSON"),
        ("[]", ".json", "contains no example that can be read: it is empty"),
        ("x\n", ".jsonl", "contains no example that can be read: line 1 is not JSON"),
        ("3", ".json", "is int; it must be a list of objects"),
        ('{"1": {}, "2": {}}', ".json", "is one object with the keys 1, 2, ...; it must be a list of objects"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', ".json", "line 2 is not UTF-8"),
        ("PAR1", ".parquet", "cannot be read"),
        # The time in the header would stand in the name of the test, and each worker would have another.
        (gzip.compress(b'{"text": "a"}' * 100, mtime=0)[:-20], ".jsonl.gz", "cannot be read"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0no gzip", ".jsonl.gz", "cannot be read"),
        ("[" * 100_000, ".json", "is not JSON"),
        ("[" * 100_000, ".jsonl", "line 1 is not JSON"),
        ('question,answer\n"q,a\n', ".csv", "cannot be read"),
        ("question;answer\na, b;c\n", ".csv", "cannot be read (its columns are separated by ';'; write it with ',')"),
        *((UTF_16, suffix, "it is in UTF-16") for suffix in (".csv", ".jsonl", ".txt")),
        ('{"question": "a"}', ".jsonl", "its columns question are those of no format. Formats are messages (mess"),
    ],
)
def test_a_file_that_is_no_use_is_named(tmp_path, content, suffix, said):
    path = tmp_path / f"rows{suffix}"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"--dataset_name {tmp_path}") as error:
        load(str(path))
    assert said in str(error.value)


LABELLED = [{"prompt": "q", "completion": "a", "label": True}] * 2


@pytest.mark.parametrize("kind", ["file", "table"])
def test_rows_that_say_which_completions_are_wanted_are_for_kto(tmp_path, kind):
    def saved(rows: list[dict]) -> str:
        if kind == "file":
            return write(tmp_path / "rows.jsonl", rows)
        Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
        return str(tmp_path / "rows")

    with pytest.raises(UserError, match=r"its rows have a label that says .*: give --task kto, or --dataset_format"):
        load(saved(LABELLED))
    with pytest.raises(
        UserError, match=r"those of no format.* Such rows are for --task dpo or kto or orpo or reward\."
    ):
        load(saved([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    assert len(load(saved(LABELLED), format="prompt_completion")[0]) == 2
    assert len(load(saved([row | {"label": "news"} for row in LABELLED]))[0]) == 2


BAD_ROWS = [
    (b'{"text": "a"}\n{"text": \n', ".jsonl", "line 2 is not JSON"),
    (b'{"text": "a"}\n3\n', ".jsonl", "line 2 is int, not an object"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ".jsonl", "line 2 is not UTF-8"),
    (b'{"text": "a"}\n\n{"txet": "b"}\n', ".jsonl", "line 3 has no text"),
    (b'[{"text": "a"}, {"text": [1]}]', ".json", "row 2 text is a list, not text"),
    (b'[{"text": "a"}, 3]', ".json", "row 2 is int, not an object"),
    (b"text\na\n\xff\n", ".csv", "row 2 is not UTF-8"),
    (b"question,answer\na,b\nc\n", ".csv", "row 2 does not have the 2 fields of the first line"),
    (b"question,answer\na,b\nc,d,e\n", ".csv", "row 2 does not have the 2 fields of the first line"),
    (b"a\n\xff\n", ".txt", "line 2 is not UTF-8"),
    (b'{"text": "a"}\n{"text": "\\ud800"}\n', ".jsonl", "line 2 has half of a character"),
]


@pytest.mark.parametrize(("content", "suffix", "said"), BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(tmp_path, content, suffix, said):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="1 of 2 examples are invalid") as error:
        load(str(path))
    assert f"  {path}, {said}" in str(error.value)
    assert "skip them with --skip_bad_rows true" in str(error.value)
    found, told = load(str(path), skip=True)
    assert len(found) == 1
    assert f"1 invalid ones skipped, such as {path}, {said}" in told


def test_many_bad_rows_are_counted(tmp_path):
    name = write(tmp_path / "rows.jsonl", [ROW, *[{"question": "q", "answer": ""}] * 9])
    with pytest.raises(ValueError, match="9 of 10 examples") as error:
        load(name)
    assert str(error.value).count("answer is empty") == 5
    assert "and 4 more" in str(error.value)
    with pytest.raises(ValueError, match="none of 1 examples can be used"):
        load(write(tmp_path / "bad.jsonl", [{"question": "q", "answer": ""}]), skip=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "ROWS#0"}, "give a number of examples after #"),
        ({"name": "ROWS#x"}, "give a number of examples after #"),
        ({"name": "ROWS#3"}, "has only 1 examples"),
        ({"name": "EMPTY"}, r"the folder contains no file of \.json"),
        (
            {"name": "no/such-dataset", "flag": "--eval_dataset_name"},
            "--eval_dataset_name no/such-dataset: no such file or folder, and no dataset",
        ),
        ({"name": "rows", "format": "xml"}, "--dataset_format xml: unknown"),
        ({"name": "rows", "weight": 0}, "--dataset_weights 0 of rows: must be above"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, said):
    (tmp_path / "empty").mkdir()
    places = {"ROWS": write(tmp_path / "rows.jsonl", [ROW]), "EMPTY": str(tmp_path / "empty")}
    for word, place in places.items():
        options = options | {"name": options["name"].replace(word, place)}
    with pytest.raises(ValueError, match=said):
        load(**options)


def test_a_file_that_was_changed_is_read_anew(tmp_path):
    assert len(load(write(tmp_path / "rows.jsonl", [ROW]))[0]) == 1
    assert len(load(write(tmp_path / "rows.jsonl", [ROW, ROW]))[0]) == 2


def test_rows_that_cannot_be_cached_are_said_of_the_flag(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", rows / "below_a_file")
    with pytest.raises(UserError, match=r"rows.jsonl: its rows cannot be cached \(Not a directory\); make room"):
        load_turns(Source(str(rows)), False, 0)
