"""A training run, in its order: check, settle, load, train; what `launch/train.py` and `lisa-dist train` do.

TRL's trainer of the task loads the model and trains.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig
from torch import distributed as dist
from transformers import IntervalStrategy
from trl import get_peft_config

from lisa_dist.data.dataset import Data, describe_examples, load_data
from lisa_dist.data.image_rows import have_images, load_image_data
from lisa_dist.data.task_rows import check_template, load_task_data
from lisa_dist.distributed.collectives import raise_shared, together
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.distributed.run_lock import one_run_in
from lisa_dist.errors import UserError
from lisa_dist.files import naming_lost_files
from lisa_dist.run.arguments import RunConfig
from lisa_dist.run.check_files import check_files, check_resume, given_resume
from lisa_dist.run.check_flags import check_flags
from lisa_dist.run.check_model import check_model
from lisa_dist.run.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32
from lisa_dist.run.header import describe_outcome, describe_run, record_of_run
from lisa_dist.run.processor import Processing, load_processing
from lisa_dist.run.quiet import without_bars_of_datasets
from lisa_dist.run.reward_functions import load_rewards
from lisa_dist.run.sample_answer import SampleCallback
from lisa_dist.run.settle import Settled, installed_versions, settle
from lisa_dist.run.task_configs import refused_upstream
from lisa_dist.run.task_trainers import TRAINERS
from lisa_dist.run_folder import goes_on, write_run
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import in_one_line
from lisa_dist.train.callbacks import BestMetric
from lisa_dist.train.compiled_layers import CompiledLayers
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.zero.cpu_ops import start_deepspeed


def run(config: RunConfig, words: Sequence[str] = ()) -> Path | None:
    """Train, and save the model in `output_dir`; `config` stays as it is, `words` of a command line are recorded.

    Returns `output_dir` on rank 0 when training finished, None on other ranks and after a signal. Raises UserError
    before a model is loaded for what cannot work.
    """
    check_config(config)
    output_dir, resume_from = Path(str(config.training.output_dir)), given_resume(config.training)
    if config.training.use_cpu:
        # Accelerate has started gloo, but DeepSpeed must know of it too before a model is loaded under ZeRO-3.
        start_deepspeed()
    check_same_everywhere(
        installed_versions() | config.flags(), "start every rank with the same environment and the same flags"
    )
    check_resume(resume_from, output_dir, config.run.method, config.run.overwrite_output_dir)
    processing, template, processor = load_processing(config)
    settled = settle(config, resume_from)
    data = load_examples(settled.config, processing, processor)
    _check_data(settled.config, data)
    with one_run_in(output_dir):  # before the model is loaded, until it is saved
        trainer = _load_model(settled, processing, data)
        with together(output_dir):
            if trainer.is_world_process_zero():
                record = record_of_run(settled, words, trainer.model, data.lines)
                write_run(output_dir, record, resumes=goes_on(output_dir, resume_from))
        trainer.accelerator.print(describe_run(settled, template, processor))
        trainer.accelerator.print(_describe_data(config, data))
        with naming_lost_files(output_dir):  # logs, and what trackers write: saves have errors of their own
            _train(trainer, resume_from)
            return _finish(trainer, output_dir)


def _train(trainer: Any, resume_from: str | bool | None) -> None:
    """Train. Raises UserError for a `--loss_type` that TRL looks up in the first step and does not have."""
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except ValueError as error:
        if not str(error).startswith("Unknown loss type"):
            raise
        raise UserError(f"--loss_type: {in_one_line(error)}") from error


def check_config(config: RunConfig) -> None:
    """Raise UserError, of one line, for arguments that do not go together, and change none of them."""
    try:
        for check in (check_flags, check_files, check_model):
            check(config)
    except UserError as error:  # with values as they were given, line breaks and all
        raise UserError(in_one_line(error)) from error


def _describe_data(config: RunConfig, data: Data) -> str:
    lines = [line for text in data.lines for line in text.split("\n")]
    if data.held_out is not None and config.training.eval_strategy == IntervalStrategy.NO:
        lines.append("what is held out is not evaluated: --eval_strategy is no; give steps or epoch")
    return "\n  ".join(["data", *lines])


def _load_model(settled: Settled, processing: Processing, data: Data) -> Any:
    """The trainer, which loads the model. Raises UserError for what the trainers of TRL and transformers refuse.

    So it does for weights of other sizes than their configuration's.
    """
    try:
        return build_trainer(settled, processing, data)
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # of a package that a flag needs
        raise refused_upstream(error, settled.config.training) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"--model_init_kwargs: {in_one_line(error)}.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # what from_pretrained says of weights of other sizes
            raise
        name = settled.config.model.model_name_or_path
        raise UserError(f"--model_name_or_path {name}: its weights are not of its config.json's sizes.") from error


def load_examples(config: RunConfig, processing: Processing, processor: str = "") -> Data:
    """The examples of a run: of sft as tokens, which TRL takes as they are; all ranks call it, one of a host works.

    `processing` is the tokenizer, or a processor with it, for which rows with images stay rows; `processor` is
    the line about it of `load_processing`.
    """
    ranks, problem, training = PartialState(), None, config.training
    tokenizer: Any = getattr(processing, "tokenizer", processing)
    with ranks.main_process_first(), ranks.local_main_process_first():  # the others find what was cached, as in TRL
        try:
            if config.run.task == SFT and processor and have_images(config.data):
                if processing is tokenizer:
                    raise UserError(
                        f"--dataset_name {' '.join(config.data.dataset_name or [])}: its rows have images, and the "
                        f"model's processor is {processor}; save it beside the model, or leave the column out."
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


def build_trainer(settled: Settled, processing: Processing, data: Data) -> Any:
    """The trainer of the task and the method, with the model loaded."""
    config = settled.config
    arguments: dict[str, Any] = {
        "model": config.model.model_name_or_path,
        "args": config.training,
        "train_dataset": data.train,
        "eval_dataset": data.held_out,
        "processing_class": processing,
    }
    if config.run.task == SFT:
        arguments["loss"] = settled.loss
    if config.run.reward_funcs:
        arguments["reward_funcs"] = load_rewards(config.run.reward_funcs)
    if config.run.method == "lisa":
        arguments |= {
            "lisa_config": config.lisa,
            "hang_timeout": config.run.hang_timeout,
            "checkpointed_layers": config.run.checkpointed_layers,
            "gpu_memory": config.run.gpu_memory,
            "layers_are_planned": bool(settled.layers_line),
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
