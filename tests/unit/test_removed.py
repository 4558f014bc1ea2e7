"""Settings of earlier releases, wherever they may still stand: one line each, and none for what did nothing."""

import copy
import inspect
import json
import pickle
from dataclasses import fields, replace

import pytest
from models import tiny_llama

from lisa_dist import LisaConfig, LisaController
from lisa_dist.errors import UserError, naming_flags
from lisa_dist.files import write_json
from lisa_dist.integrations.settings import arguments_of
from lisa_dist.removed import REMOVED
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_resume

# A name and a value of each, other than the old default.
GIVEN = [
    ("lisa_probe_steps", 10),
    ("lisa_depth_bias", 4.0),
    ("lisa_importance", "update"),
    ("lisa_importance_decay", 0.9),
    ("lisa_importance_temperature", 0.2),
    ("lisa_importance_floor", 0.0),
    ("lisa_lr_power", 0.5),
    ("lisa_wake_warmup_steps", 2),
    ("lisa_sampler", "cyclic"),
    ("lisa_sampler", "window"),
    ("lisa_interval_steps", "auto"),
    ("lisa_preset", "lora"),
    ("lisa_activated_layers", "lora"),
]
NAMED = [row for row in GIVEN if row[0] in REMOVED]


def line_of(name: str, value: object) -> str:
    """What is said of a setting, whatever stands before it."""
    found = REMOVED.get(name) or REMOVED[f"{name} {value}"]
    return f"{name} {value}: removed since 0.2.0; {found.instead}".replace("--", "")


def said_by(function, *args, **named) -> str:
    with pytest.raises(UserError, match="removed since") as error:
        function(*args, **named)
    assert "\n" not in str(error.value)
    return str(error.value).replace("--", "")


def test_every_one_is_tried():
    assert {name if name in REMOVED else f"{name} {value}" for name, value in GIVEN} == REMOVED.keys()
    assert not REMOVED.keys() & {field.name for field in fields(LisaConfig)}
    assert len(fields(LisaConfig)) == 22


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_python_is_answered(name, value):
    assert said_by(LisaConfig, **{name: value}).startswith(line_of(name, value))
    assert said_by(replace, LisaConfig.plain(), **{name: value}).startswith(line_of(name, value))


@pytest.mark.parametrize("name", [name for name, _ in NAMED])
def test_python_is_answered_whatever_the_value(name):
    """Who writes a setting can leave it out; of a file that was written long ago the old default is no news."""
    assert line_of(name, REMOVED[name].default) in said_by(LisaConfig, **{name: REMOVED[name].default})


def test_a_config_is_copied_pickled_and_shown_as_ever():
    config = LisaConfig(lisa_sampler="reshuffle", lisa_seed=3)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other == config
    assert list(inspect.signature(LisaConfig).parameters) == [field.name for field in fields(LisaConfig)]


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_a_command_line_is_answered(tmp_path, name, value):
    words = ["--output_dir", str(tmp_path), "--model_name_or_path", "m", "--dataset_name", "d", f"--{name}", str(value)]
    with naming_flags(), pytest.raises(UserError) as error:
        parse_arguments(words)
    assert str(error.value).startswith(f"--{name} {value}: removed since 0.2.0; ")


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_a_recipe_is_answered_before_its_run(tmp_path, name, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\n{name}: {value}\n", encoding="utf-8")
    said = said_by(parse_arguments, ["--config", str(recipe)])
    assert said.startswith(f"config {recipe}: {line_of(name, value)}")


def test_a_recipe_that_writes_old_defaults_out_is_read(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    old = "".join(f"{name}: {REMOVED[name].default}\n" for name, _ in NAMED)
    run = f"output_dir: {tmp_path}\nmodel_name_or_path: m\ndataset_name: d\nuse_cpu: true\ndeepspeed: zero2\n"
    old = old.replace("lisa_importance_floor: 0.2", "lisa_importance_floor: 2e-1")  # a text in YAML, and a number here
    recipe.write_text(f"{run}lisa_seed: 3\n{old}", encoding="utf-8")
    assert parse_arguments(["--config", str(recipe)]).lisa == LisaConfig(lisa_seed=3)


def saved_state(changes: dict) -> dict:
    """A run of release 0.1.0 in the middle of a period, where no other setting may come in."""
    state = LisaController(tiny_llama(), LisaConfig.plain()).state_dict() | {"step": 7, "probed": None, "woken": []}
    state["config"] |= {name: removed.default for name, removed in REMOVED.items() if " " not in name} | changes
    return json.loads(json.dumps(state))


def test_a_checkpoint_with_old_defaults_is_resumed():
    lisa = LisaController(tiny_llama(), LisaConfig.plain())
    lisa.load_state_dict(saved_state({}))
    assert lisa.active_layers == LisaController(tiny_llama(), LisaConfig.plain()).active_layers


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_a_checkpoint_of_a_run_that_used_one_is_refused(tmp_path, name, value):
    """Before anything is loaded, in a run of ours and in a loop of one's own."""
    state = saved_state({name: value})
    said = said_by(LisaController(tiny_llama(), LisaConfig.plain()).load_state_dict, state)
    assert said.startswith(f"the run saved at step 7 had {line_of(name, value)}")
    assert said.endswith("in a new run from its weights, or resume this one by the release that saved it.")
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    files = {key: {"bytes": 0, "sha256": ""} for key in ("trainer_state.json", "scheduler.pt")}
    whole = {"format": 1, "saved_at": 0.0, "versions": {"lisa_dist": "0.1.0"}, "world_size": 1, "files": files}
    write_json(folder / "lisa_state.json", whole | {"lisa": state})
    said = said_by(check_resume, str(folder), tmp_path, "lisa")
    assert said.startswith(f"resume_from_checkpoint {folder}: its run had {line_of(name, value)}")


def test_the_settings_of_other_trainers_are_answered():
    said = said_by(arguments_of, {"lisa_depth_bias": 4}, "LISA_DIST")
    assert said.startswith(f"LISA_DIST: {line_of('lisa_depth_bias', 4)}")
    assert "lisa_sampler window: removed" in said_by(arguments_of, {"lisa_sampler": "window"}, "LISA_DIST")
    assert arguments_of({"lisa_depth_bias": 0.0}, "LISA_DIST") == {"lisa_config": LisaConfig()}
