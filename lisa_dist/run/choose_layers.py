"""`--lisa_activated_layers auto` and `lora` of a run: planned at its beginning, and on a resume what its run had."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lisa_dist.checkpoint.folders import checkpoints_by_age
from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS, LORA_LAYERS, PLANNED_LAYERS
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.distributed.collectives import gather, raise_shared
from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError
from lisa_dist.memory.planner import fewest_of_lora, with_most_layers
from lisa_dist.memory.trace import PlanError
from lisa_dist.run.arguments import RunConfig
from lisa_dist.run.choose_loss import plan_arguments, possible_losses
from lisa_dist.run_folder import check_state


def check_auto_layers(config: RunConfig) -> None:
    """Raise UserError where a number of layers is to be planned, and what bounds it is not known."""
    given = config.lisa.lisa_activated_layers
    if given not in PLANNED_LAYERS:
        return
    if not config.training.max_length:
        raise UserError(f"--lisa_activated_layers {given}: give --max_length, which bounds what a step needs.")
    if given == AUTO_LAYERS and config.run.gpu_memory is None and not torch.cuda.is_available():
        raise UserError(
            "--lisa_activated_layers auto: there is no GPU to ask for its memory; give --gpu_memory, or a number of "
            "layers."
        )


def settle_layers(
    config: RunConfig, model_config: PretrainedConfig, resume_from: str | bool | None, gpu_bytes: int | None = None
) -> tuple[RunConfig, str]:
    """The run with a number of layers in the place of auto or lora, and why; every rank calls it, and rank 0 decides.

    What was given is its own reason, the empty one. `gpu_bytes` is what a GPU has for tensors, None on CPUs.
    """
    if config.run.method != "lisa" or config.lisa.lisa_activated_layers not in PLANNED_LAYERS:
        return config, ""
    if config.lisa.lisa_activated_layers == AUTO_LAYERS and config.run.gpu_memory is None and gpu_bytes == 0:
        raise UserError(
            "--lisa_activated_layers auto: the GPU has less free than the 1.5 GiB, or 6%, that are kept for CUDA and "
            "fragments; end what else is on it (nvidia-smi), take another GPU, or give a number of layers."
        )
    settled, problem = (config.lisa, ""), None
    folders = _checkpoints(resume_from, Path(str(config.training.output_dir)))
    if config.training.process_index == 0:
        saved = _saved_layers(folders)
        try:
            settled = (
                _with_saved(config.lisa, saved) if saved is not None else _planned(config, model_config, gpu_bytes)
            )
        except PlanError as error:  # the model's own code does not run on fake tensors
            if config.lisa.lisa_activated_layers == LORA_LAYERS:
                settled = _fewest(config.lisa, model_config, str(error))
            else:
                problem = str(error)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    lisa_config, why = gather(settled)[0]
    return config._replace(lisa=lisa_config), why


def _planned(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None) -> tuple[LisaConfig, str]:
    losses, training = possible_losses(config, model_config), config.training
    arguments = plan_arguments(config, losses, gpu_bytes, bounded=config.lisa.lisa_activated_layers == AUTO_LAYERS)
    assert arguments is not None  # its memory is known
    ds_config = training.hf_deepspeed_config.config
    return with_most_layers(model_config, arguments, config.lisa, ds_config, on_cpu=training.use_cpu)


def _fewest(lisa_config: LisaConfig, model_config: PretrainedConfig, why: str) -> tuple[LisaConfig, str]:
    layers = fewest_of_lora(number_of_decoder_layers(model_config))
    return replace(lisa_config, lisa_activated_layers=layers), f"lora: {layers}, since no step can be planned: {why}"


def _with_saved(lisa_config: LisaConfig, layers: int) -> tuple[LisaConfig, str]:
    return replace(lisa_config, lisa_activated_layers=layers), f"{layers}, as the run had that goes on"


def _checkpoints(resume_from: str | bool | None, output_dir: Path) -> list[Path]:
    """Those that the run may go on from, the newest first; every rank calls it."""
    if resume_from in (None, False):
        return []
    return checkpoints_by_age(output_dir) if resume_from in (True, "auto") else [Path(str(resume_from))]


def _saved_layers(folders: list[Path]) -> int | None:
    """The number of the run that is resumed; None where none is, or none of its checkpoints can be read."""
    for folder in folders:
        try:
            return int(check_state(folder)["lisa"]["config"]["lisa_activated_layers"])
        except (DamagedError, OSError):  # which the resume will tell of
            continue
    return None
