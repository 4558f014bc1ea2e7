"""What a run needs whatever its method: stop signals, a watchdog, a lock on its folder, complete checkpoints."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from lisa_dist.checkpoint.folders import rotate_checkpoints
from lisa_dist.distributed.run_lock import one_run_in
from lisa_dist.distributed.signals import StopSignals
from lisa_dist.distributed.watchdog import HANG_TIMEOUT, Watchdog
from lisa_dist.train.callbacks import RunSteps
from lisa_dist.train.monitoring import MonitoredMixin


class RunMixin(MonitoredMixin):
    """Put before a Trainer class: makes its runs stop on signals, and its checkpoints complete or absent.

    Subclasses say how a checkpoint is found, written and loaded.

    Args:
        hang_timeout: Seconds without a step after which a run ends and names the rank that hangs; 0 for never.
    """

    _steps_callback: type[RunSteps] = RunSteps

    def __init__(self, *args: Any, hang_timeout: float = HANG_TIMEOUT, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._saved_step: int | None = None
        self._signals, self._watchdog = StopSignals(), Watchdog(hang_timeout)
        self.add_callback(self._steps_callback(self, self._signals, self._watchdog))

    @property
    def stopped_by(self) -> str | None:
        """The signal that ended training early, if one did."""
        return self._signals.stopped_by

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint: a path, or True for the newest whole one in `output_dir`.

        "auto" is True where there is a checkpoint, and the beginning where there is none. SIGTERM and SIGUSR1 end
        training with a checkpoint after the step, and `stopped_by` is set.
        """
        with one_run_in(str(self.args.output_dir)):
            self._saved_step = None
            checkpoint = self._find_checkpoint(resume_from_checkpoint)
            with self._signals, self._watchdog:
                try:
                    output = super().train(checkpoint and str(checkpoint), *args, **kwargs)
                    self._finish_save()
                except BaseException:
                    self._end_save()  # inside the watchdog's block: the save may wait for a rank that is gone
                    raise
                return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which would train one step more when it resumes a run that has taken all of its steps."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which would delete all checkpoints but the best, the newest and a signal's among them."""
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        self._finish_save()
        if self.args.load_best_model_at_end and best is not None and self.stopped_by is None:
            self._load_best_model()
            self._print(f"the model is that of {best}, the best by {self.args.metric_for_best_model}")
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, without a trace in the random states.

        A resumed run must see the same random numbers, and does not repeat evaluations from before the save.
        """
        cuda = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
        python_state, numpy_state = random.getstate(), numpy.random.get_state()
        with torch.random.fork_rng(devices=cuda):
            metrics = super().evaluate(*args, **kwargs)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        return metrics

    def _warn_if_stopped(self, folder: Path) -> None:
        """Print a warning if the model that is about to be saved was stopped by a signal; scripts may not check it."""
        if self.stopped_by is not None:
            done = f"{self.state.global_step} of {self.state.max_steps} steps"
            self._print(f"warning: {self.stopped_by} ended the run after {done}: {folder} is no finished model.")

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The Trainer's `checkpoint-N`, written completely or not at all."""
        step = self.state.global_step
        if self._saved_step == step:  # a signal in a step that is saved anyway
            return
        self._finish_save()
        self.store_flos()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self._write_checkpoint(folder, partial(self._after_save, folder, self.state.best_model_checkpoint))
        self._saved_step = step

    def _after_save(self, folder: Path, best: str | None) -> None:
        """Upload a checkpoint that is complete, and delete the oldest ones."""
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(folder, self.args.save_total_limit, Path(best) if best else None)

    def _write_trainer_state(self, folder: Path) -> None:
        """Write `trainer_state.json`, which contains the states of callbacks too."""
        states: dict[str, list] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: each[0] if len(each) == 1 else each for name, each in states.items()}
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        """Return the checkpoint that `--resume_from_checkpoint` asks for. Collective."""
        raise NotImplementedError

    def _write_checkpoint(self, folder: Path, then: Callable[[], None]) -> None:
        """Write a checkpoint, and call `then` on every rank once it is complete. Collective."""
        raise NotImplementedError

    def _finish_save(self) -> None:
        """Wait until a checkpoint that is written in the background is complete."""

    def _end_save(self) -> None:
        """Wait for such a checkpoint after training has raised, for a bounded time."""
