"""A training run: what `launch/train.py` and `lisa-dist train` do once their words are parsed.

Here is the order of a run. TRL's SFTTrainer loads the model and trains.
"""

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import distributed as dist
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, get_peft_config

from lisa_dist.config import LisaConfig
from lisa_dist.core.checkpointing import AUTO, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.data.dataset import Data, DataArguments, describe_examples, load_data
from lisa_dist.data.encoding import set_chat_template
from lisa_dist.distributed.collectives import gather, together
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.ds_config import (
    check_ds_config,
    offload_by_block,
    read_ds_config,
    uses_optimizer_offload,
)
from lisa_dist.errors import SharedError, UserError
from lisa_dist.optim.build import check_optim
from lisa_dist.run_folder import without_secrets, write_run
from lisa_dist.text import format_table
from lisa_dist.train.arguments import (
    LisaOptimizerNames,
    LisaSFTConfig,
    ModelArguments,
    RunArguments,
    run_parser,
)
from lisa_dist.train.attention import PackingCheck, choose_attention, packs_documents
from lisa_dist.train.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.train.liger import check_liger
from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.train.sample_answer import SampleCallback
from lisa_dist.train.trainer import LisaTrainer
from lisa_dist.zero.cpu_ops import release_shared_memory
from lisa_dist.zero.parameters import parameter_numel
from lisa_dist.zero.stage3 import forget_module_order

ALL_LINEAR = "all-linear"  # peft's word
# Flags of TRL's that are for rows which it would tokenize itself, and ours.
_NOT_TAKEN = {
    "dataset_text_field": "--dataset_columns text=COLUMN",
    "truncation_mode": "--long_examples, which cuts texts into several examples",
    "dataset_kwargs": "--dataset_format and --dataset_columns",
}


def run(
    run_args: RunArguments,
    data_args: DataArguments,
    training_args: LisaSFTConfig,
    model_args: ModelArguments,
    lisa_config: LisaConfig,
    argv: Sequence[str] = (),
) -> None:
    """Train and save: arguments checked, data, model, training, the model in `output_dir`. `argv` is for the report."""
    resume_from = _resume_from(training_args.resume_from_checkpoint)
    dial = parse_checkpointed_layers(run_args.checkpointed_layers)
    if run_args.method != "lisa" and dial is not None:  # all or none; which layers fit is planned for LISA alone
        # TRL reads the old name, the Trainer the new one, which it has set by the old before this.
        training_args.gradient_checkpointing = training_args.activation_checkpointing = dial != 0
    _check_arguments(run_args, training_args, model_args, lisa_config)
    if training_args.use_cpu:
        # Accelerate has started gloo, but DeepSpeed must know of it too before a model is loaded under ZeRO-3.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    check_same_everywhere(
        _versions() | _flags(run_args, data_args, training_args, model_args, lisa_config),
        "start every rank with the same environment and the same flags",
    )
    tokenizer = _load_tokenizer(training_args, model_args)
    template = set_chat_template(tokenizer, training_args.chat_template_path)
    attention, why = choose_attention(
        model_args.attn_implementation,
        half_precision=_precision(training_args) != "fp32",
        config=AutoConfig.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        ),
        packed=packs_documents(training_args),
        use_cpu=training_args.use_cpu,
    )
    data = load_rows(data_args, training_args, tokenizer)
    content = {f"the content of --dataset_name {' '.join(data_args.dataset_name)}": describe_examples(data.train)}
    if data.held_out is not None:
        content["the content of the held-out rows"] = describe_examples(data.held_out)
    check_same_everywhere(content, "give every host the same file")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": attention,
        "dtype": model_args.dtype
        or {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[_precision(training_args)],
    } | (training_args.model_init_kwargs or {})
    trainer = _build_trainer(run_args, training_args, model_args, lisa_config, tokenizer, data)
    with together(Path(training_args.output_dir)):
        if trainer.is_world_process_zero():
            flags = _flags(run_args, data_args, training_args, model_args, lisa_config)
            write_run(Path(training_args.output_dir), _record(argv, flags, trainer, data), resumes=bool(resume_from))
    about = (f"{attention} ({why})", template)
    trainer.accelerator.print(_describe_run(run_args, training_args, model_args, lisa_config, *about))
    trainer.accelerator.print("\n".join(["rows", *(f"  {line}" for text in data.lines for line in text.split("\n"))]))

    trainer.train(resume_from_checkpoint=resume_from)
    if getattr(trainer, "stopped_by", None) is not None:
        trainer.accelerator.print(
            f"{trainer.stopped_by}: stopped after step {trainer.state.global_step} and saved; go on with the same "
            "command and --resume_from_checkpoint true"
        )
    else:
        trainer.save_model()
        trainer.save_state()  # losses of every logged step, in trainer_state.json
        trainer.accelerator.print(_describe_outcome(trainer.state.log_history))
        trainer.accelerator.print(f"saved {training_args.output_dir}; load it with from_pretrained")
    # Ranks that simply exit tear down gloo under each other's feet.
    dist.barrier()
    release_shared_memory()
    writes_report = trainer.is_world_process_zero() and getattr(trainer, "stopped_by", None) is None
    trainer.end()
    if writes_report:  # when no other rank waits for this one
        _report(training_args.output_dir)


def _load_tokenizer(training_args: SFTConfig, model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end of a turn that `--eos_token` says."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if training_args.eos_token is not None:
        if training_args.eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {training_args.eos_token}: the tokenizer has no such token.")
        tokenizer.eos_token = training_args.eos_token  # before rows are made of it
    return tokenizer


def _check_arguments(
    run_args: RunArguments, training_args: LisaSFTConfig, model_args: ModelArguments, lisa_config: LisaConfig
) -> None:
    """Check what does not go together before anything is started."""
    for flag, ours in _NOT_TAKEN.items():
        value = getattr(training_args, flag)
        if value != SFTConfig.__dataclass_fields__[flag].default:
            raise UserError(f"--{flag} {value}: has no effect here; use {ours}.")
    if training_args.resume_from_checkpoint == "auto" and run_args.method != "lisa":
        raise UserError(f"--resume_from_checkpoint auto: --method {run_args.method} takes a folder or true.")
    if run_args.method != "lisa" and training_args.optim is LisaOptimizerNames.LISA_ADAMW:
        raise UserError(
            f"--optim lisa_adamw with --method {run_args.method}: it is for --method lisa; "
            "give another, such as adamw_torch_fused."
        )
    if run_args.method == "lisa":
        ds_config = training_args.deepspeed
        ds_config = ds_config if isinstance(ds_config, dict) else read_ds_config(ds_config)
        check_ds_config(ds_config)
        offload_by_block(ds_config, lisa_config.offloaded)
        offload = uses_optimizer_offload(ds_config)
        check_optim(training_args.optim, offload, lisa_config, _precision(training_args))
        _check_layers(run_args, model_args, training_args, lisa_config)


def _build_trainer(
    run_args: RunArguments,
    training_args: LisaSFTConfig,
    model_args: ModelArguments,
    lisa_config: LisaConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> SFTTrainer:
    """The trainer of the method, with the model loaded."""
    arguments = {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": data.train,
        "eval_dataset": data.held_out,
        "processing_class": tokenizer,
    }
    if run_args.method == "lisa":
        trainer = LisaTrainer(
            lisa_config=lisa_config,
            hang_timeout=run_args.hang_timeout,
            checkpointed_layers=run_args.checkpointed_layers,
            gpu_memory=run_args.gpu_memory,
            **arguments,
        )
    else:
        adapters = _adapters(model_args) if run_args.method == "lora" else None
        trainer = _WholeTrainer(peft_config=adapters, **arguments)
    if training_args.bf16 and training_args.use_cpu and not cpu_multiplies_bf16():
        multiply_in_fp32(trainer.model)
    if packs_documents(training_args) and run_args.method != "lisa":  # LisaTrainer has it
        trainer.add_callback(PackingCheck(trainer, after=forget_module_order))
    if run_args.sample_prompt:
        trainer.add_callback(SampleCallback(trainer, run_args.sample_prompt))
    if run_args.layer_norms:
        trainer.add_callback(LayerNorms(run_args.layer_norms, lisa_config.lisa_layers_attribute))
    return trainer


def _adapters(model_args: ModelArguments) -> LoraConfig:
    """What `--lora_*` say; on every linear layer but the head, unless they say otherwise."""
    model_args.use_peft = True  # TRL's word for it
    model_args.lora_target_modules = model_args.lora_target_modules or ALL_LINEAR
    adapters = get_peft_config(model_args)
    model_args.use_peft = False  # as the user gave it, for the report
    return adapters


def _check_layers(
    run_args: RunArguments, model_args: ModelArguments, training_args: SFTConfig, lisa_config: LisaConfig
) -> None:
    """Check what depends on the number of layers before the model is loaded and anything is written."""
    try:
        config = AutoConfig.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    except OSError as error:
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path}: no such folder, and no such model can be reached "
            f"on the hub ({type(error).__name__})."
        ) from error
    if training_args.use_liger_kernel:
        check_liger(training_args, config, lisa_config, trl_head=True)
    num_layers = config.get_text_config().num_hidden_layers
    lisa_config.check_num_layers(num_layers)
    dial = parse_checkpointed_layers(run_args.checkpointed_layers)
    if isinstance(dial, int):
        number_of_layers(dial, num_layers)
    if lisa_config.lisa_weights_file is not None:
        load_layer_weights(lisa_config.lisa_weights_file, num_layers, lisa_config.lisa_activated_layers)


def load_rows(data_args: DataArguments, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The rows of a run as tokens, for TRL to take as they are; all ranks call it, and one of a host does the work."""
    if training_args.completion_only_loss is False:  # TRL's word for it
        data_args.train_on_inputs = True
    ranks, problem = PartialState(), None
    with ranks.main_process_first(), ranks.local_main_process_first():  # the others find what was cached, as in TRL
        try:
            data = load_data(
                data_args,
                tokenizer,
                max_length=training_args.max_length,
                seed=training_args.seed,
                num_proc=training_args.dataset_num_proc,
            )
        except UserError as error:
            problem = str(error)
    problem = next(filter(None, gather(problem)), None)
    if problem is not None:  # on all ranks together: one that ended alone would have the others say that it is gone
        raise SharedError(problem)
    training_args.assistant_only_loss, training_args.completion_only_loss = False, None
    training_args.chat_template_path = None
    return data


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("lisa_dist", "torch", "deepspeed", "transformers", "trl")}


def _flags(*groups) -> dict[str, object]:
    """All flags of a run but those that ranks have for themselves."""
    flags = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else vars(group)
        flags |= {f"--{name}": value for name, value in values.items()}
    return {name: value for name, value in flags.items() if name not in ("--local_rank", "--logging_dir")}


def _resume_from(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint`: true, false, auto or a path."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _record(argv: Sequence[str], flags: dict[str, object], trainer: SFTTrainer, data: Data) -> dict:
    """What the report says of a run: its settings, the command that repeats it, model and rows."""
    args, model = trainer.args, trainer.model
    words = without_secrets(word for word in argv if not word.startswith(("--local_rank", "--resume_from_checkpoint=")))
    if "--resume_from_checkpoint" in words:  # to repeat the run is not to go on with it
        del words[(at := words.index("--resume_from_checkpoint")) : at + 2]
    here = int(os.environ["LOCAL_SIZE"])  # which `set_rank` has made sure of
    start = ["lisa-dist", "train", *(["--gpus", str(here)] if args.world_size > 1 else [])]
    hosts = args.world_size // here
    return {
        "model": str(flags["--model_name_or_path"]),
        "method": flags["--method"],
        "devices": _describe_devices(args),
        "began": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([*start, *words]) + (f"  # by a launcher on {hosts} hosts" if hosts > 1 else ""),
        "given": [f"--{name}" for name in run_parser().given(words)],
        "flags": {name: _plain(value) for name, value in flags.items()},
        "versions": _versions() | {"Python": platform.python_version()},
        "parameters": sum(parameter_numel(parameter) for parameter in model.parameters()),
        "num_layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        "rows": data.lines,
    }


def _plain(value: object) -> object:
    """A flag's value as JSON has it."""
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def _report(folder: str) -> None:
    """The report of a run that has ended; the model is saved already, so a full disk is only told."""
    from lisa_dist.report.html import write_report  # matplotlib is for rank 0, and for the end

    try:
        print(f"wrote {write_report(folder)}", flush=True)
    except (OSError, UserError) as error:
        print(f"{folder}: the report could not be written ({error})", flush=True)


def _describe_devices(args: SFTConfig) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{args.world_size} x {device}, {_precision(args)}"


def _describe_outcome(log_history: list[dict]) -> str:
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    lines = [f"trained in {log_history[-1]['train_runtime']:.0f} s"]
    if len(held_out) > 1:
        (first, before), (last, after) = held_out[0], held_out[-1]
        when = "before" if first == 0 else f"at step {first}"
        lines.append(f"held-out loss {before:.4f} {when}, {after:.4f} {'after' if first == 0 else f'at step {last}'}")
    return "; ".join(lines)


def _describe_adapters(model_args: ModelArguments) -> str:
    named = model_args.lora_target_modules  # one name or several
    where = ", ".join([named] if isinstance(named, str) else named)
    where = "all linear layers but the head" if where == ALL_LINEAR else where
    return f"rank {model_args.lora_r}, alpha {model_args.lora_alpha}, dropout {model_args.lora_dropout}, on {where}"


def _precision(args: SFTConfig) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _describe_run(
    run_args: RunArguments,
    args: SFTConfig,
    model_args: ModelArguments,
    lisa_config: LisaConfig,
    attention: str,
    template: str,
) -> str:
    batch = args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "transformers", "trl"))
    rows = [
        ("method", run_args.method),
        ("model from", str(model_args.model_name_or_path)),
        ("devices", _describe_devices(args)),
        ("attention", attention),
        ("chat template", template),
        *([("adapters", _describe_adapters(model_args))] if run_args.method == "lora" else []),
        ("optimizer", f"{args.optim.value}, learning rate {args.learning_rate}, weight decay {args.weight_decay}"),
        ("rows a step", str(batch)),
        ("versions", versions),
    ]
    given = [name for name, value in lisa_config.to_dict().items() if value != LisaConfig().to_dict()[name]]
    given += ["gpu_memory"] if run_args.gpu_memory is not None else []
    dial = parse_checkpointed_layers(run_args.checkpointed_layers)
    if run_args.method != "lisa" and dial is not None:
        as_said = {0: "no layer", AUTO: "all layers; auto chooses among them with --method lisa alone"}
        rows.append(("checkpointing", as_said.get(dial, "all layers")))
    if run_args.method != "lisa" and given:  # the same recipe may serve to compare methods
        rows.append(("without effect", f"{', '.join(f'--{name}' for name in given)}, which are for --method lisa"))
    fields = ModelArguments.__dataclass_fields__
    given = [name for name in fields if name.startswith("lora_") and getattr(model_args, name) != fields[name].default]
    if run_args.method != "lora" and given:
        rows.append(("without effect", f"{', '.join(f'--{name}' for name in given)}, which are for --method lora"))
    return "run\n" + format_table(rows)


class _WholeTrainer(MonitoredMixin, SFTTrainer):
    """Trains the same parameters in every step, all or adapters; tells of it what a LISA run tells."""
