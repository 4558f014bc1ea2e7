"""A run's arguments with a value in the place of all that stands for others: its preset, what is auto, TRL's names.

`--lisa_activated_layers auto` is planned, or on a resume what its run had. `--loss` is one of
logits: of the positions with a label, computed once and kept for the backward pass (`loss/label_logits.py`)
chunked: TRL's own, which computes them in chunks, and again in the backward pass
liger: Liger's, which computes them in chunks, once, and the gradients with them
auto: logits where the plan of a step says that they fit; else Liger's where it runs and fits; else chunked
"""

import copy
import os
from collections.abc import Collection
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.training_args import OptimizerNames
from trl import get_quantization_config

from lisa_dist.checkpoint.folders import checkpoints_by_age
from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import AUTO_LAYERS
from lisa_dist.core.activation_checkpointing import AUTO, parse_budget, parse_checkpointed_layers
from lisa_dist.core.sequence_parallel import check_sequence_parallel
from lisa_dist.distributed.collectives import gather, sharing_errors
from lisa_dist.distributed.health import ranks_of_hosts
from lisa_dist.ds_config import fill_secondary_partitions, given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError
from lisa_dist.loss.chunked import choose_loss_kernels
from lisa_dist.loss.label_logits import why_no_label_logits
from lisa_dist.loss.liger import settle_liger, why_no_liger_loss
from lisa_dist.memory.plan import PlanArguments
from lisa_dist.memory.planner import Planner, with_most_layers
from lisa_dist.memory.workload import CHUNKED, LIGER, LOGITS
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.optim.ops import why_no_compiler
from lisa_dist.presets import OPTIMIZERS, PRESETS, optimizer_of_preset
from lisa_dist.run.arguments import ALL_LINEAR, RunConfig, model_config_of
from lisa_dist.run.task_configs import LisaOptimizerNames
from lisa_dist.run_folder import check_state
from lisa_dist.tasks import SFT, has_reference
from lisa_dist.text import format_bytes
from lisa_dist.train.attention import choose_attention, packs_documents
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.train.step_memory import bytes_of_any_gpu

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HOST_SHARE = 1 / 16  # of a host's memory for the logits of all its ranks, where no budget is given
_DESCRIBED = {
    LOGITS: "logits of the positions with a label, computed once",
    CHUNKED: "logits in chunks, computed twice",
    LIGER: "Liger's, logits in chunks, computed once",
}


class Settled(NamedTuple):
    """A run in which nothing is auto: its arguments as TRL's trainer takes them, and lines of its header."""

    config: RunConfig
    loss: str
    loss_line: str
    attention_line: str
    layers_line: str


def apply_preset(config: RunConfig, given: Collection[str]) -> RunConfig:
    """Return the run with the optimizer of its preset, except the settings of the `given` names."""
    if config.run.method != "lisa":
        return config
    settings = optimizer_of_preset(
        str(config.lisa.lisa_preset),
        given,
        optim=str(getattr(config.training.optim, "value", config.training.optim)),
        ds_config=given_ds_config(config.training.deepspeed),
        offloaded=config.lisa.offloaded,
        in_bf16=precision_of_arguments(config.training) == "bf16",
    )
    training: Any = copy.copy(config.training)
    if (optim := settings.pop("optim", None)) is not None:
        training.optim = LisaOptimizerNames.LISA_ADAMW if optim == LISA_ADAMW else OptimizerNames(optim)
    return config._replace(training=training, lisa=replace(config.lisa, **settings))


def describe_preset(config: RunConfig) -> str:
    """Return the values that the settings of the run's preset have in it."""
    preset, values = str(config.lisa.lisa_preset), vars(config.lisa) | {"optim": config.training.optim}
    named = [*PRESETS[preset], *OPTIMIZERS[preset]]
    return f"{preset}: " + ", ".join(f"{name} {_shown(values[name])}" for name in named)


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)
    return "-" if value in (None, "") else str(value)


def settle(config: RunConfig, resume_from: str | bool | None) -> Settled:
    """Settle checked arguments; every rank calls it, and rank 0 plans. UserError on all ranks where nothing fits."""
    model_config = model_config_of(config)
    _set_what_flags_stand_for(config, model_config)
    training = config.training
    packed = config.run.task == SFT and packs_documents(training)
    attention, reason = choose_attention(
        config.model.attn_implementation,
        half_precision=precision_of_arguments(training) != "fp32",
        config=model_config,
        packed=packed,
        use_cpu=training.use_cpu,
    )
    longest = training.max_length if packed else None
    size, ranks = training.sequence_parallel, training.world_size
    check_sequence_parallel(size, ranks, model_config, attention, config.run.task, longest)
    gpu_bytes = bytes_of_any_gpu(training.device)
    config, layers = settle_layers(config, model_config, resume_from, gpu_bytes)
    loss, why = choose_loss(config, model_config, gpu_bytes)
    _set_for_trl(config, attention)
    return Settled(config, loss, why, f"{attention} ({reason})", layers)


def _set_what_flags_stand_for(config: RunConfig, model_config: PretrainedConfig) -> None:
    method, training = config.run.method, config.training
    if training.deepspeed:  # transformers loads models by the config that was set last, as long as it is alive
        set_hf_deepspeed_config(training.hf_deepspeed_config)
        others = getattr(training, "beta", None), getattr(training, "precompute_ref_log_probs", False)
        loads_two = has_reference(config.run.task, method, *others)
        fill_secondary_partitions(training.hf_deepspeed_config.config, ranks_of_hosts(), loads_two)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if method != "lisa" and checkpointed is not None:  # all or none; which layers fit is planned for LISA alone
        # TRL reads the old name, the Trainer the new one, which it has set by the old before this.
        training.gradient_checkpointing = training.activation_checkpointing = checkpointed != 0
    if config.run.task == SFT and training.completion_only_loss is False:  # TRL's name for it
        config.data.train_on_inputs = True
    if method == "lora":
        model: Any = config.model  # whose targets are names to TRL, and one word to peft
        model.lora_target_modules = model.lora_target_modules or ALL_LINEAR
    if method == "lisa":
        settle_liger(training, model_config, config.lisa)


def _set_for_trl(config: RunConfig, attention: str) -> None:
    """For TRL's trainer, which loads the model and takes rows that are tokens already."""
    training = config.training
    given: Any = training.model_init_kwargs or {}
    loads_by = {
        "revision": config.model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": attention,
        "dtype": config.model.dtype or _DTYPES[precision_of_arguments(training)],
    } | given
    if "kernel_config" not in given:
        # transformers would exchange modules for kernels of the hub wherever the package `kernels` is installed. They
        # cannot be traced by torch.compile, and they would make the results depend on what else is installed.
        loads_by.setdefault("use_kernels", False)
    if config.model.load_in_4bit:
        model_args: Any = copy.copy(config.model)
        model_args.dtype = loads_by["dtype"]  # products are computed in it
        in_4_bits: Any = get_quantization_config(model_args)
        loads_by["quantization_config"] = in_4_bits.to_dict()  # trackers write it as JSON
    if config.run.task == "orpo":
        loads_by["device_map"] = None  # which would be auto, for one process with all GPUs
    training.model_init_kwargs = loads_by
    if config.run.task == SFT:
        training.assistant_only_loss, training.completion_only_loss = False, None
    training.chat_template_path = None


def installed_versions() -> dict[str, str]:
    """Versions of what decides on the numbers of a run."""
    return {name: metadata.version(name) for name in ("lisa_dist", "torch", "deepspeed", "transformers", "trl")}


def check_auto_layers(config: RunConfig) -> None:
    """Raise UserError where a number of layers is to be planned, and what bounds it is not known."""
    given = config.lisa.lisa_activated_layers
    if given != AUTO_LAYERS:
        return
    if not config.training.max_length:
        raise UserError(f"--lisa_activated_layers {given}: give --max_length, which bounds what a step needs.")
    if config.run.gpu_memory is None and not torch.cuda.is_available():
        rule = "there is no GPU to ask for its memory; give --gpu_memory, or a number of layers"
        raise UserError(f"--lisa_activated_layers auto: {rule}.")


def settle_layers(
    config: RunConfig, model_config: PretrainedConfig, resume_from: str | bool | None, gpu_bytes: int | None = None
) -> tuple[RunConfig, str]:
    """The run with a number of layers in the place of auto, and why; every rank calls it, and rank 0 decides.

    What was given is its own reason, the empty one. `gpu_bytes` is what a GPU has for tensors, None on CPUs.
    """
    given = config.lisa.lisa_activated_layers
    if config.run.method != "lisa" or given != AUTO_LAYERS:
        return config, ""
    if config.run.gpu_memory is None and gpu_bytes == 0:
        raise UserError(
            "--lisa_activated_layers auto: the GPU has less free than the 1.5 GiB, or 6%, that are kept for CUDA and "
            "fragments; end what else is on it (nvidia-smi), take another GPU, or give a number of layers."
        )
    settled = config.lisa, ""
    folders = [Path(str(resume_from))] if resume_from not in (None, False) else []
    if resume_from in (True, "auto"):
        folders = checkpoints_by_age(Path(str(config.training.output_dir)))
    with sharing_errors():
        if config.training.process_index == 0:
            settled = _layers_of(config, model_config, folders, gpu_bytes)
    lisa_config, why = gather(settled)[0]
    return config._replace(lisa=lisa_config), why


def _layers_of(
    config: RunConfig, model_config: PretrainedConfig, folders: list[Path], gpu_bytes: int | None
) -> tuple[LisaConfig, str]:
    """The settings with a number of layers, and why it is that; `folders` are the checkpoints to go on from."""
    for folder in folders:
        try:
            layers = int(check_state(folder)["lisa"]["config"]["lisa_activated_layers"])
            return replace(config.lisa, lisa_activated_layers=layers), f"{layers}, as the run had that goes on"
        except (DamagedError, OSError):  # which the resume will tell of
            continue
    training, loss = config.training, config.run.loss
    if config.run.task == SFT and loss == AUTO and _why_not(LOGITS, config, model_config) is not None:
        loss = CHUNKED
    arguments = _plan_arguments(config, loss, gpu_bytes)
    assert arguments is not None  # its memory is known
    ds_config = training.hf_deepspeed_config.config
    return with_most_layers(model_config, arguments, config.lisa, ds_config, on_cpu=training.use_cpu)


def check_loss_of_run(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise UserError for a `--loss`, not auto, that the run cannot have."""
    if (why_not := _why_not(config.run.loss, config, model_config)) is not None:
        raise UserError(f"--loss {config.run.loss}: {why_not}; leave it out.")


def choose_loss(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None = None) -> tuple[str, str]:
    """The loss of a run and the line that says so; every rank calls it, rank 0 decides. `gpu_bytes`: as above."""
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
    if (arguments := _plan_arguments(config, LIGER, gpu_bytes)) is None:
        return None
    ds_config, plans = config.training.hf_deepspeed_config.config, []
    try:
        for loss in (LIGER, CHUNKED):
            plans.append(_planner(config, model_config, replace(arguments, loss=loss)).cheapest(ds_config))
    except UserError:  # nothing of it can be planned
        return None
    liger, chunked = ((plan.lacks(arguments)[0], plan.workload.checkpointed_layers) for plan in plans)
    return f"Liger's needs {format_bytes(plans[0].gpu.needed)}" if liger > chunked else None


def _planner(config: RunConfig, model_config: PretrainedConfig, arguments: PlanArguments) -> Planner:
    return Planner(model_config, arguments, _lisa_config(config), on_cpu=config.training.use_cpu)


def _logits_fit(config: RunConfig, model_config: PretrainedConfig, gpu_bytes: int | None) -> tuple[bool, str]:
    """Whether logits fit beside all else that a step needs, and why."""
    training = config.training
    if not training.max_length:
        return False, "no --max_length bounds the logits"
    arguments = _plan_arguments(config, AUTO, gpu_bytes)
    if arguments is None:
        return _fits_on_the_host(training, model_config)
    try:
        plan, why = _planner(config, model_config, arguments).choose_loss(training.hf_deepspeed_config.config)
    except UserError as error:  # no step of this model, or of this method, can be planned
        return False, str(error).rstrip(".")
    return plan.workload.loss == LOGITS, why.removeprefix("auto: ")


def _plan_arguments(config: RunConfig, loss: str, gpu_bytes: int | None) -> PlanArguments | None:
    """Return what is to be planned, or None if --max_length or the memory of the GPU is unknown."""
    training, checkpointed = config.training, parse_checkpointed_layers(config.run.checkpointed_layers)
    is_lisa = config.run.method == "lisa"
    budget = parse_budget(config.run.gpu_memory, is_kept_to=True) if is_lisa else None
    budget = gpu_bytes if budget is None else budget
    if not training.max_length or budget is None:
        return None
    if not is_lisa or checkpointed is None:
        checkpointed = "all" if training.gradient_checkpointing else "none"
    is_fp32 = config.model.dtype == "float32" or precision_of_arguments(training) == "fp32"
    return PlanArguments(
        str(config.model.model_name_or_path),
        gpus=training.world_size,
        gpus_per_host=int(os.environ.get("LOCAL_SIZE", training.world_size)),
        gpu_memory=f"{budget}B",
        reserve="0",
        seq_length=training.max_length,
        sequence_parallel=training.sequence_parallel,
        activation_offloading=getattr(training, "activation_offloading", False),
        micro_batch_size=training.per_device_train_batch_size,
        method=config.run.method,
        task=config.run.task,
        lora_r=config.model.lora_r,
        lora_modules_to_save=config.model.lora_modules_to_save,
        load_in_4bit=config.model.load_in_4bit,
        use_bnb_nested_quant=config.model.use_bnb_nested_quant,
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
    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _HOST_SHARE)
    why = f"{format_bytes(logits)} of logits, and a sixteenth of the host's memory is {format_bytes(memory)}"
    return logits <= memory, why


def _lisa_config(config: RunConfig) -> LisaConfig:
    """The settings of a run that is LISA's; else the defaults."""
    return config.lisa if config.run.method == "lisa" else LisaConfig.plain()
