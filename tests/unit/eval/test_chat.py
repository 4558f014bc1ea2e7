"""`lisa-dist chat`: which model it takes, and what is said."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from lisa_dist.commands.chat import main
from lisa_dist.errors import UserError
from lisa_dist.eval.chat import Chat, find_model, talk
from lisa_dist.eval.model import load_model


def greedy(model, text_ids: torch.Tensor, count: int) -> list[int]:
    """The likeliest words, one forward pass each."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([text_ids, torch.tensor([found], dtype=torch.long)], dim=1)
            found.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    return found


def test_a_turn_is_answered_in_the_light_of_those_before(tiny, capsys):
    model, tokenizer = load_model(tiny)
    model.generation_config.eos_token_id = None
    chat = Chat(model, tokenizer, max_new_tokens=6, temperature=0)
    turns: list[dict] = []
    for text in ("1 + 1?", "and 2 + 2?"):
        turns.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = tokenizer.decode(greedy(model, ids, 6), skip_special_tokens=True).strip()
        assert chat.say(text) == expected
        assert expected in capsys.readouterr().out, "it is printed as it comes"
        turns.append({"role": "assistant", "content": expected})
    chat.turns.clear()
    first = chat.say("1 + 1?")
    assert first == turns[1]["content"], "nothing is remembered"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}),
        ("adapter_config.json", {"task_type": "SEQ_CLS", "base_model_name_or_path": "anywhere"}),
    ],
)
def test_a_reward_model_is_refused(file, content, tmp_path, capsys):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path}: a reward model, which scores texts and writes none" in capsys.readouterr().out


def test_without_a_template_the_text_goes_on(tiny):
    model, tokenizer = load_model(tiny)
    tokenizer.chat_template, model.generation_config.eos_token_id = None, None
    ids = tokenizer("once", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, 4), skip_special_tokens=True).strip()
    assert Chat(model, tokenizer, max_new_tokens=4, temperature=0).say("once") == expected


def test_lines_are_said_and_commands_are_not(capsys):
    chat = SimpleNamespace(turns=["before"], said=[])
    chat.say = lambda text: chat.said.append((text, len(chat.turns)))
    no_text = b"hi\xff\n".decode("utf-8", "surrogateescape")
    talk(chat, ["hello\n", "\n", "/reset\n", "/what\n", no_text, "/exit\n", "never\n"], lambda: None)
    assert chat.said == [("hello", 1), ("hi\ufffd", 0)]
    assert "/reset begins anew" in capsys.readouterr().out


def test_of_a_run_its_model_or_its_newest_checkpoint(tiny, tmp_path):
    assert find_model(tiny) == tiny
    assert find_model("org/of-the-hub") == "org/of-the-hub"
    for step in (5, 40, 100):
        shutil.copytree(tiny, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()
    assert find_model(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no model in it and no checkpoint"):
        find_model(str(tmp_path / "empty"))


def test_the_command(tiny, monkeypatch, capsys):
    said = []
    for seed in ("0", "0", "1"):
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1?\n/exit\n"))
        main([tiny, "--max_new_tokens", "12", "--seed", seed])
        said.append(capsys.readouterr().out)
    assert said[0].startswith(f"{tiny}; /reset begins anew")
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: an answer has 1 token or more"),
        (["--temperature", "-1"], "--temperature -1.0: is not negative"),
        (["--dtype", "float99"], "--dtype float99: unknown"),
        (["--model", "no/such"], "no/such: no such folder, and no such model"),
    ],
)
def test_what_cannot_be_asked(tiny, capsys, words, refused):
    with pytest.raises(SystemExit) as ended:
        main([*(() if "--model" in words else (tiny,)), *words])
    assert ended.value.code == 2
    assert capsys.readouterr().out.startswith(f"lisa-dist chat: {refused}")


def test_more_than_the_context_is_refused_and_forgotten(tiny, capsys):
    model, tokenizer = load_model(tiny)
    chat = Chat(model, tokenizer, max_new_tokens=model.config.max_position_embeddings, temperature=0)
    talk(chat, ["hello\n"], lambda: None)
    assert re.search(r"\d+ tokens were said, and the model's context has \d+", capsys.readouterr().out)
    assert chat.turns == []


def test_an_interrupt_ends_the_answer_alone():
    said = []

    def say(text):
        said.append(text)
        raise KeyboardInterrupt

    talk(SimpleNamespace(say=say), ["one\n", "two\n"], lambda: None)
    assert said == ["one", "two"]
