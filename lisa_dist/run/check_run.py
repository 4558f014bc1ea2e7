"""The arguments of a run, checked before anything is loaded or written: together, by their files, by the model.

The model is looked at by its configuration alone, before ranks meet.
"""

import copy
import os
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from deepspeed.runtime import lr_schedules
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, get_scheduler
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from trl import SFTConfig, SFTTrainer

from lisa_dist.checkpoint.resume import PICKLE_ERRORS, has_only_weights
from lisa_dist.checkpoint.trainer_checkpoint import newest_trainer_checkpoint
from lisa_dist.config_rules import AUTO_LAYERS, check_load_in_4bit
from lisa_dist.core.activation_checkpointing import AUTO, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.adapters import add_adapters, check_modules_to_save
from lisa_dist.core.blocks import (
    find_blocks,
    model_without_weights,
    number_of_decoder_layers,
    split_into_modules,
    why_not_trained,
)
from lisa_dist.core.engine_checks import check_eval_frozen_bits, prepare_ds_config
from lisa_dist.core.frozen_layers import check_experts
from lisa_dist.core.layer_weights import load_layer_weights, split_columns
from lisa_dist.core.selection import unit_budget
from lisa_dist.core.weight_store import check_store
from lisa_dist.data.dataset import Data
from lisa_dist.data.stream import Stream, check_same_parts, describe_parts, read_stream_state
from lisa_dist.distributed.collectives import sharing_errors
from lisa_dist.ds_config import check_mismatches, given_ds_config
from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError, check_folder, read_json, read_text
from lisa_dist.loss.liger import check_liger
from lisa_dist.run.arguments import DEQUANTIZED, RunConfig, model_config_of, stored_quantization
from lisa_dist.run.settle import check_auto_layers, check_loss_of_run
from lisa_dist.run.task_configs import LisaOptimizerNames
from lisa_dist.run_folder import (
    ADAPTER_FILE,
    RUN_NAME,
    STATE_NAME,
    TRAINER_CHECKPOINT_NAME,
    TRAINER_STATE_NAME,
    check_log_files,
    check_overwrites,
    check_state,
    check_trainer_checkpoint,
    read_object,
)
from lisa_dist.shapes import misfit
from lisa_dist.tasks import GRPO, KTO, REWARD, SFT, refuse_flags_of_sft
from lisa_dist.text import in_one_line, no_such_model
from lisa_dist.train.attention import packs_documents
from lisa_dist.train.checks import (
    check_compile,
    check_parallelism,
    check_precision,
    precision_of_arguments,
)
from lisa_dist.train.resume import check_saved_by_trainer
from lisa_dist.train.sequence_parallel import check_can_share

# TRL flags for data that TRL tokenizes, and the flag to use here.
_NOT_TAKEN = {
    "dataset_text_field": "--dataset_columns text=COLUMN",
    "truncation_mode": "--long_examples, which cuts texts into several examples",
    "dataset_kwargs": "--dataset_format and --dataset_columns",
}
# What transformers takes by --model_init_kwargs too, and the flags by which it is checked.
_FLAGS_OF_LOADING = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}


def check_config(config: RunConfig) -> None:
    """Raise UserError, of one line, for arguments that do not go together, and change none of them."""
    try:
        for check in (_check_flags, _check_files, _check_model):
            check(config)
    except UserError as error:  # with values as they were given, line breaks and all
        raise UserError(in_one_line(error)) from error


def _check_flags(config: RunConfig) -> None:
    """Raise UserError for arguments that do not go together, or not with the DeepSpeed config."""
    method, training = config.run.method, config.training
    if config.run.task == SFT:
        _check_sft(training)
        if training.sequence_parallel > 1:
            check_can_share(SFTTrainer, training, training.sequence_parallel)
        if config.data.streaming and training.max_steps < 1:
            raise UserError("--streaming: a stream has no length; give the number of steps, --max_steps.")
    else:
        _check_task(config)
    for name in _loads_by(config):
        if name in _FLAGS_OF_LOADING:
            raise UserError(f"--model_init_kwargs {name}: give --{_FLAGS_OF_LOADING[name]} in its place.")
    ds_config = given_ds_config(training.deepspeed)
    check_precision(training)
    _check_schedule(training)
    if training.deepspeed:
        _check_filled_ds_config(training)
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    if strategy != "no" and not (config.data.eval_rows or config.data.eval_dataset_name):
        way_out = "give --eval_rows 100, or --eval_dataset_name"
        raise UserError(f"--eval_strategy {strategy}: there are no rows to evaluate; {way_out}.")
    check_compile(training, ds_config, config.lisa if method == "lisa" else None)
    check_eval_frozen_bits(config.run.eval_frozen_bits, config.lisa)
    if config.model.load_in_4bit:
        check_load_in_4bit(method, (ds_config.get("zero_optimization") or {}).get("stage", 0))
    if method != "lisa":
        _check_other_method(config)
        return
    check_parallelism(training)
    check_auto_layers(config)
    prepare_ds_config(ds_config, config.lisa, training.optim, precision_of_arguments(training))
    if config.lisa.frozen_flags:
        given, flag = _loads_by(config), config.lisa.frozen_flags[0]
        check_experts(given.get("experts_implementation"), flag)
        for name in ("use_kernels", "kernel_config"):  # of the hub, in the place of whole modules
            if given.get(name):
                raise UserError(f"{flag} with --model_init_kwargs {name}: such kernels read weights by themselves.")


def _check_other_method(config: RunConfig) -> None:
    method, training = config.run.method, config.training
    for_lisa = f"with --method {method}: it is for --method lisa;"
    if config.lisa.frozen_flags:
        raise UserError(f"{config.lisa.frozen_flags[0]} {for_lisa} leave it out.")
    if training.optim is LisaOptimizerNames.LISA_ADAMW:
        raise UserError(f"--optim lisa_adamw {for_lisa} give another, such as adamw_torch_fused.")


def _check_sft(training: SFTConfig) -> None:
    if packs_documents(training) and training.max_length is None:
        raise UserError("--packing true needs a --max_length: that of the rows which examples share.")
    for flag, ours in _NOT_TAKEN.items():
        value = getattr(training, flag)
        if value != SFTConfig.__dataclass_fields__[flag].default:
            raise UserError(f"--{flag} {value}: has no effect here; use {ours}.")


def _check_task(config: RunConfig) -> None:
    task = config.run.task
    refuse_flags_of_sft(task, vars(config.run) | vars(config.data))
    if task == REWARD and config.run.sample_prompt:
        raise UserError(f"--sample_prompt with --task {task}: a reward model gives scores, not answers; leave it out.")
    training: Any = config.training
    for flag, why in (
        ("label_smoothing_factor", "the loss of this task has none"),
        ("sync_ref_model", "a checkpoint has no reference model, and a resumed run would be another"),
    ):
        if getattr(training, flag, None):
            raise UserError(f"--{flag} {getattr(training, flag)} with --task {task}: {why}; leave it out.")
    if task == KTO and training.per_device_train_batch_size < 2:
        rule = "it compares the rows of a batch; give 2 or more"
        raise UserError(f"--per_device_train_batch_size 1 with --task kto: {rule}.")
    if task == GRPO:  # whose micro-batches are answers, of lengths and in rows that nothing bounds beforehand
        for flag, value, not_taken in (
            ("lisa_activated_layers", config.lisa.lisa_activated_layers, (AUTO_LAYERS,)),
            ("checkpointed_layers", parse_checkpointed_layers(config.run.checkpointed_layers), (AUTO,)),
        ):
            if value in not_taken:
                raise UserError(f"--{flag} {value} with --task {task}: no step of it can be planned; give a number.")


def _check_schedule(training: Any) -> None:
    """Raise UserError for a schedule of the learning rate that cannot be built by its arguments."""
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1.0)
    given = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=dict(given))
    except (ValueError, TypeError, KeyError) as error:
        flags = f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {given}"
        raise UserError(f"{flags}: {in_one_line(error).rstrip('.')}.") from error


def _check_filled_ds_config(training: Any) -> None:
    """Raise UserError if the DeepSpeed config contradicts the arguments, or its scheduler cannot be built."""
    ds_config = copy.deepcopy(training.hf_deepspeed_config)
    if training.max_steps > 0:  # otherwise the Trainer computes the number of steps from the data
        ds_config.fill_match("scheduler.params.total_num_steps", training.max_steps, "max_steps")
        warmup_steps = max(1, training.get_warmup_steps(training.max_steps))
        ds_config.fill_match("scheduler.params.warmup_num_steps", warmup_steps, "warmup_steps")
    check_mismatches(ds_config.mismatches)
    given = ds_config.config.get("scheduler")
    if not given:
        return
    name, settings = str(given.get("type")), given.get("params") or {}
    scheduler = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if scheduler is None:
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise UserError(f"The DeepSpeed config has scheduler.type = {name}, which is unknown. Use one of {known}.")
    settings = {name: 1 if value == "auto" else value for name, value in settings.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    try:
        scheduler(optimizer, **settings)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The DeepSpeed config has a scheduler {name} that cannot be built: {in_one_line(error).rstrip('.')}. "
            "Correct scheduler.params, or remove the section and use --lr_scheduler_type."
        ) from error


_TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "*.model", "*.tiktoken", "tekken.json")


def _loads_by(config: RunConfig) -> dict[str, Any]:
    """Arguments of from_pretrained; JSON of a command line is an object by now."""
    given: Any = config.training.model_init_kwargs
    return given or {}


def _check_files(config: RunConfig) -> None:
    """Raise UserError for a folder or a file that cannot be what its flag says; checkpoints are `check_resume`'s."""
    if not config.training.output_dir:
        raise UserError("--output_dir is empty: give a folder.")
    check_folder("--output_dir", Path(str(config.training.output_dir)))
    _check_model_folder(config)
    if config.run.method == "lisa":
        check_store(config.lisa.lisa_frozen_store)
        if config.lisa.lisa_weights_file is not None:
            read_text("--lisa_weights_file", split_columns(config.lisa.lisa_weights_file)[0])


def _check_model_folder(config: RunConfig) -> None:
    """Raise UserError for a model's folder without configuration, tokenizer or weights, or with damaged ones."""
    folder = Path(str(config.model.model_name_or_path))
    flag = f"--model_name_or_path {config.model.model_name_or_path}"
    try:
        if not folder.is_dir():
            if os.path.lexists(folder):
                raise UserError(f"{flag}: is a file; give the folder of a model.")
            return
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}).") from error
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        rule = "it holds an adapter; merge it into its model first" if adapter else "give the folder of a model"
        raise UserError(f"{flag}: there is no config.json in it; {rule}.")
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{flag}: its adapter is beside it; give what lisa-dist export makes of its checkpoint.")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            read_object(folder / file)
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(f"{flag}: there is no tokenizer in it; save the model's there, by save_pretrained.")
    if not {"variant", "gguf_file"} & _loads_by(config).keys():  # which are files of other names
        _check_weights(folder, flag)


def _check_weights(folder: Path, flag: str) -> None:
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{flag}: there are no weights in it, such as {SAFE_WEIGHTS_NAME}.")
    shards = {found}
    if found.endswith(".json"):
        index = read_object(folder / found)
        if wrong := misfit(index, {"weight_map": dict}) or misfit([*index["weight_map"].values()], [str]):
            raise UserError(f"{folder / found}: is damaged: {wrong}.")
        shards = set(index["weight_map"].values())
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise UserError(f"{flag}: {found} names {shard}, and there is no such file.")
        if not shard.endswith(".safetensors"):
            _check_pickled_weights(folder / shard, flag)
            continue
        try:
            with safe_open(folder / shard, framework="pt"):  # whose header says how long the file must be
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{flag}: {shard} is damaged ({error}).") from error


def _check_pickled_weights(path: Path, flag: str) -> None:
    """Raise UserError if torch refuses a pickle of weights. Nothing in it is run."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except PICKLE_ERRORS as error:
        raise UserError(
            f"{flag}: torch refuses to load {path.name} ({type(error).__name__}). The file is damaged, or contains "
            f"more than tensors. Use a copy of the model with {SAFE_WEIGHTS_NAME}."
        ) from error


def check_resume(wanted: str | bool | None, output_dir: Path, method: str, overwrites: bool = False) -> None:
    """Raise UserError on all ranks for a checkpoint that cannot be resumed, as far as its small files tell.

    So it does for a run that would write over another one without being asked by `overwrites`. All ranks call it: rank
    0's view of the folders counts.
    """
    with sharing_errors():
        if os.environ.get("RANK", "0") != "0":
            return
        try:
            if wanted not in (None, False):
                if (output_dir / RUN_NAME).is_file():
                    read_object(output_dir / RUN_NAME)
                if method == "lisa":
                    _check_lisa(wanted, output_dir)
                else:
                    _check_other(wanted, output_dir, method)
            check_overwrites(str(output_dir), wanted, overwrites)
            check_log_files(output_dir)
        except OSError as error:  # a name that is too long, or a folder that may not be looked into
            raise UserError(f"--resume_from_checkpoint {wanted}: cannot be read ({error.strerror}).") from error


def _check_lisa(wanted: str | bool | None, output_dir: Path) -> None:
    if wanted in (True, "auto"):
        found = _newest(output_dir)
        if found is not None:
            check_saved_by_trainer(*found)
        elif wanted is True:
            raise UserError(
                f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}; leave it "
                "out, or give auto, to begin at step 0."
            )
        return
    folder = Path(str(wanted))
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {folder}: no such folder.")
    if not has_only_weights(folder):  # from which a new run begins
        check_saved_by_trainer(folder, check_state(folder))


def _newest(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that was saved last, and its state."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        try:
            read_json(folder / STATE_NAME)
        except DamagedError:  # passed over with a warning when the run resumes
            continue
        found.append((folder, check_state(folder)))
    return max(found, key=lambda one: one[1]["saved_at"], default=None)


def _check_other(wanted: str | bool | None, output_dir: Path, method: str) -> None:
    """Check a checkpoint of --method full or lora, which is the Trainer's own."""
    last = newest_trainer_checkpoint(output_dir) if wanted in (True, "auto") else Path(str(wanted))
    if last is None and wanted is True:
        raise UserError(
            f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}; leave it out, "
            "or give auto, to begin at step 0."
        )
    if last is None:
        return
    folder = last
    flag = f"--resume_from_checkpoint {folder} with --method {method}"
    if not folder.is_dir():
        raise UserError(f"{flag}: no such folder.")
    if (folder / STATE_NAME).exists():
        raise UserError(
            f"{flag}: it is a checkpoint of --method lisa, which resumes it; to begin from its weights, give what "
            "lisa-dist export makes of it as --model_name_or_path."
        )
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"{flag}: there is no {TRAINER_STATE_NAME} in it; give a checkpoint that a trainer has saved.")
    read_object(folder / TRAINER_STATE_NAME)
    if (folder / TRAINER_CHECKPOINT_NAME).exists():
        ranks, of_run = int(os.environ.get("WORLD_SIZE", 1)), check_trainer_checkpoint(folder)["world_size"]
        if of_run != ranks:
            raise UserError(
                f"{flag}: its run had {of_run} ranks, and this one has {ranks}. DeepSpeed's optimizer states load on "
                f"the same number of ranks only. Start {of_run} ranks."
            )


def check_stream(config: RunConfig, data: Data, wanted: str | bool | None, output_dir: Path) -> None:
    """Raise UserError on all ranks for a checkpoint whose run read its stream in other parts.

    All ranks call it, once the data are loaded and the arguments are settled: rank 0's view of the folders counts.
    """
    training: Any = config.training
    method = config.run.method
    if not isinstance(data.train, Stream) or wanted in (None, False) or training.ignore_data_skip:
        return
    with sharing_errors():
        if os.environ.get("RANK", "0") != "0":
            return
        folder: Path | None = Path(str(wanted))
        if wanted in (True, "auto"):
            newest = _newest(output_dir)
            folder = newest and newest[0] if method == "lisa" else newest_trainer_checkpoint(output_dir)
        state_name = STATE_NAME if method == "lisa" else TRAINER_STATE_NAME
        if folder is not None and (folder / state_name).is_file():  # else a run begins, from the weights in the folder
            ranks = training.world_size // training.sequence_parallel
            parts = ranks, training.dataloader_num_workers, training.train_batch_size
            check_same_parts(read_stream_state(folder, 0), describe_parts(data.train, *parts))


# Sizes in a model's configuration.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def _check_model(config: RunConfig) -> None:
    """Raise UserError for a model that cannot be trained, or not by these arguments."""
    model_config, flag = _known_model_config(config), f"--model_name_or_path {config.model.model_name_or_path}"
    if (why := why_not_trained(model_config, config.run.task)) is not None:
        raise UserError(f"{flag}: {why}.")
    if config.run.loss != AUTO:
        check_loss_of_run(config, model_config)
    stored = stored_quantization(model_config)
    if stored is not None and config.model.load_in_4bit:
        raise UserError(f"{flag} with --load_in_4bit: its weights are quantized already ({stored}). Leave it out.")
    is_loaded = stored is None or (stored == DEQUANTIZED and config.run.task == SFT)
    if not is_loaded and config.run.method != "lora":  # whose adapters train on any weights
        raise UserError(
            f"{flag}: its weights are quantized (quant_method {stored}), and they are what trains; give a model in "
            "bf16, or save this one dequantized."
        )
    if config.run.method == "lora" and config.run.task != REWARD and type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        check_modules_to_save(model_without_weights(model_config), config.model.lora_modules_to_save or ())
    if config.run.method == "lisa":
        _check_layers(config, model_config)
    elif (rank := config.lisa.lisa_adapters) is not None:
        raise UserError(
            f"--lisa_adapters {rank} with --method {config.run.method}: they are beside layers of --method lisa; leave "
            f"it out, or train adapters alone by --method lora --lora_r {rank}."
        )


def _check_layers(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise UserError for layers, or modules of a known architecture, that this model cannot have."""
    lisa_config, num_layers = config.lisa, number_of_decoder_layers(model_config)
    num_active = lisa_config.lisa_activated_layers
    if config.training.use_liger_kernel:
        check_liger(copy.copy(config.training), model_config, lisa_config, trl_head=config.run.task != REWARD)
    if num_active != AUTO_LAYERS:
        lisa_config.check_num_layers(num_layers)
    if lisa_config.by_module and type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = model_without_weights(model_config)
        modules = split_into_modules(model, find_blocks(model, lisa_config.lisa_layers_attribute)).layers
        unit_budget(lisa_config, [module.numel for module in modules])
    if lisa_config.lisa_adapters is not None:
        _check_adapters(config, model_config)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if isinstance(checkpointed, int):
        number_of_layers(checkpointed, num_layers)
    if lisa_config.lisa_weights_file is not None:
        fewest = 1 if num_active == AUTO_LAYERS else num_active
        load_layer_weights(lisa_config.lisa_weights_file, num_layers, fewest)


def _check_adapters(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise UserError for adapters that this model cannot have, or beside what reads weights without them."""
    rank = config.lisa.lisa_adapters
    assert rank is not None
    if config.run.layer_norms:
        rule = "it records weights without their adapters. Give --lisa_preset none, or leave it out"
        raise UserError(f"--layer_norms with --lisa_adapters {rank}: {rule}.")
    if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = model_without_weights(model_config)
        add_adapters(model, find_blocks(model, config.lisa.lisa_layers_attribute), rank)


def _known_model_config(config: RunConfig) -> PretrainedConfig:
    flag = f"--model_name_or_path {config.model.model_name_or_path}"
    try:
        model_config = model_config_of(config)
        sizes = model_config.get_text_config().to_dict()  # some models have one for each layer
        for name in _SIZES:
            if isinstance(size := sizes.get(name), int) and size < 0:
                raise ValueError(f"{name} {size}")
        return model_config
    except OSError as error:
        raise UserError(no_such_model(flag, error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        rule = "its config.json is of no model that can be trained"
        raise UserError(f"{flag}: {rule} ({in_one_line(error)}).") from error
