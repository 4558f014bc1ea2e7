"""The arguments of a run, checked where they are made; and the screen of `lisa-dist train --help`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig
from trl import ModelConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.activation_checkpointing import AUTO, parse_budget, parse_checkpointed_layers
from lisa_dist.data.dataset import DataArguments
from lisa_dist.definitions import setting
from lisa_dist.distributed.ranks import check_port, set_rank
from lisa_dist.distributed.watchdog import HANG_TIMEOUT
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser, task_of
from lisa_dist.flags import run_parser as parser_of_task
from lisa_dist.loss.label_logits import check_loss
from lisa_dist.model_names import HUB_IDS
from lisa_dist.presets import default_rate, trains_adapters_alone, with_preset
from lisa_dist.run.task_configs import CONFIGS, LisaSFTConfig, check_ranges
from lisa_dist.run_folder import hide_secrets
from lisa_dist.tasks import SFT, TASKS, check_rewards_given, check_task
from lisa_dist.text import split_names

METHODS = ("lisa", "full", "lora")
DEQUANTIZED = "mxfp4"  # what gpt-oss is stored by, and is loaded from in 16 bits
ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head


@dataclass
class RunArguments:
    """What to train, and how."""

    method: str = setting(
        "lisa",
        "lisa, full to train every parameter in every step, or lora to train adapters "
        "(--lora_r, --lora_alpha, --lora_dropout, --lora_target_modules).",
    )
    task: str = setting(SFT, "; ".join(f"{name}: {task.what}" for name, task in TASKS.items()) + ".")
    reward_funcs: list[str] | None = setting(
        None,
        "With --task grpo, one or several: rewards.py for the function reward in it, rewards.py:name for "
        "another, a folder with a reward model, or a name of trl.rewards, such as think_format_reward.",
    )
    overwrite_output_dir: bool = setting(
        False,
        "Begin in an --output_dir that has the model or the checkpoints of another run, which go; without "
        "it such a run is refused.",
    )
    sample_prompt: list[str] | None = setting(None, "Prompts to answer before and after training, printed on rank 0.")
    checkpointed_layers: str | None = setting(
        None,
        "Gradient checkpointing: none, all, a number of decoder layers, or auto for the fewest that the "
        "GPU's memory is enough for. Other methods than lisa take none and all, and auto as all. Left out, "
        "--gradient_checkpointing decides.",
    )
    gpu_memory: str | None = setting(
        None,
        "Memory for --checkpointed_layers auto and --lisa_activated_layers auto, such as 22GiB; by default "
        "what the GPU has free but 1.5 GiB, or 6 percent.",
    )
    loss: str = setting(
        AUTO,
        "How the loss is computed: logits (of the positions with a label, kept for the backward pass), "
        "chunked (TRL's, computed again there), liger, or auto: logits where they fit, else liger where it runs.",
    )
    save_async: bool = setting(
        False,
        "With --method lisa: write checkpoints while training goes on, which waits for the copies of what "
        "has changed on the host alone.",
    )
    eval_frozen_bits: int | None = setting(
        None,
        "With --lisa_frozen_bits 8, 4 or fp8: 16 evaluates with the originals of frozen layers, copied in one "
        "matrix at a time; by default with what the device has.",
    )
    hang_timeout: float = setting(
        HANG_TIMEOUT, "Seconds without a step after which a run is ended, naming the rank that hangs; 0 for never."
    )
    layer_norms: int = setting(
        0, "Record the norms of each block's weights and updates in every N-th step, for lisa-dist norms; 0 for never."
    )

    def __post_init__(self) -> None:
        for name in ("sample_prompt", "reward_funcs"):
            if isinstance(given := getattr(self, name), str):  # as a recipe has one
                setattr(self, name, [given])
        check_task(self.task)
        check_rewards_given(self.task, self.reward_funcs)
        if self.method not in METHODS:
            raise UserError(f"--method {self.method}: unknown; choose one of {', '.join(METHODS)}.")
        checkpointed = parse_checkpointed_layers(self.checkpointed_layers)
        if self.method != "lisa" and isinstance(checkpointed, int) and checkpointed > 0:
            raise UserError(
                f"--checkpointed_layers {self.checkpointed_layers} with --method {self.method}: a number of layers is "
                "for --method lisa; give none or all."
            )
        parse_budget(self.gpu_memory, is_kept_to=True)
        check_loss(self.loss)
        check_ranges(self)


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig; weights are loaded in the precision of the run unless `--dtype` says otherwise."""

    dtype: str | None = setting(None, "Precision to load the weights in.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora_modules_to_save = split_names(self.lora_modules_to_save)
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is missing: give a folder or a model of the hub.")
        if self.model_name_or_path in HUB_IDS and not os.path.isdir(self.model_name_or_path):
            raise UserError(
                f"--model_name_or_path {self.model_name_or_path}: a name that init and plan know; the model is "
                f"{HUB_IDS[self.model_name_or_path]}."
            )
        for flag, instead in (("use_peft", "give --method lora"), ("load_in_8bit", "give --load_in_4bit")):
            if getattr(self, flag):
                raise UserError(f"--{flag} True: it is not supported; {instead}.")
        known = self.dtype in (None, "auto") or isinstance(getattr(torch, str(self.dtype), None), torch.dtype)
        if not known:
            raise UserError(f"--dtype {self.dtype}: unknown; give auto or a name of torch's, such as bfloat16.")
        check_ranges(self)
        targets = self.lora_target_modules or []
        targets = [targets] if isinstance(targets, str) else targets
        if "lm_head" in targets:
            raise UserError(
                f"--lora_target_modules {' '.join(targets)}: TRL computes the loss from the head's "
                "matrix alone, so that lm_head can have no adapter; --lora_modules_to_save lm_head trains a copy of it."
            )


# Besides the training arguments of the task. The command line reads these names from the source of this module.
ARGUMENTS = (RunArguments, DataArguments, LisaConfig, ModelArguments)
USAGE = "lisa-dist train recipe.yaml [--gpus N] [--any_flag value ...]"
# The screen of --help; what is not here is in --help_all.
HELP = {
    "What is trained, on what": {
        "method": "lisa; full: every parameter, always; lora: adapters",
        "task": "sft, dpo, kto, orpo, reward, grpo: each has a help of its own",
        "model_name_or_path": "folder, or model of the hub",
        "dataset_name": "files, folders, datasets of the hub; name#1000: so many of them",
        "dataset_weights": "one for each: 2 takes its examples twice an epoch, 0.5 half of them",
        "dataset_format": "alpaca, sharegpt, messages, ...; by default from the columns",
        "dataset_columns": "what columns are: question=QUESTION answer=LONG_ANSWER",
        "eval_dataset_name": "held-out examples, as --dataset_name",
        "eval_rows": "hold out so many examples, or below 1 this part of them",
        "train_on_inputs": "prompts count for the loss too",
        "chat_template_path": "a .jinja file or a tokenizer, in place of the model's own",
        "max_length": "tokens of the longest example",
        "long_examples": "longer ones: truncate, drop, or auto (texts are split)",
        "skip_bad_rows": "leave out invalid examples in place of an error",
        "packing": "several examples in one sequence, which never see each other",
    },
    "LISA": {
        "lisa_preset": "adapters (default if no flag asks for sampling), paper, none",
        "lisa_adapters": "rank of LoRA adapters that train in every step",
        "lisa_activated_layers": "decoder layers that train in a period (gamma), or auto",
        "lisa_interval_steps": "optimizer steps in a period (K)",
        "lisa_sampler": "uniform, reshuffle, fixed, weighted, balanced, adaptive",
        "lisa_always_on": "of embed, head, rest; those left out are sampled like layers",
        "lisa_frozen": "of embed, head, rest: never trained",
        "lisa_state": "at a switch: reset, reset_all (as in the paper), keep",
    },
    "Training": {
        "output_dir": "checkpoints, logs and the model",
        "deepspeed": "zero1, zero2, zero3, zero2_offload, zero3_offload, or a file",
        "bf16": "by default where there is a GPU",
        "optim": "adamw_torch_fused, adamw_8bit, lisa_adamw, ...",
        "learning_rate": "",
        "lr_scheduler_type": "linear, cosine, constant_with_warmup, ...",
        "warmup_steps": "or below 1 a part of all steps",
        "num_train_epochs": "",
        "max_steps": "wins over --num_train_epochs",
        "per_device_train_batch_size": "examples of a rank in a forward pass",
        "global_batch_size": "examples of a step on all ranks; accumulation follows",
        "checkpointed_layers": "gradient checkpointing: none, all, a number, auto",
        "attn_implementation": "by default the fastest that runs here",
    },
    "Logs and checkpoints": {
        "logging_steps": "",
        "eval_strategy": "no, steps, epoch",
        "eval_steps": "",
        "save_steps": "",
        "save_total_limit": "checkpoints to keep",
        "resume_from_checkpoint": "a checkpoint, true for the newest, auto for that or the beginning",
        "report_to": "wandb, mlflow, ..., several as wandb,tensorboard, or none",
    },
}


# What the help of a task has in the place of the flags that are sft's alone.
HELP_OF_TASK = {
    "dpo": {"beta": "how near the model stays to what it was", "loss_type": "sigmoid, ipo, ..."},
    "kto": {"beta": "how near the model stays to what it was", "desirable_weight": "", "undesirable_weight": ""},
    "orpo": {"beta": "weight of the odds ratio beside the loss of what was chosen"},
    "reward": {"center_rewards_coefficient": "keeps the mean of rewards at 0"},
    "grpo": {
        "reward_funcs": "rewards.py or rewards.py:name, with reward(completions, **columns)",
        "num_generations": "answers to each prompt",
        "max_completion_length": "tokens of the longest answer",
        "temperature": "",
        "beta": "how near the model stays to what it was; 0 needs no reference model",
        "use_vllm": "answers by vLLM",
    },
}


def run_parser(task: str = SFT) -> FlagParser:
    """The parser of all flags of a run."""
    return parser_of_task(task, (*ARGUMENTS, CONFIGS[task]), USAGE, HELP, HELP_OF_TASK)


class RunConfig(NamedTuple):
    """A run as one value: the arguments of the run, of its data, of training, of the model, and of LISA."""

    run: RunArguments
    data: DataArguments
    training: LisaSFTConfig
    model: ModelArguments
    lisa: LisaConfig

    def flags(self) -> dict[str, Any]:
        """All flags and their values, but those that each rank has for itself; *** in place of secrets."""
        flags: dict[str, Any] = {}
        for group in self:
            values = group.to_dict() if hasattr(group, "to_dict") else vars(group)
            flags |= {f"--{name}": value for name, value in values.items() if name not in ("local_rank", "logging_dir")}
        return hide_secrets(flags)

    def load(self, auto_class: Any) -> Any:
        """What a class of transformers, such as AutoTokenizer, loads of the run's model."""
        return auto_class.from_pretrained(
            str(self.model.model_name_or_path),
            revision=self.model.model_revision,
            trust_remote_code=self.training.trust_remote_code,
        )


def model_config_of(config: RunConfig) -> PretrainedConfig:
    """The configuration of a run's model."""
    return config.load(AutoConfig)


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfig:
    """The arguments of a run from flags and `--config file.yaml`; flags win. Unknown keys and flags are errors."""
    argv = sys.argv[1:] if argv is None else argv
    parser = run_parser(task_of(argv))
    rate_of_trl = parser.get_default("learning_rate")  # before a recipe's becomes the default
    given = parser.given(argv)
    method = given.get("method", METHODS[0])
    trains_adapters = method == "lora" or (method == "lisa" and trains_adapters_alone(with_preset(given)))
    parser.set_defaults(learning_rate=default_rate(rate_of_trl, trains_adapters))
    set_rank()
    check_port()
    # What is cheap to check comes first: the training arguments start the process group.
    run_args, data_args, lisa_config, model_args, training_args = parser.parse(argv)
    if method != "lisa":  # the preset is for LISA alone
        own = {name for name in vars(lisa_config) if name in given and name != "lisa_preset"}
        lisa_config = LisaConfig.plain(**{name: getattr(lisa_config, name) for name in own})
    is_auto = AUTO in (parse_checkpointed_layers(run_args.checkpointed_layers), lisa_config.lisa_activated_layers)
    # Other methods have no use for --gpu_memory, as their header says: a recipe that has it serves them too.
    parse_budget(run_args.gpu_memory, is_kept_to=is_auto or run_args.method != "lisa")
    return RunConfig(run_args, data_args, training_args, model_args, lisa_config)


def stored_quantization(model_config: PretrainedConfig) -> str | None:
    """The method by which a model's weights are stored in fewer bits; None where they are not."""
    stored: Any = getattr(model_config, "quantization_config", None) or {}
    return (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
