"""How a run computes its loss (`--loss`), and why, in a line for its header and its record.

logits: of the positions with a label, computed once and kept for the backward pass (`loss/label_logits.py`)
chunked: TRL's own, which computes them in chunks, and again in the backward pass
liger: Liger's, which computes them in chunks, once, and the gradients with them
auto: logits where the plan of a step says that they fit; else Liger's where it runs and fits; else chunked
"""

import os
from dataclasses import replace
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import AUTO, parse_budget, parse_checkpointed_layers
from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.loss.chunked import choose_loss_kernels
from lisa_dist.loss.label_logits import why_no_label_logits
from lisa_dist.loss.liger import why_no_liger_loss
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.workload import CHUNKED, LIGER, LOGITS
from lisa_dist.optim.ops import why_no_compiler
from lisa_dist.run.arguments import RunConfig
from lisa_dist.tasks import SFT
from lisa_dist.text import format_bytes
from lisa_dist.train.checks import precision_of_arguments

# The share of a host's memory for the logits of all its ranks, where no budget is given.
HOST_SHARE = 1 / 16
_DESCRIBED = {
    LOGITS: "logits of the positions with a label, computed once",
    CHUNKED: "logits in chunks, computed twice",
    LIGER: "Liger's, logits in chunks, computed once",
}


def check_loss_of_run(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise UserError for a `--loss`, not auto, that the run cannot have."""
    if (why_not := _why_not(config.run.loss, config, model_config)) is not None:
        raise UserError(f"--loss {config.run.loss}: {why_not}; leave it out.")


def choose_loss(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None = None) -> tuple[str, str]:
    """The loss of a run and the line that says so; every rank calls it, and rank 0 decides.

    `gpu_bytes` is what a GPU has for tensors, None on CPUs.
    """
    given, training = config.run.loss, config.training
    if config.run.task != SFT:
        return CHUNKED, f"TRL's of {config.run.task}"
    if given != AUTO:
        loss, why = given, f"--loss {given}"
    elif training.label_smoothing_factor:
        loss, why = CHUNKED, "for the metrics: label smoothing has all logits"
    else:
        loss, why = gather(_choose(config, model_config, gpu_bytes) if training.process_index == 0 else ("", ""))[0]
    kernels = choose_loss_kernels()
    return loss, f"{_DESCRIBED[loss]} ({why})" + (f"; by {kernels}" if kernels and loss == CHUNKED else "")


def _why_not(loss: str, config: RunConfig, model_config: PretrainedConfig) -> str | None:
    """Why the run cannot have a loss, or None."""
    training = config.training
    if training.label_smoothing_factor:
        return f"--label_smoothing_factor {training.label_smoothing_factor} has a loss of its own, of all logits"
    if loss == LIGER:
        return why_no_liger_loss(training, model_config, _lisa_config(config))
    if loss == LOGITS and torch.cuda.is_available() and (missing := why_no_compiler()):
        return missing
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    # One that comes with its code is looked at when it is loaded.
    return why_no_label_logits(model_class) if loss == LOGITS and model_class is not None else None


def _choose(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None) -> tuple[str, str]:
    why_not = _why_not(LOGITS, config, model_config)
    if why_not is None:
        fits, why_not = _logits_fit(config, model_config, gpu_bytes)
        if fits:
            return LOGITS, f"auto: {why_not}"
    no_liger = _why_not(LIGER, config, model_config) or _no_room_for_liger(config, model_config, gpu_bytes)
    return (LIGER, f"auto: {why_not}") if no_liger is None else (CHUNKED, f"auto: {why_not}; {no_liger}")


def _no_room_for_liger(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None) -> str | None:
    """Why the loss in chunks is better, for the memory that the head's gradient in fp32 takes; None where it is not."""
    training = config.training
    arguments = plan_arguments(config, LIGER, gpu_bytes) if training.max_length else None
    if arguments is None:
        return None
    ds_config, plans = training.hf_deepspeed_config.config, []
    try:
        for loss in (LIGER, CHUNKED):
            planner = Planner(
                model_config, replace(arguments, loss=loss), _lisa_config(config), on_cpu=training.use_cpu
            )
            plans.append(planner.cheapest(ds_config))
    except UserError:  # nothing of it can be planned
        return None
    liger, chunked = ((plan.lacks(arguments)[0], plan.workload.checkpointed_layers) for plan in plans)
    return f"Liger's needs {format_bytes(plans[0].gpu.needed)}" if liger > chunked else None


def _logits_fit(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None) -> tuple[bool, str]:
    """Whether logits fit beside all else that a step needs, and why."""
    training = config.training
    if not training.max_length:
        return False, "no --max_length bounds the logits"
    arguments = plan_arguments(config, AUTO, gpu_bytes)
    if arguments is None:
        return _fits_on_the_host(training, model_config)
    try:
        planner = Planner(model_config, arguments, _lisa_config(config), on_cpu=training.use_cpu)
        plan, why = planner.choose_loss(training.hf_deepspeed_config.config)
    except UserError as error:  # no step of this model, or of this method, can be planned
        return False, str(error).rstrip(".")
    return plan.workload.loss == LOGITS, why.removeprefix("auto: ")


def possible_losses(config: RunConfig, model_config: PretrainedConfig) -> str:
    """What a plan is to be asked for: the loss of the run, or auto where it may keep logits, or not."""
    given = config.run.loss
    if config.run.task != SFT:
        return AUTO
    return CHUNKED if given == AUTO and _why_not(LOGITS, config, model_config) is not None else given


def plan_arguments(config: RunConfig, loss: str, gpu_bytes: int | None, bounded: bool = True) -> PlanArguments | None:
    """What is to be planned for a run that has a --max_length; None where nobody knows the memory that it may take.

    Without --gpu_memory that is `gpu_bytes`. Unless nothing is asked of that memory: not `bounded`.
    """
    training, checkpointed = config.training, parse_checkpointed_layers(config.run.checkpointed_layers)
    longest = training.max_length
    assert longest  # checked by who calls it
    is_lisa = config.run.method == "lisa"
    budget = parse_budget(config.run.gpu_memory, is_kept_to=True) if is_lisa else None
    budget = gpu_bytes if budget is None else budget
    if budget is None and bounded:
        return None
    if not is_lisa or checkpointed is None:
        checkpointed = "all" if training.gradient_checkpointing else "none"
    is_fp32 = config.model.dtype == "float32" or precision_of_arguments(training) == "fp32"
    return PlanArguments(
        str(config.model.model_name_or_path),
        gpus=training.world_size,
        gpu_memory=f"{1 << 60 if budget is None else budget}B",
        reserve="0",
        seq_length=longest,
        micro_batch_size=training.per_device_train_batch_size,
        method=config.run.method,
        task=config.run.task,
        lora_r=config.model.lora_r,
        optim=getattr(training.optim, "value", training.optim),
        precision="fp32" if is_fp32 else "bf16",  # fp16 takes as much
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        checkpointed_layers=str(checkpointed),
        loss=loss,
    )


def _fits_on_the_host(training: Any, model_config: PretrainedConfig) -> tuple[bool, str]:
    ranks = int(os.environ["LOCAL_SIZE"])  # which `set_rank` has made sure of
    tokens = training.per_device_train_batch_size * training.max_length * ranks
    logits = tokens * model_config.get_text_config().vocab_size * 4  # in fp32
    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * HOST_SHARE)
    return logits <= memory, (
        f"{format_bytes(logits)} of logits, and a sixteenth of the host's memory is {format_bytes(memory)}"
    )


def _lisa_config(config: RunConfig) -> LisaConfig:
    """Of a run that is LISA's; else what says nothing."""
    return config.lisa if config.run.method == "lisa" else LisaConfig()
