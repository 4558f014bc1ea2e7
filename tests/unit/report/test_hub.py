"""Models go to the hub with a card of how they trained; what it refuses is one line, and the model is saved."""

import json

import pytest
import yaml
from hub_stand_in import Hub
from huggingface_hub import constants
from runs import TRAIN, flags_for, on_two_ranks, run_alone
from safetensors.torch import load

from lisa_dist.commands import export
from lisa_dist.report.hub import write_card

CARD = {"model": "someone/base", "method": "lisa", "task": "sft", "devices": "1 x CPU, fp32", "num_layers": 6}
CARD |= {"command": "lisa-dist train --dataset_name /home/me/secret/rows.jsonl --model_name_or_path someone/base"}
CARD |= {"rows": ["/home/me/secret/rows.jsonl: question_answer, 5 examples", "first example: mine"]}
CARD["rows"] += ["another training example: mine", "first row: mine"]
TOO_LARGE = "the hub answers 413; the file is too large for it; ask for a larger quota"


@pytest.fixture
def hub():
    with Hub().open() as one:
        yield one


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run that was not pushed, with a checkpoint."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = flags_for(folder, out, max_steps=2, save_strategy="steps", save_steps=2, dataset_weights=1)
    status, said = run_alone(flags, out.parent / "said.txt")
    assert status == 0, said
    return out


def on_hub(hub: Hub, folder, token: str = Hub.token):
    """A script of a run whose hub is this one: what it takes from the environment it has imported before."""
    script = folder / "on_hub.py"
    script.write_text(
        "import os, runpy\nfrom huggingface_hub import constants, hf_api\n"
        f"constants.ENDPOINT = hf_api.api.endpoint = {hub.url!r}\nconstants.HF_HUB_OFFLINE = False\n"
        f"os.environ['HF_TOKEN'] = {token!r}\nrunpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    return script


def test_a_run_is_pushed_with_its_card(folder, tmp_path, hub):
    flags = flags_for(folder, tmp_path / "out", push_to_hub=True, hub_model_id="me/model", hub_private_repo=True)
    status, said = run_alone(flags, tmp_path / "said.txt", on_hub(hub, tmp_path))
    assert status == 0, said
    assert hub.private == {"me/model": True}
    assert (
        load(hub.files["model.safetensors"]).keys()
        == load((tmp_path / "out" / "model.safetensors").read_bytes()).keys()
    )
    card = hub.files["README.md"].decode()
    about = yaml.safe_load(card.split("---")[1])
    assert about["tags"] == ["lisa_dist", "lisa", "sft"]
    losses = [
        entry["eval_loss"]
        for entry in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in entry
    ]
    for line in (
        "| method | LISA: 2 of 6 decoder layers at a time |",
        "- rows.jsonl: question_answer (question, answer), 64 examples",
        f"| held-out loss, first to last | {losses[0]:.4f} → {losses[-1]:.4f} |",
        "| peak of a step, planned | ",
    ):
        assert line in card
    assert str(tmp_path) not in card
    assert "+ 1?" not in hub.files["lisa_run.json"].decode()
    assert "hf_secret" not in "".join(content.decode("latin-1") for content in hub.files.values())


@pytest.mark.parametrize(
    ("refuses", "token", "says"),
    [
        (
            {},
            "hf_wrong",
            "--push_to_hub to me/model: the hub answers 401; log in by `hf auth login`, or set HF_TOKEN, or",
        ),
        (
            {"create": 403},
            Hub.token,
            "the hub answers 403; take a token that may write there, or another name, or leave",
        ),
    ],
)
def test_what_the_hub_refuses_is_known_before_a_model_is_loaded(folder, tmp_path, hub, refuses, token, says):
    hub.refuses = refuses
    flags = flags_for(folder, tmp_path / "out", push_to_hub=True, hub_model_id="me/model")
    status, said = run_alone(flags, tmp_path / "said.txt", on_hub(hub, tmp_path, token))
    assert status == 2
    assert says in said
    assert "Loading weights" not in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_push_that_fails_ends_all_ranks_and_leaves_the_model(folder, tmp_path, hub):
    hub.refuses = {"commit": 413}
    flags = flags_for(folder, tmp_path / "out", push_to_hub=True, hub_model_id="me/model")
    said = on_two_ranks(flags, tmp_path, on_hub(hub, tmp_path), status=2)
    assert f"{TOO_LARGE}; the model is saved: `hf upload me/model {tmp_path}/out`." in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "trainer_state.json").exists()


def exported(capsys, monkeypatch, hub: Hub, *words: str) -> tuple[int, str]:
    """The exit status and the words of `lisa-dist export`."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    try:
        export.main(*words)
    except SystemExit as ended:
        return int(ended.code or 0), "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_an_exported_checkpoint_is_pushed_with_the_card_of_its_run(trained, tmp_path, hub, capsys, monkeypatch):
    words = (str(trained / "checkpoint-2"), str(tmp_path / "out"), "--push_to_hub", "me/model")
    status, said = exported(capsys, monkeypatch, hub, *words)
    assert (status, said.splitlines()[-1]) == (0, "pushed to me/model")
    assert "# me/model\n" in hub.files["README.md"].decode()
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    hub.refuses = {"commit": 413}
    words = (words[0], str(tmp_path / "again"), *words[2:])
    status, said = exported(capsys, monkeypatch, hub, *words)
    assert status == 2
    assert f"me/model: {TOO_LARGE}; the model is saved: `hf upload me/model {tmp_path}/again`." in said
    for words, says in (
        (("a", "b", "--push_to_hub"), "--push_to_hub: give the name of a model of the hub, as --push_to_hub me/b."),
        (("a", "b", "--push"), "--push: what may come after CHECKPOINT OUT is --keep_adapter, and --push_to_hub NAME."),
    ):
        status, said = exported(capsys, monkeypatch, hub, *words)
        assert (status, says in said) == (2, True), said


def test_a_hub_that_cannot_be_reached(trained, tmp_path, hub, capsys, monkeypatch):
    hub.url = "http://127.0.0.1:9"
    status, said = exported(
        capsys, monkeypatch, hub, str(trained / "checkpoint-2"), str(tmp_path / "out"), "--push_to_hub", "me/model"
    )
    assert status == 2
    assert (
        "--push_to_hub me/model: the hub cannot be reached (ConnectError); look at the network, and HF_HUB_OFFLINE"
        in said
    )
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_a_card_has_no_folders_and_no_examples(tmp_path):
    (tmp_path / "lisa_run.json").write_text(json.dumps(CARD))
    (tmp_path / "lisa_steps.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    card = write_card(tmp_path, name="me/x").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/base"
    assert "[someone/base](https://huggingface.co/someone/base), trained by `lisa-dist` (sft)." in card
    assert "- rows.jsonl: question_answer, 5 examples" in card
    assert "--dataset_name rows.jsonl --model_name_or_path someone/base" in card
    assert "mine" not in card
    assert "/home" not in card
