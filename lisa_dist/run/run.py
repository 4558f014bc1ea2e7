"""A training run, in its order: check, settle, load, train by TRL's trainer of the task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist
from transformers import IntervalStrategy

from lisa_dist.data.dataset import Data, describe_examples
from lisa_dist.distributed.collectives import sharing_errors, together
from lisa_dist.distributed.health import check_same_everywhere
from lisa_dist.distributed.ranks import leave_ranks
from lisa_dist.distributed.run_lock import one_run_in
from lisa_dist.ds_config import check_mismatches
from lisa_dist.errors import UserError
from lisa_dist.files import naming_lost_files
from lisa_dist.report.hub import meet_hub, naming_the_hub, without_examples
from lisa_dist.run.arguments import RunConfig, run_parser
from lisa_dist.run.check_run import check_config, check_resume, check_stream
from lisa_dist.run.header import describe_outcome, describe_run, record_of_run
from lisa_dist.run.inputs import load_examples, load_processing
from lisa_dist.run.settle import installed_versions, settle
from lisa_dist.run.trainer import load_trainer
from lisa_dist.run_folder import goes_on, write_run
from lisa_dist.text import in_one_line
from lisa_dist.zero.cpu_ops import start_deepspeed


def run(config: RunConfig, argv: Sequence[str] = ()) -> Path | None:
    """Train, and save the model in `output_dir`; `argv` of the command line is recorded, `config` is settled.

    Returns `output_dir` on rank 0 when training finished, None on other ranks and after a signal. Raises UserError
    before a model is loaded for what cannot work.
    """
    check_config(config)
    output_dir, given = Path(str(config.training.output_dir)), config.training.resume_from_checkpoint
    resume_from = {"true": True, "false": False}.get(str(given).lower(), given)  # else auto or a path
    if config.training.use_cpu:
        # Accelerate has started gloo, but DeepSpeed must know of it too before a model is loaded under ZeRO-3.
        start_deepspeed()
    check_same_everywhere(
        installed_versions() | config.flags(), "start every rank with the same environment and the same flags"
    )
    check_resume(resume_from, output_dir, config.run.method, config.run.overwrite_output_dir)
    if config.training.push_to_hub:
        meet_hub(config.training)
    processing, template, processor = load_processing(config)
    settled = settle(config, resume_from)
    data = load_examples(settled.config, processing, processor)
    _check_data(settled.config, data)
    check_stream(settled.config, data, resume_from, output_dir)
    with one_run_in(output_dir):  # before the model is loaded, until it is saved
        trainer = load_trainer(settled, processing, data)
        with together(output_dir):
            if trainer.is_world_process_zero():
                lines = [*data.lines, *data.more]
                lines = without_examples(lines) if config.training.push_to_hub else lines  # the record is pushed too
                record = record_of_run(settled, argv, trainer.model, lines)
                write_run(output_dir, record, resumes=goes_on(output_dir, resume_from))
        trainer.accelerator.print(describe_run(settled, template, processor, run_parser(config.run.task).given(argv)))
        trainer.accelerator.print(_describe_data(config, data))
        with naming_lost_files(output_dir):  # logs, and what trackers write: saves have errors of their own
            _train(trainer, resume_from)
            return _finish(trainer, output_dir)


def _train(trainer: Any, resume_from: str | bool | None) -> None:
    """Train. Raises UserError for arguments that TRL and transformers look at only when training begins.

    These are an unknown `--loss_type`, and steps in the DeepSpeed config that are not those of the data.
    """
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except ValueError as error:
        check_mismatches(trainer.args.hf_deepspeed_config.mismatches)
        if not str(error).startswith("Unknown loss type"):
            raise
        raise UserError(f"--loss_type: {in_one_line(error)}") from error


def _describe_data(config: RunConfig, data: Data) -> str:
    lines = [line for text in data.lines for line in text.split("\n")]
    if data.held_out is not None and config.training.eval_strategy == IntervalStrategy.NO:
        lines.append("what is held out is not evaluated: --eval_strategy is no; give steps or epoch")
    return "\n  ".join(["data", *lines])


def _check_data(config: RunConfig, data: Data) -> None:
    named = f"the content of --dataset_name {' '.join(config.data.dataset_name or [])}"
    content = {named: describe_examples(data.train)}
    if data.held_out is not None:
        content["the content of the held-out examples"] = describe_examples(data.held_out)
    check_same_everywhere(content, "give every host the same file")


def _finish(trainer: Any, output_dir: Path) -> Path | None:
    """Save the model of a run that was not stopped, and leave the ranks."""
    if trainer.stopped_by is not None:
        trainer.accelerator.print(
            f"{trainer.stopped_by}: stopped after step {trainer.state.global_step} and saved; go on with the same "
            "command and --resume_from_checkpoint true"
        )
    else:
        trainer.final_save.save()
        trainer.save_state()  # losses of every logged step, in trainer_state.json
        trainer.accelerator.print(describe_outcome(trainer.state.log_history))
        trainer.accelerator.print(f"saved {output_dir}; load it with from_pretrained")
        if trainer.args.push_to_hub:
            name = trainer.hub_model_id  # of rank 0, which uploads once all have saved
            then = f"; the model is saved: `hf upload {name} {output_dir}`"
            with sharing_errors(), naming_the_hub(f"--push_to_hub to {name}", then):
                trainer.push_to_hub()
    # Ranks that simply exit tear down gloo under each other's feet.
    dist.barrier()
    writes_report = trainer.is_world_process_zero() and trainer.stopped_by is None
    leave_ranks(trainer.accelerator.end_training)
    return output_dir if writes_report else None
