"""A model that sees, from the command line: its language model trains, on texts and on images; no tower does."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from eval_files import write_lines
from models import save_tiny_llava
from PIL import Image
from runs import flags_for, on_two_ranks, run_alone, run_well
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lisa_dist.data.dataset import DataArguments
from lisa_dist.data.image_rows import load_image_data
from lisa_dist.errors import UserError
from lisa_dist.turns import takes_parts

SETTINGS = {"lisa_activated_layers": 1, "lisa_sampler": "reshuffle", "max_steps": 6, "save_strategy": "steps"}
SETTINGS |= {"save_steps": 3, "eval_on_start": False, "max_length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    save_tiny_llava(folder / "model")
    write_lines(folder / "rows.jsonl", [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)])
    save_images(folder / "red", lambda n: (8 * n, 0, 0))
    save_images(folder / "blue", lambda n: (0, 0, 255 - 8 * n))
    return folder


def save_images(folder: Path, colour) -> None:
    """Thirty-two rows, and an image of one colour for each."""
    folder.mkdir()
    rows = []
    for n in range(32):
        Image.new("RGB", (40, 32), colour(n)).save(folder / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": str(n)}]
        rows.append({"image": f"{n}.png", "conversations": turns})
    write_lines(folder / "rows.jsonl", rows)


def losses_of(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "stage"), [("red/rows.jsonl", "zero2"), ("red/rows.jsonl", "zero3"), ("rows.jsonl", "zero3")]
)
def test_the_layers_train_and_the_tower_stays_on_two_ranks(folder, tmp_path, rows, stage):
    settings = SETTINGS | {"dataset_name": folder / rows, "deepspeed": stage}
    said = on_two_ranks(flags_for(folder, tmp_path / "out", **settings), tmp_path, report=True)
    assert "LlavaProcessor, saved with the model" in said
    assert re.search(r"outside +not of the language model.*: model\.vision_tower, model\.multi_modal_projector\n", said)
    periods = [json.loads(line) for line in (tmp_path / "out" / "lisa_log.jsonl").read_text().splitlines()]
    layers = {layer for period in periods for layer in period["layers"]}
    assert len(layers) == 3
    start, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "out"))
    for name, value in start.items():
        layer = re.search(r"language_model\.(?:model\.)?layers\.(\d+)\.", name)
        tower = "vision_tower" in name or "projector" in name
        trains = not tower and (layer is None or int(layer[1]) in layers)
        assert torch.equal(value, after[name]) != trains, name

    resume = settings | {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-3"}  # in the middle of a period
    on_two_ranks(flags_for(folder, tmp_path / "again", **resume), tmp_path)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=Image.open(folder / "red" / "1.png"), text="<user><image>How red?", return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()


def test_what_the_images_show_is_trained_on(folder, tmp_path):
    """The same questions and answers beside other images have other losses; with either loss they are the same ones."""
    settings = SETTINGS | {"lisa_preset": "none", "eval_strategy": "no", "eval_rows": 0, "max_steps": 2}
    found = {}
    for name, rows, loss in (("red", "red", "logits"), ("blue", "blue", "logits"), ("chunked", "red", "chunked")):
        changes = settings | {"dataset_name": folder / rows / "rows.jsonl", "loss": loss}
        said = run_well(flags_for(folder, tmp_path / name, **changes), tmp_path)
        assert "sharegpt (image, conversations), 32 examples" in said
        assert "first example: images of 40 x 32 pixels\n    user: How red?\n    assistant: 0\n" in said
        found[name] = losses_of(tmp_path / name)
    assert found["red"] == pytest.approx(found["chunked"], abs=1e-4)
    assert abs(found["red"][0] - found["blue"][0]) > 1e-4


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_train_on_images_too(folder, tmp_path, method):
    changes = SETTINGS | {"dataset_name": folder / "red" / "rows.jsonl", "method": method, "max_steps": 2}
    run_well(flags_for(folder, tmp_path / "out", **changes), tmp_path)


def test_a_template_of_parts_is_given_parts(folder, tmp_path):
    """Which on texts alone would be a row without its question, and without its answer."""
    tokenizer = AutoProcessor.from_pretrained(folder / "model").tokenizer
    tokenizer.chat_template = AutoProcessor.from_pretrained(folder / "model").chat_template
    assert takes_parts(tokenizer)
    changes = SETTINGS | {"max_steps": 1, "sample_prompt": "1 + 1?"}
    said = run_well(flags_for(folder, tmp_path / "out", **changes), tmp_path)
    assert "    <user>0 + 1?<end><assistant>\n  > 1<end>\n" in said


def test_all_turns_have_labels_where_that_is_asked(folder):
    arguments = DataArguments(dataset_name=[str(folder / "red" / "rows.jsonl")], train_on_inputs=True, eval_rows=8)
    data = load_image_data(arguments, seed=0)
    assert set(data.train.column_names) == {"images", "messages"}
    assert (len(data.train), len(data.held_out)) == (24, 8)
    assert [turn["role"] for turn in data.train[0]["messages"]] == ["user", "assistant"]


CALLED = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
ASKED = {"question": "?", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ASKED | {"image": "absent.png"}, "has an image absent.png: no such file"),
        (ASKED | {"image": "rows.jsonl"}, "has an image rows.jsonl: is no image that can be"),
        (ASKED | {"image": None}, "has no image"),
        (ASKED | {"image": {"path": "http://host/a.png", "bytes": None}}, "has an image http://host/a.png: no such"),
        (ASKED | {"image": {"path": "/etc/passwd"}}, "has an image /etc/passwd: is no image"),
        (ASKED | {"image": {"bytes": "a"}}, "has an image that is neither a path nor bytes"),
        (ASKED | {"images": [["a.png"]]}, "has an image that is neither a path nor bytes: ['a.png']"),
        (ASKED | {"image": "../a.png"}, "has an image ../a.png: leads out of its folder"),
        (ASKED | {"image": "a.png", "messages": [CALLED]}, "has tools or tool calls beside"),
        (ASKED | {"images": []}, "has no image"),
        (
            {"image": "a.png", "messages": [{"role": "assistant", "content": "1"}]},
            "has images and no question before its last answer",
        ),
        ({"image": "a.png", "text": "?"}, "has images beside a text; give a question and an answer, or turns"),
    ],
)
def test_rows_that_cannot_serve(tmp_path, row, problem):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=re.escape(f"rows.jsonl, line 1 {problem}")):
        load_image_data(DataArguments(dataset_name=[str(tmp_path / "rows.jsonl")]), seed=0)


def test_what_does_not_go_with_images_is_one_line(folder, tmp_path):
    rows = {"dataset_name": folder / "red" / "rows.jsonl"}
    flags = flags_for(folder, tmp_path / "out", **SETTINGS | rows | {"packing": True})
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2, said[-3000:]
    assert "lisa-dist: --packing True: Packing is not supported for vision datasets." in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<image>\nHow red?", "How red?"),
        ("How red?<image>", "How red?"),
        ("Is the cat in <image> asleep?", "Is the cat in asleep?"),
        ("One\n<image>\ntwo", "One\ntwo"),
    ],
)
def test_a_mark_of_an_image_leaves_the_words_apart(tmp_path, text, left):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": text, "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = load_image_data(DataArguments(dataset_name=[str(tmp_path / "rows.jsonl")]), seed=0)
    assert data.train[0]["prompt"] == [{"role": "user", "content": left}]


def test_images_without_a_processor_are_refused(folder, tmp_path):
    """And not left out in silence; texts train, and the header says that there is no processor."""
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("processor_config.json"))
    flags = flags_for(tmp_path, tmp_path / "out", **SETTINGS | {"dataset_name": folder / "red" / "rows.jsonl"})
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 2, said[-3000:]
    assert re.search(r"lisa-dist: --dataset_name .*: its rows have images, and the model's processor is none", said)
    texts = SETTINGS | {"dataset_name": folder / "rows.jsonl", "max_steps": 1}
    said = run_well(flags_for(tmp_path, tmp_path / "out", **texts), tmp_path)
    assert "processor          none, and the model is saved without one" in said


@pytest.mark.full
def test_a_processor_s_own_template_is_the_tokenizer_s_too(folder, tmp_path):
    """As older models have it, in a file of the processor's alone."""
    shutil.copytree(folder / "model", tmp_path / "model")
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    changes = SETTINGS | {"dataset_name": folder / "rows.jsonl", "max_steps": 1}
    said = run_well(flags_for(tmp_path, tmp_path / "out", **changes), tmp_path)
    assert "    <user>0 + 1?<end><assistant>\n  > 1<end>\n" in said


@pytest.mark.full
def test_dpo_trains_its_texts(folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n' * 16)
    changes = SETTINGS | {"dataset_name": tmp_path / "pairs.jsonl", "task": "dpo", "max_steps": 1, "eval_rows": 0}
    flags = flags_for(folder, tmp_path / "out", **changes | {"eval_strategy": "no"})
    run_well(flags, tmp_path)
