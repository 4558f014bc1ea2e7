"""The record of a run for its report, lisa_run.json: settings, the command that repeats it, model and data."""

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from lisa_dist.core.blocks import find_blocks, split_into_modules
from lisa_dist.run_folder import without_secrets
from lisa_dist.train.arguments import RunConfig, run_parser
from lisa_dist.train.run_header import describe_devices, installed_versions
from lisa_dist.zero.parameters import parameter_numel


def record_of_run(
    config: RunConfig, words: Sequence[str], model: Any, data: Sequence[str], loss: str
) -> dict[str, Any]:
    """The content of lisa_run.json; `words` are those of the command line, `data` describes the examples in lines.

    `loss` is how the loss is computed, and why.
    """
    words = without_secrets(
        word for word in words if not word.startswith(("--local_rank", "--resume_from_checkpoint="))
    )
    if "--resume_from_checkpoint" in words:  # to repeat the run is not to resume it
        del words[(at := words.index("--resume_from_checkpoint")) : at + 2]
    ranks, here = config.training.world_size, int(os.environ["LOCAL_SIZE"])  # which `set_rank` has made sure of
    start = ["lisa-dist", "train", *(["--gpus", str(here)] if ranks > 1 else [])]
    hosts, flags = ranks // here, config.flags()
    return {
        "model": str(config.model.model_name_or_path),
        "method": config.run.method,
        "task": config.run.task,
        "devices": describe_devices(config.training),
        "loss": loss,
        "began": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([*start, *words]) + (f"  # by a launcher on {hosts} hosts" if hosts > 1 else ""),
        "given": [f"--{name}" for name in run_parser(config.run.task).given(words)],
        "flags": {name: _plain(value) for name, value in flags.items()},
        "versions": installed_versions() | {"Python": platform.python_version()},
        "parameters": sum(parameter_numel(parameter) for parameter in model.parameters()),
        "num_layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "rows": list(data),
        **_modules_of(config, model),
    }


def _modules_of(config: RunConfig, model: Any) -> dict[str, list[str]]:
    """With --lisa_unit module the names of the modules, which the log has by number."""
    if config.run.method != "lisa" or not config.lisa.by_module:
        return {}
    blocks = split_into_modules(model, find_blocks(model, config.lisa.lisa_layers_attribute))
    return {"modules": [block.name for block in blocks.layers]}


def _plain(value: object) -> object:
    """A flag's value as JSON has it."""
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)
