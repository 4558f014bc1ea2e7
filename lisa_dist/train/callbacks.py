"""What is done at the Trainer's events: steps of the controller, heartbeats for the watchdog, a check of a metric."""

from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.distributed.signals import StopSignals
from lisa_dist.distributed.watchdog import Watchdog
from lisa_dist.errors import UserError
from lisa_dist.run_folder import STEPS_NAME, append_line


class BestMetric(TrainerCallback):
    """At the first evaluation: raises UserError for a `--metric_for_best_model` that no evaluation has."""

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Look for it among the metrics, whose names begin with eval_."""
        name = args.metric_for_best_model
        if name is None or metrics is None or f"eval_{name.removeprefix('eval_')}" in metrics:
            return
        known = ", ".join(sorted(metric.removeprefix("eval_") for metric in metrics if metric.startswith("eval_")))
        raise UserError(f"--metric_for_best_model {name}: no metric of an evaluation here; choose one of {known}.")


class LastLoss(TrainerCallback):
    """Logs the loss in the last step of a run that has fewer steps than `logging_steps`, and so would log none."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a log."""
        is_last = state.global_step == state.max_steps < state.logging_steps
        if is_last and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True


class FinalSave(TrainerCallback):
    """Saves the model of a run that was not stopped, before later callbacks write what describes it.

    With `load_best_model_at_end` the model is that of a checkpoint, and `save` is called once it is loaded.
    """

    def __init__(self, trainer: Any):
        self._trainer, self._is_saved = trainer, False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save it. Collective."""
        if self._trainer.stopped_by is None and not args.load_best_model_at_end:
            self.save()

    def save(self) -> None:
        """Save it, unless it is saved. Nothing is pushed, as a push may fail. Collective."""
        if not self._is_saved:
            self._trainer.save_model(_internal_call=True)
            self._is_saved = True


class StepsLog(TrainerCallback):
    """Writes what the Trainer logs to a file of the output folder as it comes: the report reads it in a run."""

    def __init__(self) -> None:
        self._resumed_at: int | None = None  # None before training; -1 once a line is written

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Lines of an earlier run stay up to the step at which this one begins."""
        self._resumed_at = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the last entry, on the first rank, once training has begun."""
        if self._resumed_at is None or not state.is_world_process_zero:
            return
        began_at, self._resumed_at = self._resumed_at, -1
        keep = (lambda earlier: earlier["step"] <= began_at) if began_at >= 0 else None
        append_line(Path(str(args.output_dir)) / STEPS_NAME, state.log_history[-1], keep)


class RunSteps(TrainerCallback):
    """Ends a run of any method on a signal, with a checkpoint.

    Every event of training, evaluation and saving is a heartbeat: the watchdog sees that this rank is alive.
    """

    def __init__(self, trainer: Any, signals: StopSignals, watchdog: Watchdog):
        self._trainer, self._signals, self._watchdog = trainer, signals, watchdog

    def _beat(self, *args: Any, **kwargs: Any) -> None:
        self._watchdog.beat()

    on_train_begin = on_step_begin = on_substep_end = on_prediction_step = on_save = _beat

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On a signal have the run save and stop."""
        self._watchdog.beat()  # a save may follow
        if self._signals.agree() is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time that is left is for the save

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do not evaluate when a signal has ended the run."""
        if self._signals.stopped_by is not None:
            control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the step timeout."""
        self._watchdog.end_steps()


class LisaSteps(RunSteps):
    """Switches layers and measures memory too.

    The `trainer` is a LisaMixin, whose controller and memory are there once training begins.
    """

    _printed = False  # whether the layers of this run's first period are printed

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Switch when a period begins, and print its layers; in the first step, those of the period it belongs to."""
        self._watchdog.beat()
        if self._trainer.lisa.on_step_begin() or not self._printed:
            self._print_active(state)
            self._printed = True
        self._trainer.memory.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check that losses are finite, before a signal has the run save."""
        self._watchdog.beat()
        message = self._trainer.memory.end_step(state.global_step - 1)
        if message is not None and args.should_log:
            print(message, flush=True)
        self._watchdog.beat()  # a plan may have been made
        self._trainer.lisa.check_finite()
        super().on_step_end(args, state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the logs; report the memory of a run that was not stopped."""
        super().on_train_end(args, state, control)
        self._trainer.lisa.close()
        if self._signals.stopped_by is None and state.is_world_process_zero:
            self._trainer.memory.write_report(str(args.output_dir))

    def _print_active(self, state: TrainerState) -> None:
        lisa = self._trainer.lisa
        if state.is_world_process_zero and lisa.config.samples:
            active, kind = lisa.selection.describe(lisa.active), "modules" if lisa.config.by_module else "layers"
            print(f"step {state.global_step:>5}  period {lisa.period:>4}  active {kind}: {active}", flush=True)
