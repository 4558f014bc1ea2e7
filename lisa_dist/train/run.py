"""A training run, in its order: what `launch/train.py` and `lisa-dist train` do after the flags are parsed.

TRL's trainer of the task loads the model and trains.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig
from torch import distributed as dist
from transformers import AutoTokenizer, IntervalStrategy, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from trl import get_peft_config

from lisa_dist.core.checkpointing import parse_checkpointed_layers
from lisa_dist.data.chat_template import set_chat_template
from lisa_dist.data.dataset import Data, describe_examples, load_data
from lisa_dist.data.image_rows import have_images, load_image_data
from lisa_dist.data.task_rows import check_template, load_task_data
from lisa_dist.distributed.collectives import raise_shared, together
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.distributed.run_lock import one_run_in
from lisa_dist.errors import UserError
from lisa_dist.files import naming_lost_files
from lisa_dist.run_folder import goes_on, write_run
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import in_one_line
from lisa_dist.train.arguments import ALL_LINEAR, RunConfig
from lisa_dist.train.attention import choose_attention, packs_documents
from lisa_dist.train.auto_layers import settle_layers
from lisa_dist.train.callbacks import BestMetric
from lisa_dist.train.checks import precision_of_arguments
from lisa_dist.train.compiled_layers import CompiledLayers
from lisa_dist.train.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32
from lisa_dist.train.given_paths import check_resume, given_resume
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.train.liger import settle_liger
from lisa_dist.train.loss import choose_loss
from lisa_dist.train.processor import Processing, load_processor
from lisa_dist.train.quiet import without_bars_of_datasets
from lisa_dist.train.record import record_of_run
from lisa_dist.train.reward_functions import load_rewards
from lisa_dist.train.run_checks import check_config, model_config_of
from lisa_dist.train.run_header import describe_outcome, describe_run, installed_versions
from lisa_dist.train.sample_answer import SampleCallback
from lisa_dist.train.step_memory import bytes_of_any_gpu
from lisa_dist.train.task_trainers import TRAINERS
from lisa_dist.zero.cpu_ops import start_deepspeed

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def run(config: RunConfig, words: Sequence[str] = ()) -> Path | None:
    """Train, and save the model in `output_dir`; `config` stays as it is, `words` of a command line are recorded.

    Returns `output_dir` on rank 0 when training finished, None on other ranks and after a signal. Raises UserError
    before a model is loaded for what cannot work.
    """
    config = _settle(config)
    output_dir, resume_from = Path(str(config.training.output_dir)), given_resume(config.training)
    check_config(config)
    if config.run.method == "lisa":
        settle_liger(config.training, model_config_of(config), config.lisa)
    _join_ranks(config)
    check_resume(resume_from, output_dir, config.run.method, config.run.overwrite_output_dir)
    tokenizer = load_tokenizer(config)
    processing, said = load_processor(config, model_config_of(config), tokenizer)
    template = set_chat_template(tokenizer, path := getattr(config.training, "chat_template_path", None))
    if path is not None or not processing.chat_template:
        processing.chat_template = tokenizer.chat_template
    attention, reason = choose_attention(
        config.model.attn_implementation,
        half_precision=precision_of_arguments(config.training) != "fp32",
        config=model_config_of(config),
        packed=config.run.task == SFT and packs_documents(config.training),
        use_cpu=config.training.use_cpu,
    )
    gpu_bytes = bytes_of_any_gpu(config.training.device)
    config, layers = settle_layers(config, model_config_of(config), resume_from, gpu_bytes)
    loss, why = choose_loss(config, model_config_of(config), gpu_bytes)
    data = load_examples(config, processing, said)
    _check_data(config, data)
    config = _for_trl(config, attention)
    with one_run_in(output_dir):  # before the model is loaded, until it is saved
        trainer = _load_model(config, processing, data, loss, bool(layers))
        with together(output_dir):
            if trainer.is_world_process_zero():
                record = record_of_run(config, words, trainer.model, data.lines, why)
                write_run(output_dir, record, resumes=goes_on(output_dir, resume_from))
        trainer.accelerator.print(describe_run(config, f"{attention} ({reason})", template, why, layers, said))
        lines = [line for text in data.lines for line in text.split("\n")]
        if data.held_out is not None and config.training.eval_strategy == IntervalStrategy.NO:
            lines.append("what is held out is not evaluated: --eval_strategy is no; give steps or epoch")
        trainer.accelerator.print("\n  ".join(["data", *lines]))
        with naming_lost_files(output_dir):  # logs, and what trackers write: saves have errors of their own
            trainer.train(resume_from_checkpoint=resume_from)
            return _finish(trainer, output_dir)


def _load_model(config: RunConfig, processing: Processing, data: Data, loss: str, layers_are_planned: bool) -> Any:
    """The trainer, which loads the model. Raises UserError for what the trainers of TRL and transformers refuse.

    So it does for weights of other sizes than their configuration's.
    """
    try:
        return build_trainer(config, processing, data, loss, layers_are_planned)
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # of a package that a flag needs
        raise UserError(in_one_line(error)) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"--model_init_kwargs: {in_one_line(error)}.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # what from_pretrained says of weights of other sizes
            raise
        name = config.model.model_name_or_path
        raise UserError(f"--model_name_or_path {name}: its weights are not of its config.json's sizes.") from error


def _settle(config: RunConfig) -> RunConfig:
    """A copy in which flags that stand for others have set them."""
    config = config.copy()
    method, training = config.run.method, config.training
    if training.deepspeed:  # transformers loads models by the config that was set last, as long as it is alive
        set_hf_deepspeed_config(training.hf_deepspeed_config)
    checkpointed = parse_checkpointed_layers(config.run.checkpointed_layers)
    if method != "lisa" and checkpointed is not None:  # all or none; which layers fit is planned for LISA alone
        # TRL reads the old name, the Trainer the new one, which it has set by the old before this.
        training.gradient_checkpointing = training.activation_checkpointing = checkpointed != 0
    if config.run.task == SFT and training.completion_only_loss is False:  # TRL's name for it
        config.data.train_on_inputs = True
    if method == "lora":
        model: Any = config.model  # whose targets are names to TRL, and one word to peft
        model.lora_target_modules = model.lora_target_modules or ALL_LINEAR
    return config


def _join_ranks(config: RunConfig) -> None:
    """Have DeepSpeed know of the ranks, and refuse ranks that differ in their environment or flags."""
    if config.training.use_cpu:
        # Accelerate has started gloo, but DeepSpeed must know of it too before a model is loaded under ZeRO-3.
        start_deepspeed()
    check_same_everywhere(
        installed_versions() | config.flags(), "start every rank with the same environment and the same flags"
    )


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end of a turn that `--eos_token` gives."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model.model_name_or_path,
            revision=config.model.model_revision,
            trust_remote_code=config.training.trust_remote_code,
        )
    except Exception as error:
        # The library tokenizers, which is in Rust, raises Exception itself for files that it cannot read.
        # Of transformers, which reads them too, and the model's config with them.
        known = OSError | ValueError | TypeError | KeyError | AttributeError | StrictDataclassError
        if type(error) is not Exception and not isinstance(error, known):
            raise
        raise UserError(
            f"--model_name_or_path {config.model.model_name_or_path}: its tokenizer cannot be loaded "
            f"({in_one_line(error)})."
        ) from error
    for flag in ("eos_token", "pad_token"):
        token = getattr(config.training, flag, None)  # not every task has both
        if token is not None and token not in tokenizer.get_vocab():
            raise UserError(f"--{flag} {token}: the tokenizer has no such token.")
    if getattr(config.training, "eos_token", None) is not None:
        tokenizer.eos_token = config.training.eos_token  # before rows are made of it
    return tokenizer


def load_examples(config: RunConfig, processing: Processing, said: str = "") -> Data:
    """The examples of a run: of sft as tokens, which TRL takes as they are; all ranks call it, one of a host works.

    `processing` is the tokenizer, or a processor with it, for which rows with images stay rows; `said` is what
    `load_processor` says of it.
    """
    ranks, problem, training = PartialState(), None, config.training
    tokenizer: Any = getattr(processing, "tokenizer", processing)
    with ranks.main_process_first(), ranks.local_main_process_first():  # the others find what was cached, as in TRL
        try:
            if config.run.task == SFT and said and have_images(config.data):
                if processing is tokenizer:
                    raise UserError(
                        f"--dataset_name {' '.join(config.data.dataset_name or [])}: its rows have images, and the "
                        f"model's processor is {said}; save it beside the model, or leave the column out."
                    )
                data = load_image_data(config.data, training.seed)
            elif config.run.task == SFT:
                data = load_data(
                    config.data,
                    tokenizer,
                    max_length=training.max_length,
                    seed=training.seed,
                    num_proc=training.dataset_num_proc,
                )
            else:
                data = load_task_data(config.data, config.run.task, training.seed)
                check_template(tokenizer, data.train)
        except UserError as error:
            problem = str(error)
    raise_shared(problem)
    return data


def _check_data(config: RunConfig, data: Data) -> None:
    named = f"the content of --dataset_name {' '.join(config.data.dataset_name or [])}"
    content = {named: describe_examples(data.train)}
    if data.held_out is not None:
        content["the content of the held-out examples"] = describe_examples(data.held_out)
    check_same_everywhere(content, "give every host the same file")


def _for_trl(config: RunConfig, attention: str) -> RunConfig:
    """The same for TRL's trainer, which loads the model and takes rows that are tokens already."""
    training = copy.copy(config.training)
    given: Any = training.model_init_kwargs or {}
    loads_by = {
        "revision": config.model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": attention,
        "dtype": config.model.dtype or _DTYPES[precision_of_arguments(training)],
    } | given
    if config.run.task == "orpo":
        loads_by["device_map"] = None  # which would be auto, for one process with all GPUs
    training.model_init_kwargs = loads_by
    if config.run.task == SFT:
        training.assistant_only_loss, training.completion_only_loss = False, None
    training.chat_template_path = None
    return config._replace(training=training)


def build_trainer(config: RunConfig, processing: Processing, data: Data, loss: str, layers_are_planned: bool) -> Any:
    """The trainer of the task and the method, with the model loaded.

    `loss` of sft as `choose_loss` gives it; `layers_are_planned`: how many train is auto or lora.
    """
    arguments: dict[str, Any] = {
        "model": config.model.model_name_or_path,
        "args": config.training,
        "train_dataset": data.train,
        "eval_dataset": data.held_out,
        "processing_class": processing,
    }
    if config.run.task == SFT:
        arguments["loss"] = loss
    if config.run.reward_funcs:
        arguments["reward_funcs"] = load_rewards(config.run.reward_funcs)
    if config.run.method == "lisa":
        arguments |= {
            "lisa_config": config.lisa,
            "hang_timeout": config.run.hang_timeout,
            "checkpointed_layers": config.run.checkpointed_layers,
            "gpu_memory": config.run.gpu_memory,
            "layers_are_planned": layers_are_planned,
            "save_async": config.run.save_async,
            "eval_frozen_bits": config.run.eval_frozen_bits,
        }
    else:
        arguments["peft_config"] = _adapters(config) if config.run.method == "lora" else None
    with without_bars_of_datasets():
        trainer = TRAINERS[config.run.task][config.run.method != "lisa"](**arguments)
    left = len(trainer.train_dataset)
    if left < len(data.train) and config.run.task != SFT:  # TRL leaves out what is too long, of some tasks
        if not left:
            raise UserError(
                f"--max_length {config.training.max_length}: every one of {len(data.train)} rows is longer."
            )
        trainer.accelerator.print(f"{len(data.train) - left} of {len(data.train)} rows are too long, and left out")
    if config.run.method != "lisa" and config.training.torch_compile:
        trainer.add_callback(CompiledLayers(trainer, config.lisa.lisa_layers_attribute))
    if config.training.bf16 and config.training.use_cpu and not cpu_multiplies_bf16():
        model: Any = trainer.model
        multiply_in_fp32(model)
    if config.run.sample_prompt:
        trainer.add_callback(SampleCallback(trainer, config.run.sample_prompt))
    trainer.add_callback(BestMetric())
    if config.run.layer_norms:
        trainer.add_callback(LayerNorms(config.run.layer_norms, config.lisa.lisa_layers_attribute))
    return trainer


def _adapters(config: RunConfig) -> PeftConfig | None:
    """The adapters of `--lora_*`."""
    model_args = copy.copy(config.model)
    model_args.use_peft = True  # TRL's flag for them
    if config.run.task == REWARD:
        model_args.lora_task_type = "SEQ_CLS"  # by which peft trains the score, and saves it
    return get_peft_config(model_args)


def _finish(trainer: Any, output_dir: Path) -> Path | None:
    """Save the model of a run that was not stopped, and leave the ranks."""
    if trainer.stopped_by is not None:
        trainer.accelerator.print(
            f"{trainer.stopped_by}: stopped after step {trainer.state.global_step} and saved; go on with the same "
            "command and --resume_from_checkpoint true"
        )
    else:
        trainer.save_model()
        trainer.save_state()  # losses of every logged step, in trainer_state.json
        trainer.accelerator.print(describe_outcome(trainer.state.log_history))
        trainer.accelerator.print(f"saved {output_dir}; load it with from_pretrained")
    # Ranks that simply exit tear down gloo under each other's feet.
    dist.barrier()
    writes_report = trainer.is_world_process_zero() and trainer.stopped_by is None
    trainer.accelerator.end_training()
    return output_dir if writes_report else None
