"""Damaged files of a run: the report is made of the others, and says what it lacks."""

import json
from pathlib import Path

import pytest
from cases import full

from lisa_dist.commands.report import main
from lisa_dist.errors import UserError
from lisa_dist.report.html import write_report
from lisa_dist.report.run_files import read_run
from lisa_dist.run_folder import read_lines, write_run

LOG = [{"step": step, "loss": 2.0, "learning_rate": 1e-5, "tokens_per_second": 10.0} for step in (1, 2, 3)]
PERIODS = [{"period": n, "step": 2 * n, "layers": [n], "state_bytes_per_rank": 1000, "seconds": 0.1} for n in (0, 1)]
MOVEMENT = [{"step": 2, "blocks": {"embed": {"relative": 0.1}, "layers.1": {"relative": 0.2}}}]
RUN = {"command": "lisa-dist train", "began": "now", "method": "lisa", "num_layers": 2, "flags": {"--a": 1}}


@pytest.fixture
def run(tmp_path) -> Path:
    """The files of a small run, none of them damaged."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    (tmp_path / "lisa_run.json").write_text(json.dumps(RUN))
    for name, lines in (("lisa_log.jsonl", PERIODS), ("lisa_movement.jsonl", MOVEMENT)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def log_with(**values: object) -> str:
    """The log, one entry of which has other values."""
    return json.dumps({"log_history": [LOG[0] | values, *LOG[1:]]})


def test_a_run_that_is_whole_has_no_problems(run):
    assert read_run(run).problems == []
    assert "damaged" not in write_report(run).read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("trainer_state.json", log_with(loss=float("nan")), "log_history[0] is damaged: loss is no number"),
        ("trainer_state.json", log_with(step="1"), "log_history[0] is damaged, and left out: step is no whole number"),
        ("trainer_state.json", log_with(train_runtime=1e300), "train_runtime is no number, or far too large"),
        full(
            "trainer_state.json", json.dumps({"log_history": [3, *LOG]}), "[0] is damaged, and left out: it is not an"
        ),
        ("lisa_log.jsonl", "{\n" + json.dumps(PERIODS[0]) + "\n", "line 1 is damaged, and left out: is not JSON"),
        full("lisa_log.jsonl", '{"step": 1}\n', "line 1 is damaged, and left out: layers is not a list"),
        ("lisa_log.jsonl", '{"step": 1, "layers": [1000000000]}\n', "layers[0] is no layer of a model"),
        ("lisa_log.jsonl", '{"step": 1, "layers": [], "blocks": ["$x"]}\n', "blocks[0] is no block"),
        full("lisa_log.jsonl", "[" * 100_000 + "\n", "line 1 is damaged, and left out: is not JSON"),
        ("lisa_movement.jsonl", '{"step": 1, "blocks": {"embed": 3}}\n', "blocks.embed is not an object: 3"),
        ("lisa_run.json", json.dumps(RUN | {"flags": [1]}), "lisa_run.json is damaged: flags is not an object: [1]"),
        ("lisa_run.json", json.dumps(RUN | {"num_layers": 10**9}), "num_layers is no layer of a model"),
        full("lisa_run.json", json.dumps(RUN | {"resumed": [3]}), "resumed[0] is not an object: 3"),
        ("lisa_memory.json", '{"measured": {"peak": "x"}}', "lisa_memory.json: is damaged, and left out: measured."),
    ],
)
def test_what_is_damaged_is_left_out_and_named(run, name, content, said):
    (run / name).write_text(content)
    page = write_report(run).read_text()
    (problem, *more) = read_run(run).problems
    assert said in problem
    assert not more
    assert str(run / name) in problem
    assert "damaged" in page
    assert "<h2>Learning rate</h2>" in page


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"log_history": 3}', "[" * 100_000, "\xff"])
def test_without_the_trainers_log_there_is_no_report(run, content):
    (run / "trainer_state.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"trainer_state\.json: (cannot be read|is damaged)") as error:
        write_report(run)
    assert len(str(error.value).splitlines()) == 1


def test_a_log_that_was_cut_is_read_to_its_last_whole_line(run):
    whole = (run / "lisa_log.jsonl").read_text()
    (run / "lisa_log.jsonl").write_text(whole[:-5])
    assert len(read_run(run).periods) == 1
    assert read_run(run).problems == []
    (run / "lisa_log.jsonl").write_bytes(b"\xff\n" + whole.encode())
    assert len(read_run(run).periods) == 2


def test_braces_in_values_stay_as_they_are(run):
    flags = {"--sample_prompt": "{{flags}} {{title}} {0} \\1", "--half": "\ud800"}
    (run / "lisa_run.json").write_text(json.dumps(RUN | {"command": "lisa-dist train {{versions}}", "flags": flags}))
    page = write_report(run).read_text()
    assert "<td>{{flags}} {{title}} {0} \\1</td>" in page
    assert "lisa-dist train {{versions}}" in page


def test_probabilities_of_other_models_are_not_drawn(run):
    lines = [
        line | {"probabilities": [0.5] * number, "blocks": ["head"] if number == 2 else None}
        for line, number in zip(PERIODS, (2, 3), strict=True)
    ]
    (run / "lisa_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert '<section id="visits">' in write_report(run).read_text()


def test_a_resumed_run_goes_on_over_damaged_files(run, capsys):
    (run / "lisa_log.jsonl").write_text("{}\n" + json.dumps(PERIODS[0]) + "\n")
    assert read_lines(run / "lisa_log.jsonl") == PERIODS[:1]
    assert f"warning: {run / 'lisa_log.jsonl'}: line 1 is damaged, and left out" in capsys.readouterr().out
    (run / "lisa_run.json").write_text(json.dumps(RUN | {"resumed": 3}))
    write_run(run, RUN, resumes=True)
    assert read_run(run).run["resumed"] == [{"began": "now", "command": "lisa-dist train"}]


def test_the_command_says_what_is_damaged(run, capsys):
    (run / "lisa_log.jsonl").write_text("3\n")
    main(str(run))
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {run / 'report.html'}"
    assert said[0] == f"warning: {run / 'lisa_log.jsonl'}: line 1 is damaged, and left out: it is not an object: 3."
