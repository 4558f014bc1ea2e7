"""Settings of LISA in the places of other programs; the programs themselves are in tests/plugins."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from lisa_dist.config import LisaConfig, UserError
from lisa_dist.integrations import settings
from lisa_dist.integrations.settings import arguments_of, check_host
from lisa_dist.removed import REMOVED


def test_settings_are_those_of_the_mixin():
    found = arguments_of({"lisa_activated_layers": 3, "checkpointed_layers": "none", "save_async": True}, "here")
    assert found == {
        "lisa_config": LisaConfig(lisa_activated_layers=3),
        "checkpointed_layers": "none",
        "save_async": True,
    }
    with pytest.raises(UserError, match=r"here: lisa_samplr: no such setting; did you mean lisa_sampler\?"):
        arguments_of({"lisa_samplr": "balanced"}, "here")
    with pytest.raises(UserError, match="lisa_sampler x: unknown"):
        arguments_of({"lisa_sampler": "x"}, "here")


@pytest.mark.parametrize(("there", "fits"), [("0.19.3", True), ("0.18.0", False), ("0.20.0", False)])
def test_a_host_of_another_version_is_refused(monkeypatch, there, fits):
    monkeypatch.setattr(settings, "version", lambda name: there)
    if fits:
        check_host("axolotl", ">=0.19,<0.20")
        return
    with pytest.raises(UserError, match=f"axolotl {there}: lisa_dist's plugin is for axolotl>=0.19,<0.20; install one"):
        check_host("axolotl", ">=0.19,<0.20")


@pytest.mark.parametrize(("plugin", "host"), [("axolotl", "axolotl"), ("ms_swift", "ms-swift")])
def test_its_version_is_looked_at_before_anything_of_a_host_is_imported(monkeypatch, plugin, host):
    """Names may have moved there; that would be an ImportError of no use."""
    with pytest.raises(SystemExit, match=f"^lisa_dist: {host} 99.0: lisa_dist's plugin is for {host}>="):
        imported_beside(monkeypatch, {}, plugin, "99.0")


def test_every_setting_is_a_key_of_axolotl_s():
    fields = settings.LisaArgs.model_fields
    assert {*fields, "lisa_layers_attribute"} == {*LisaConfig.__dataclass_fields__, *settings.OF_MIXIN}
    assert settings.LisaArgs(lisa_activated_layers=2).lisa_activated_layers == 2


def imported_beside(monkeypatch, modules: dict, plugin: str, there: str):
    """A plugin, imported anew where a host of this version has these modules."""
    monkeypatch.setattr(settings, "version", lambda name: there)
    for name, contents in modules.items():
        monkeypatch.setitem(sys.modules, name, contents)
    monkeypatch.delitem(sys.modules, f"lisa_dist.integrations.{plugin}", raising=False)
    return importlib.import_module(f"lisa_dist.integrations.{plugin}")


@pytest.fixture
def ms_swift(monkeypatch):
    """The plugin in an ms-swift that has two trainers and nothing else."""
    theirs = {"causal_lm": "swift.trainers.Seq2SeqTrainer", "dpo": "swift.rlhf_trainers.DPOTrainer"}
    trainers, arguments = dict(theirs), dict(theirs)
    factory = SimpleNamespace(TRAINER_MAPPING=trainers, TRAINING_ARGS_MAPPING=arguments)
    modules = dict.fromkeys(("swift", "swift.trainers"), SimpleNamespace())
    modules |= {"swift.trainers.trainer_factory": SimpleNamespace(TrainerFactory=factory)}
    plugin = imported_beside(monkeypatch, modules, "ms_swift", "4.6.0")
    ours = "lisa_dist.integrations.ms_swift_trainer"
    assert trainers == theirs | {"causal_lm": f"{ours}.LisaSeq2SeqTrainer"}
    assert arguments == theirs | {"dpo": f"{ours}.NotByLisa"}

    def settings_of(variable: str):
        monkeypatch.setenv("LISA_DIST", variable)
        args = SimpleNamespace(tuner_type="full", lisa_activated_layers=3, lisa_step_interval=7)
        return plugin.settings_of(args)

    return settings_of


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("[1]", "LISA_DIST: must hold names and values"),
        ("{lisa: [", "LISA_DIST: is not YAML"),
        ("{lisa_interval_steps: 5}", "LISA_DIST: lisa_interval_steps: ms-swift has a flag for it"),
        ("{lisa_n_layers: 5}", "LISA_DIST: lisa_n_layers: no such setting; here it is lisa_activated_layers"),
    ],
)
def test_ms_swift_s_settings(ms_swift, variable, problem):
    config = LisaConfig(lisa_sampler="balanced", lisa_activated_layers=3, lisa_interval_steps=7)
    assert ms_swift("{lisa_sampler: balanced}") == {"lisa_config": config}
    with pytest.raises(UserError, match=problem):
        ms_swift(variable)


class Keys(dict):
    """Keys of Axolotl, of which those that are not given are None."""

    def __missing__(self, name):
        return None

    __getattr__ = dict.__getitem__


@pytest.fixture
def axolotl(monkeypatch):
    """The plugin in an Axolotl that has its base classes and nothing else."""
    modules = dict.fromkeys(("axolotl", "axolotl.core", "axolotl.integrations"), SimpleNamespace())
    for name, contents in {"core.trainers": "AxolotlTrainer", "integrations.base": "BasePlugin"}.items():
        modules[f"axolotl.{name}"] = SimpleNamespace(**{contents: type(contents, (), {})})
    return imported_beside(monkeypatch, modules, "axolotl", "0.19.0").LisaPlugin()


# A removed setting, or the value of one, by name.
GONE = [tuple(name.split()) if " " in name else (name, "7") for name in REMOVED]


@pytest.mark.parametrize(("name", "value"), GONE)
def test_a_removed_setting_gets_the_line_of_the_command_line(axolotl, ms_swift, name, value):
    instead = (REMOVED.get(name) or REMOVED[f"{name} {value}"]).instead
    line = f"--{name} {value}: removed since 0.2.0; {instead}."
    with pytest.raises(SystemExit) as ended:
        axolotl.register(Keys({name: value}))
    assert str(ended.value) == f"lisa_dist: the configuration: {line}"
    if name in ("lisa_interval_steps", "lisa_activated_layers"):  # flags of ms-swift's own
        return
    with pytest.raises(UserError) as error:
        ms_swift(f"{{{name}: '{value}'}}")
    assert str(error.value) == f"LISA_DIST: {line}"


def test_a_removed_setting_with_its_old_default_is_left_out(axolotl):
    axolotl.register(Keys({name: removed.default for name, removed in REMOVED.items() if " " not in name}))
