"""Rows from local files, told apart by their columns; bad files named by file, line and rule."""

import json

import pytest

from lisa_dist.data import load_rows, prepare_rows


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o"),
    ],
)
def test_formats_become_prompt_and_completion(tmp_path, suffix, row, prompt, completion):
    name = write(tmp_path / f"rows{suffix}", [row, row])
    written = prompt if "prompt" in row else prompt + "\n"
    plain = prepare_rows(load_rows(name), name, chat=False).to_list()
    assert plain == [{"prompt": written, "completion": completion}] * 2
    chat = prepare_rows(load_rows(name), name, chat=True).to_list()[0]
    assert chat["prompt"] == [{"role": "user", "content": prompt}]
    assert chat["completion"] == [{"role": "assistant", "content": completion}]


@pytest.mark.parametrize("row", [{"text": "t"}, {"messages": [{"role": "user", "content": "u"}]}])
def test_what_trl_knows_stays_as_it_is(tmp_path, row):
    name = write(tmp_path / "rows.jsonl", [row])
    assert prepare_rows(load_rows(name), name, chat=True).to_list() == [row]


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        (None, ".jsonl", "cannot be read"),
        ("", ".jsonl", "is empty"),
        (" \n", ".json", "is empty"),
        ('{"text": "a"}\n{"text": \n', ".jsonl", "line 2 is not JSON"),
        ("[1,", ".json", "is not JSON"),
        ('{"text": "a"}', ".json", "holds no rows"),
        ("[]", ".json", "holds no rows"),
        ('{"text": "a"}\n3\n', ".jsonl", "line 2 is int, not an object"),
        ('[{"question": "a", "answer": "b"}, {"question": "a"}]', ".json", "row 2 lacks answer"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ".jsonl", "line 2 is not UTF-8"),
        (
            '[{"text": "a"}, {"text": [1]}]',
            ".json",
            "row 2 has a column of another type than before: text is list, not str",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, suffix, said):
    path = tmp_path / f"rows{suffix}"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="--dataset_name") as error:
        load_rows(str(path))
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_a_null_answer_is_named(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}])
    with pytest.raises(ValueError, match="row 2 has no answer"):
        prepare_rows(load_rows(name), name, chat=False)


def test_line_separators_within_a_string_end_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert load_rows(str(path)).to_list() == [{"text": "a\u2028b\u0085c"}]


def test_missing_columns_are_named(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"question": "q", "label": 1}])
    with pytest.raises(ValueError, match="has the columns question, label; needed are") as error:
        prepare_rows(load_rows(name), name, chat=False)
    assert "question+answer" in str(error.value)


def test_an_unreachable_dataset_is_named():
    with pytest.raises(ValueError, match="--dataset_name no/such-dataset: no such file"):
        load_rows("no/such-dataset")
