"""What a terminal shows of a run: a live line, or plain lines where the output is a file.

    ━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━  20/36  56%  0:01:12 left  312 tokens/s  GPU 1.20 GiB
    loss 2.9103  held out 3.0112  lr 6.2e-06  grad norm 1.43  layers 2, 7

Plain, a line for each log and each evaluation of the held-out examples:

    step 20/36  56%  loss 2.9103  lr 6.2e-06  grad norm 1.43  312 tokens/s  GPU 1.20 GiB  layers 2, 7  0:01:12 left
    step 24/36  held out 3.0112
"""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.text import format_bytes

_REFRESHES_PER_SECOND = 4
# Entries of a log, in the order in which they are shown.
_SHOWN = {
    "loss": lambda value: f"loss {value:.4f}",
    "held_out": lambda value: f"held out {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2g}",
    "grad_norm": lambda value: f"grad norm {value:.3g}",
    "rewards/margins": lambda value: f"reward margin {value:.3g}",
    "rewards/accuracies": lambda value: f"reward accuracy {value:.2f}",
}
_SPEED = {
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "memory_bytes": lambda value: f"{'GPU' if torch.cuda.is_available() else 'process'} {format_bytes(int(value))}",
}


class Progress(TrainerCallback):
    """The progress of training, on the rank that logs. `active` says which layers train; "" where all do."""

    def __init__(self, active: Callable[[], str], console: Console | None = None, plain: bool = False):
        self._active = active
        self._console = console or Console(highlight=False)
        # Not by the console alone, which FORCE_COLOR makes believe that a log file is a terminal.
        terminal = self._console.is_terminal and (console is not None or sys.stdout.isatty())
        self._plain = plain or not terminal or self._console.is_dumb_terminal
        self._live: Live | None = None
        self._values: dict[str, float] = {}
        self._step = self._max_steps = self._first_step = 0
        self._began = 0.0
        self._evaluated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the line."""
        self._step = self._first_step = state.global_step
        self._max_steps, self._began = state.max_steps, time.monotonic()
        if state.is_world_process_zero and not self._plain:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND
            )
            self._live.start()
            self._console.show_cursor(True)  # or a run that is killed leaves a terminal without one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        self._step = state.global_step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a batch of the held-out examples."""
        self._evaluated += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take over what was logged; in plain output print it."""
        logs, self._evaluated = logs or {}, 0
        if "eval_loss" in logs:
            self._values["held_out"] = logs["eval_loss"]
        self._values |= {name: value for name, value in logs.items() if name in _SHOWN | _SPEED}
        if not (self._plain and state.is_world_process_zero):
            return
        place = f"step {state.global_step}/{state.max_steps}"
        if "loss" in logs:
            done = f"{100 * state.global_step / max(1, state.max_steps):.0f}%"
            shown = {name: show for name, show in _SHOWN.items() if name != "held_out"}  # it has lines of its own
            parts = [place, done, *self._format(shown), *self._format(_SPEED), self._layers(), self._left()]
            print("  ".join(part for part in parts if part), flush=True)
        elif "eval_loss" in logs:
            print(f"{place}  {_SHOWN['held_out'](logs['eval_loss'])}", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the line as it is."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also when a step has raised."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(ratio=1)
        figures = [
            f"{self._step}/{self._max_steps}",
            f"{100 * self._step / max(1, self._max_steps):.0f}%",
            f"evaluating, batch {self._evaluated}" if self._evaluated else self._left(),
            *self._format(_SPEED),
        ]
        for _ in figures:
            line.add_column(no_wrap=True)
        total = max(1, self._max_steps)
        bar = ProgressBar(total=total, completed=self._step, complete_style="cyan", finished_style="green")
        line.add_row(bar, *figures)
        shown = [*self._format(_SHOWN), self._layers()]
        return Group(line, Text("  ".join(part for part in shown if part), style="cyan"))

    def _format(self, entries: dict[str, Callable[[float], str]]) -> list[str]:
        return [show(self._values[name]) for name, show in entries.items() if name in self._values]

    def _layers(self) -> str:
        active = self._active()
        return active if not active or active.startswith(("layers", "modules", "embed", "head")) else f"layers {active}"

    def _left(self) -> str:
        """The time that the rest will take if it goes on as fast as since the start, evaluation and saving with it."""
        taken = self._step - self._first_step
        if taken < 1:
            return ""
        seconds = (time.monotonic() - self._began) / taken * (self._max_steps - self._step)
        return f"{timedelta(seconds=round(seconds))} left"
