"""From flags to tokens: several sources, held-out examples, the header."""

import json
import re

import pytest
from models import save_tiny_llama
from transformers import AutoTokenizer

from lisa_dist.data.dataset import DataArguments, describe_examples, load_data
from lisa_dist.data.encoding import IGNORED, set_chat_template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def names(tmp_path) -> list[str]:
    """Two files: twenty questions, and one text."""
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "story.txt").write_text("Once upon a time there was a sum.\n")
    return [str(tmp_path / "sums.jsonl"), str(tmp_path / "story.txt")]


def load(tokenizer, seed: int = 0, max_length: int | None = 64, **arguments):
    return load_data(DataArguments(**arguments), tokenizer, max_length=max_length, seed=seed)


def test_sources_of_several_formats_are_put_together(tokenizer, names):
    data = load(tokenizer, dataset_name=names, dataset_weights=[0.5, 3])
    assert len(data.train) == 13
    assert data.held_out is None
    assert tokenizer.decode(data.train[12]["input_ids"]) == "Once upon a time there was a sum.<end>"
    assert data.lines[:4] == [
        f"{names[0]}: question_answer (question, answer), 20 examples",
        f"{names[1]}: text (text), 1 examples",
        f"{names[0]}: 20 become 10 by the weight 0.5",
        f"{names[1]}: 1 become 3 by the weight 3",
    ]


def test_held_out_rows_are_held_out_whole(tokenizer, tmp_path):
    """Also where a weight repeats examples, and where a text is split into several."""
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"({n})" * 40}) for n in range(10, 60)))
    data = load(tokenizer, dataset_name=str(path), dataset_weights=2.5, eval_rows=0.2, max_length=32)
    assert len(data.held_out) >= 4 * 10, "ten texts in several examples each"
    train, held_out = (
        {number for row in part for number in re.findall(r"\((\d+)\)", tokenizer.decode(row["input_ids"]))}
        for part in (data.train, data.held_out)
    )
    assert (len(train), len(held_out)) == (40, 10)
    assert not train & held_out


@pytest.mark.parametrize(("texts", "eval_rows"), [(30, 10), (1, 10), (30, 0.1)])
def test_parts_of_a_split_text_are_counted_as_examples(tokenizer, tmp_path, texts, eval_rows):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"({n})" * 100 for n in range(10, 10 + texts)))
    total = len(load(tokenizer, dataset_name=str(path), max_length=32).train)
    data = load(tokenizer, dataset_name=str(path), eval_rows=eval_rows, max_length=32)
    number = eval_rows if eval_rows >= 1 else round(eval_rows * total)
    assert (len(data.train), len(data.held_out)) == (total - number, number)
    with pytest.raises(ValueError, match=f"--eval_rows {total}: {total} examples of"):
        load(tokenizer, dataset_name=str(path), eval_rows=total, max_length=32)


def test_the_first_example_is_shown_with_what_counts(tokenizer, names):
    shown = load(tokenizer, dataset_name=names[0]).lines[1].split("\n")
    assert shown[1:] == ["  <user>0 + 1?<end><assistant>", "> 1<end>"]
    assert shown[0] == "first example: 11 tokens, 2 of them with loss (lines with >)"
    assert load(tokenizer, dataset_name=names[0], train_on_inputs=True).lines[1].split("\n")[1:] == [
        "> <user>0 + 1?<end><assistant>1<end>"
    ]


def test_a_report_has_lengths_and_more_examples(tokenizer, tmp_path):
    rows = [{"question": "1" * n, "answer": "2" * n} for n in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    about, third, last = load(tokenizer, dataset_name=str(tmp_path / "rows.jsonl")).more
    assert about == "tokens of a training example: 6 to 12, half of them at most 8"  # with four marks
    assert third.split("\n")[1:] == ["  <user>111<end><assistant>", "> 222<end>"]
    assert last.startswith("another training example: 12 tokens, 5 of them with loss")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert len(load(tokenizer, dataset_name=str(tmp_path / "rows.jsonl")).more) == 1


def test_a_long_example_is_shown_in_part(tokenizer, tmp_path):
    (tmp_path / "story.txt").write_text("word " * 1000)
    shown = load(tokenizer, dataset_name=str(tmp_path / "story.txt"), max_length=None).lines[1].split("\n")
    assert len("\n".join(shown)) < 1000
    assert " ... " in shown[1]

    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "line\n" * 2000, "answer": "yes"}))
    shown = load(tokenizer, dataset_name=str(tmp_path / "long.jsonl"), max_length=None).lines[1].split("\n")
    assert shown[-1] == "> yes<end>", "the answer is seen whatever comes before it"
    assert len(shown) < 300


@pytest.mark.parametrize(("eval_rows", "number"), [(5, 5), (0.25, 5)])
def test_rows_are_held_out_by_number_or_part(tokenizer, names, eval_rows, number):
    data = load(tokenizer, dataset_name=names[0], eval_rows=eval_rows)
    assert (len(data.train), len(data.held_out)) == (20 - number, number)
    texts = {tuple(row["input_ids"]) for part in (data.train, data.held_out) for row in part}
    assert len(texts) == 20
    again = load(tokenizer, dataset_name=names[0], eval_rows=eval_rows)
    assert describe_examples(again.held_out) == describe_examples(data.held_out)
    other = load(tokenizer, dataset_name=names[0], eval_rows=eval_rows, seed=1)
    assert describe_examples(other.held_out) != describe_examples(data.held_out)


def in_every_form(row: dict) -> dict[str, dict]:
    """A question and its answer as each format has them."""
    question, answer = row["question"], row["answer"]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        "messages": {"messages": turns},
        "prompt_completion": {"prompt": turns[:1], "completion": turns[1:]},
    }


OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.full
@pytest.mark.parametrize("template", [None, OWN])
def test_real_rows_give_the_same_tokens_and_labels_in_every_form(data_dir, tmp_path, template):
    """300 rows of GSM8K, with a chat template and with the plain one that a model without any gets."""
    lines = (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    rows = [in_every_form(json.loads(line)) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260k-hf")
    tokenizer.chat_template = template
    set_chat_template(tokenizer, None)
    found = []
    for form in rows[0]:
        path = tmp_path / f"{form}.jsonl"
        path.write_text("\n".join(json.dumps(row[form]) for row in rows), encoding="utf-8")
        data = load(tokenizer, dataset_name=str(path), max_length=512)
        assert data.lines[0].startswith(f"{path}: {form} (")
        found.append(data.train.to_list())
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 300 - sum("dropped" in line for line in data.lines)
    for row in found[0]:
        assert 0 < sum(label != IGNORED for label in row["labels"]) < len(row["input_ids"])


def test_held_out_rows_of_a_file(tokenizer, names):
    data = load(tokenizer, dataset_name=names[0], eval_dataset_name=f"{names[0]}#3")
    assert (len(data.train), len(data.held_out)) == (20, 3)


def test_dropped_examples_are_named_where_too_few_are_left(tokenizer, tmp_path):
    path = tmp_path / "three.jsonl"
    path.write_text("\n".join(json.dumps({"question": "1 + " * repeats, "answer": "2"}) for repeats in (1, 1, 99)))
    with pytest.raises(ValueError, match=r"--eval_rows 5: 2 examples of .* can be used") as error:
        load(tokenizer, dataset_name=str(path), eval_rows=5)
    assert "1 examples have more than 64 tokens" in str(error.value)
    assert "1 dropped, as no label was left). At least one must be held out" in str(error.value)


def test_what_cannot_be_held_out(tokenizer, names):
    for eval_rows in (20, 0.001):
        with pytest.raises(ValueError, match="At least one must be held out, and one left to train on"):
            load(tokenizer, dataset_name=names[0], eval_rows=eval_rows)
    with pytest.raises(ValueError, match=r"--eval_rows 5: --dataset_name has .* twice; give it once"):
        load(tokenizer, dataset_name=[names[0], f"{names[0]}#10"], eval_rows=5)
    assert len(load(tokenizer, dataset_name=[names[0], names[0]]).train) == 40, "without held-out rows it may be twice"
