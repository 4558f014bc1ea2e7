"""`--lisa_activated_layers auto` of a run: planned at its beginning, and on a resume what its run had."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lisa_dist.checkpoint.folders import checkpoints_by_age
from lisa_dist.config import AUTO_LAYERS, LisaConfig
from lisa_dist.core.checkpointing import AUTO, parse_checkpointed_layers
from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError
from lisa_dist.memory.planner import with_most_layers
from lisa_dist.run_folder import check_state
from lisa_dist.train.arguments import RunConfig
from lisa_dist.train.loss import plan_arguments, possible_losses


def check_auto_layers(config: RunConfig) -> None:
    """Raise UserError where a number of layers is to be planned, and what bounds it is not known."""
    if config.lisa.lisa_activated_layers != AUTO_LAYERS:
        return
    if not config.training.max_length:
        raise UserError("--lisa_activated_layers auto: give --max_length, which bounds what a step needs.")
    if config.run.gpu_memory is None and not torch.cuda.is_available():
        raise UserError(
            "--lisa_activated_layers auto: there is no GPU to ask for its memory; give --gpu_memory, or a number of "
            "layers."
        )


def settle_layers(config: RunConfig, model_config: PretrainedConfig, resume_from: str | bool | None) -> RunConfig:
    """The run with a number of layers in the place of auto; every rank calls it, and rank 0 decides."""
    if config.run.method != "lisa" or config.lisa.lisa_activated_layers != AUTO_LAYERS:
        return config
    settled, problem = config.lisa, None
    if config.training.process_index == 0:
        saved = _saved_layers(resume_from, Path(str(config.training.output_dir)))
        try:
            settled = _with_saved(config.lisa, saved) if saved is not None else _planned(config, model_config)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    run = config.run
    if parse_checkpointed_layers(run.checkpointed_layers) != AUTO:  # nothing else keeps to it
        run = replace(run, gpu_memory=None)
    return config._replace(lisa=gather(settled)[0], run=run)


def _planned(config: RunConfig, model_config: PretrainedConfig) -> LisaConfig:
    arguments, training = plan_arguments(config, possible_losses(config, model_config)), config.training
    assert arguments is not None  # its memory is known
    ds_config = training.hf_deepspeed_config.config
    return with_most_layers(model_config, arguments, config.lisa, ds_config, on_cpu=training.use_cpu)


def _with_saved(lisa_config: LisaConfig, layers: int) -> LisaConfig:
    return LisaConfig(**lisa_config.to_dict() | {"lisa_activated_layers": layers})


def _saved_layers(resume_from: str | bool | None, output_dir: Path) -> int | None:
    """The number of the run that is resumed; None where none is, or none of its checkpoints can be read."""
    if resume_from in (None, False):
        return None
    folders = checkpoints_by_age(output_dir) if resume_from in (True, "auto") else [Path(str(resume_from))]
    for folder in folders:
        try:
            return int(check_state(folder)["lisa"]["config"]["lisa_activated_layers"])
        except (DamagedError, OSError):  # which the resume will tell of
            continue
    return None
