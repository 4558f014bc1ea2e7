"""peers.py of benchmarks/cost: what is started for each trainer, what is said of one that is not there, the table."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.cost import peers
from benchmarks.tables.rows import TABLES
from lisa_dist.errors import UserError


@pytest.fixture
def arguments(tmp_path) -> argparse.Namespace:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return argparse.Namespace(model=str(tmp_path), gamma=3, interval=7, length=64, lr=2e-4, environments=tmp_path)


def settings_of(words: list[str]) -> dict[str, str]:
    """Flags and what follows each."""
    flags = words[words[0] == "train" :]
    assert all(flag.startswith("--") for flag in flags[::2])
    return dict(zip((flag[2:] for flag in flags[::2]), flags[1::2], strict=True))


@pytest.mark.parametrize("trainer", peers.TRAINERS, ids=lambda trainer: trainer.name)
def test_all_trainers_are_asked_for_the_same_work(trainer, arguments, tmp_path):
    words = peers.words_of(trainer, arguments, tmp_path)
    if trainer.peer == "soup-cli":
        config = yaml.safe_load((tmp_path / words[words.index("--config") + 1]).read_text())
        asked = config["training"] | {"model": config["base"]}
        names = ("lr", "weight_decay", "optimizer", "batch_size", "model", "lisa_num_layers", "lisa_interval_steps")
    else:
        asked = settings_of(words)
        model = "model" if trainer.peer == "ms-swift" else "model_name_or_path"
        names = ("learning_rate", "weight_decay", "optim", "per_device_train_batch_size", model)
        of_lisa = {
            peers.OURS: ("lisa_activated_layers", "lisa_interval_steps"),
            "ms-swift": ("lisa_activated_layers", "lisa_step_interval"),
            "llamafactory": ("badam_switch_interval",),  # which has one block
        }
        names += of_lisa[trainer.peer]
        assert (asked["bf16"], asked.get("deepspeed")) == (
            "false",
            "zero2" if trainer.peer == peers.OURS or trainer.ranks > 1 else None,
        )
    wanted = ["0.0002", "0.01", "adamw_torch_fused", "1", str(tmp_path), "3", "7"]
    if trainer.peer == "llamafactory":
        del wanted[-2]
    assert [str(asked[name]) for name in names] == wanted


def test_the_probe_runs_in_the_peers_own_python(tmp_path):
    one, two = (
        next(trainer for trainer in peers.TRAINERS if trainer.peer == "ms-swift" and trainer.ranks == ranks)
        for ranks in (1, 2)
    )
    python = tmp_path / "bin" / "python"
    command = peers.command_of(one, python, Path("record"), 10, ["--x", "1"])
    assert command == [str(python), str(peers.PROBE), "record", "10", "swift.cli.sft", "--x", "1"]
    launched = peers.command_of(two, python, Path("record"), 10, ["--x", "1"])
    assert launched[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert launched[5:] == command[1:]
    assert "PYTHONPATH" not in peers.environment_of(python, tmp_path), "this repository would hide its packages"
    operators = peers.environment_of(python, tmp_path)["TORCH_EXTENSIONS_DIR"]
    assert Path(operators).parent == tmp_path, "what another environment has built is no good"
    assert peers.environment_of(Path(sys.executable))["PYTHONPATH"] == str(peers.ROOT)


def test_a_peer_that_is_not_there(arguments, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(peers.PEERS, "ms-swift", ("no-such-trainer>=1",))
    with pytest.raises(UserError, match=r"ms-swift: pip cannot install it in .*: ERROR: .*no-such-trainer") as raised:
        peers.python_of("ms-swift", arguments.environments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("x\n[rank0]: KeyError: 'a'\n  rank: 0\n  error_file: <N/A>\n", "[rank0]: KeyError: 'a'"),
        ("huggingface_hub.errors.HFError: no\n", "huggingface_hub.errors.HFError: no"),
        ("Killed\n\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_why_a_trainer_ended(output, said):
    assert peers.last_error(output) == said


def test_a_trainer_that_fails_is_not_run_again(arguments, monkeypatch, tmp_path):
    arguments.rounds, arguments.results, ran = 2, tmp_path / "peers.json", []

    def measure(trainer, *_):
        ran.append(trainer.name)
        if trainer.peer != peers.OURS:
            raise UserError(f"{trainer.name}: ImportError: no")
        return {"cpu_seconds_per_step": 1.0}

    monkeypatch.setattr(peers, "measure", measure)
    figures = {"arms": {trainer.name: {"runs": []} for trainer in peers.TRAINERS[:2]}}
    peers.take_turns(list(peers.TRAINERS[:2]), arguments, [], figures)
    assert sorted(ran) == ["lisa_dist", "lisa_dist", "ms-swift"]
    assert json.loads(arguments.results.read_text())["figures"] == {
        "arms": {
            "lisa_dist": {"runs": 2 * [{"cpu_seconds_per_step": 1.0}]},
            "ms-swift": {"runs": [], "not_run": "ms-swift: ImportError: no"},
        }
    }


def test_the_table_of_peers():
    def run(seconds: float, live: float) -> dict:
        return {"cpu_seconds_per_step": seconds, "live_bytes": live, "tokens": 256, "labels": 128}

    ours, theirs = {"peer": peers.OURS, "baseline": "lisa_dist"}, {"peer": "ms-swift", "baseline": "lisa_dist"}
    figures = {
        "versions": {peers.OURS: {peers.OURS: "0.1.0"}, "ms-swift": {"ms-swift": "4.6.0", "torch": "2.13.0"}},
        "arms": {
            "lisa_dist": ours | {"runs": [run(2, 9e8), run(4, 9e8), run(8, 9e8)]},
            "ms-swift": theirs | {"runs": [run(1, 18e8), run(2, 18e8), run(6, 18e8)]},
            "soup": theirs | {"runs": [], "not_run": "soup: ImportError: no"},
        },
    }
    _, first, second, third = TABLES["comparing_peers"].make(figures)
    assert first == ["lisa_dist", "4.00 (2.00 to 8.00)", "1.00", "900", "1.00", "256, 128", "lisa-dist 0.1.0"]
    assert second[1:5] == ["2.00 (1.00 to 6.00)", "0.50", "1,800", "2.00"], "ratios are of runs of the same round"
    assert third[:2] == ["soup", "not run: soup: ImportError: no"]


def test_rows_are_of_one_length(arguments, tmp_path, monkeypatch):
    class Tokenizer:
        """A word is a token, and every turn begins with one."""

        chat_template = "<|im_start|>"

        def __call__(self, text, **_):
            return {"input_ids": text.split()}

        def decode(self, words):
            return " ".join(words)

        def apply_chat_template(self, messages, **_):
            return [word for one in messages for word in ("<|im_start|>", *one["content"].split())]

    monkeypatch.setattr(peers.AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    arguments.length, arguments.dataset = 20, str(tmp_path / "rows.jsonl")
    of_words = {2: 30, 5: 30, 4: 3, 6: 7}  # of a question, and its answer; the last two are too short
    lines = [json.dumps({"question": "q " * asked, "answer": "a " * said}) for asked, said in of_words.items()]
    Path(arguments.dataset).write_text("\n".join(lines))
    found = peers.make_rows(arguments, 2)
    contents = [[len(turn["content"].split()) for turn in row["messages"]] for row in found]
    assert contents == [[3, 5, 9], [3, 2, 12]], "20 tokens with the turns' own; half of them labels first"
    with pytest.raises(UserError, match="2 examples can be cut to --length 20 tokens, and 3 are needed"):
        peers.make_rows(arguments, 3)


TINY_TRAINER = """
import sys, transformers
config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=256)
rows = 2 * [{"input_ids": 8 * [1], "labels": 3 * [-100] + 5 * [1]}, {"input_ids": 6 * [1], "labels": 6 * [1]}]
words = {"max_steps": 9, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
args = transformers.TrainingArguments(sys.argv[1], train_sampling_strategy="sequential", **words)
model = transformers.LlamaForCausalLM(config)
print("parameters", model.num_parameters())
transformers.Trainer(model, args, train_dataset=rows).train()
print("trained on")
"""  # noqa: E501


@pytest.mark.full
def test_what_the_probe_notes(tmp_path):
    (tmp_path / "tiny_trainer.py").write_text(TINY_TRAINER)
    command = [sys.executable, str(peers.PROBE), str(tmp_path / "record"), "4", "tiny_trainer", str(tmp_path / "out")]
    environment = peers.environment_of(Path(sys.executable), tmp_path) | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "record.0").read_text())
    assert run.returncode == 0
    assert "trained on" not in run.stdout, "it ends the run after the last step"
    assert len(found["seconds"]) == 3, "from end to end of four steps"
    assert min(found["seconds"]) > 0
    assert found["batches"] == [[1, 8, 5], [1, 6, 5], [1, 8, 5], [1, 6, 5]], "the first token is not predicted"
    parameters = int(run.stdout.split("parameters ")[1].split()[0])
    assert found["live_bytes"] == pytest.approx(3 * 4 * parameters, rel=0.02), "weights and two moments, no gradients"
