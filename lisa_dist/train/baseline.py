"""Trainers of `--method full` and `--method lora`: the Trainer's own checkpoints, complete or absent."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lisa_dist.checkpoint.folders import make_staging
from lisa_dist.checkpoint.trainer_checkpoint import complete_checkpoint, find_trainer_checkpoint, move_model
from lisa_dist.distributed.collectives import gather, together
from lisa_dist.errors import UserError
from lisa_dist.files import SaveError, is_disk_error
from lisa_dist.train.checks import check_saves
from lisa_dist.train.run_mixin import RunMixin


class BaselineMixin(RunMixin):
    """Put before a Trainer class: it trains the same parameters in every step, and its runs are as robust as LISA's.

    A checkpoint contains what the Trainer and DeepSpeed write. It resumes on the same number of ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_saves(self.args)

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        if wanted in (None, False):
            return None
        if wanted not in (True, "auto"):
            return Path(str(wanted))
        found, output_dir = find_trainer_checkpoint(str(self.args.output_dir)), self.args.output_dir
        if found is None and wanted is True:
            raise UserError(
                f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}. Give auto "
                "to begin at step 0."
            )
        if found is None:
            self._print(f"no checkpoint in {output_dir} yet: the run begins at step 0.")
        return found

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, Any]:
        """The Trainer's, which has DeepSpeed load a checkpoint, and a line that says so."""
        prepared: tuple[torch.nn.Module, Any] = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self._watchdog.beat()  # to load a checkpoint may take as long as a step
        if resume_from_checkpoint is not None:
            self._print(f"resumed from {resume_from_checkpoint}, after step {self.state.global_step} of {max_steps}")
        return prepared

    def _write_checkpoint(self, folder: Path, then: Callable[[], None]) -> None:
        staging = make_staging(folder, self.args.should_save)
        try:
            super().save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model or self.stopped_by is not None:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if self.args.should_save:
                self._write_trainer_state(staging)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_error(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)
            raise SaveError(
                f"{folder} could not be written ({error}); what was saved before is untouched. Make room, or choose "
                "another --output_dir."
            ) from error
        complete_checkpoint(staging, folder, self.args.should_save)
        if self.is_world_process_zero():
            self.create_model_card()
        then()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for `from_pretrained`; each of its files is complete or absent."""
        folder = Path(str(output_dir or self.args.output_dir))
        self._warn_if_stopped(folder)
        staging = folder / "tmp-model"
        with together(folder):
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        super().save_model(str(staging), _internal_call=True)
        gather(None)  # all ranks have written
        with together(folder):
            if self.args.should_save:
                move_model(staging, folder)
        if self.is_world_process_zero() and output_dir is None:
            self.create_model_card()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
