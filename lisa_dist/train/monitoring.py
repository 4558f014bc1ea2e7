"""What every run logs, whatever its method: tokens a second, memory, the line of its progress; and no secrets.

    ━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━  20/36  56%  0:01:12 left  312 tokens/s  GPU 1.20 GiB
    loss 2.9103  held out 3.0112  lr 6.2e-06  grad norm 1.43  layers 2, 7

is the line in a terminal; a file gets a line for each log and each evaluation of the held-out examples.
"""

import copy
import copyreg
import functools
import resource
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import distributed as dist
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lisa_dist.core.controller import LisaController
from lisa_dist.files import warning_of_failure
from lisa_dist.patches import patch
from lisa_dist.run_folder import hide_secrets
from lisa_dist.text import format_bytes
from lisa_dist.train.callbacks import LastLoss, StepsLog
from lisa_dist.train.sequence_parallel import SequenceParallelMixin
from lisa_dist.zero.parameters import parameter_numel

# Entries of a log, in the order in which they are shown.
_SHOWN = {
    "loss": lambda value: f"loss {value:.4f}",
    "reward": lambda value: f"reward {value:.4g}",  # of GRPO, whose loss is about 0 by its definition
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


class MonitoredMixin(SequenceParallelMixin):
    """Put before a Trainer class: adds `tokens_per_second` and `memory_bytes` to its logs, and shows `Progress`.

    Tokens are those of all ranks, padding not counted; their time is that between two logs, without that of evaluating
    and saving. Memory is the highest peak of any rank since the start: of tensors on a GPU, of the process on CPUs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        if any(one.__module__.partition(".")[0] == "trl" for one in type(self).__mro__):  # else it is not imported
            from lisa_dist.loss.chunked import use_chunks

            use_chunks()
        super().__init__(*args, **kwargs)
        hide_secrets_of(self.args)
        self._meter = SpeedMeter(self.args.device, self._rows_shared_by)
        self.add_callback(self._meter)
        self.add_callback(StepsLog())
        self.add_callback(LastLoss())
        self._progress = Progress(self.active_now, plain=self.args.disable_tqdm)
        if self.pop_callback(ProgressCallback) is not None or self.pop_callback(PrinterCallback) is not None:
            self.add_callback(self._progress)

    write_card: Callable[..., object] | None = None  # of a run of lisa-dist: its model card, for the hub

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's or, of a run, one that says how it trained. A card that fails is a warning."""
        with warning_of_failure("the model card"):
            (self.write_card or super().create_model_card)(*args, **kwargs)

    def _print(self, text: str | None) -> None:
        if text is not None and self.args.should_log:
            print(text, flush=True)

    def active_now(self) -> str:
        """What trains now, for the line of the progress; "" where it is everything."""
        return ""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; whatever ends it, the terminal is given back."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.on_train_end()  # also when a step has raised

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's; some of its schedules read the optimizer's `defaults`, which DeepSpeed's wrapper lacks."""
        wrapper = inner = self.optimizer if optimizer is None else optimizer
        while not hasattr(inner, "defaults"):
            inner = inner.optimizer
        wrapper.defaults = inner.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's, with its tokens counted."""
        self._meter.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's, which goes through all parameters for each micro-batch, and misses those held elsewhere."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return 6 * inputs[name].numel() * self._multiplied if name in inputs else 0

    @functools.cached_property
    def _multiplied(self) -> int:
        """Elements of the parameters but for embeddings."""
        looked_up = {id(module.weight) for module in self.model.modules() if isinstance(module, torch.nn.Embedding)}
        return sum(parameter_numel(one) for one in self.model.parameters() if id(one) not in looked_up)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add speed and memory to the log of a loss, which all ranks write or none."""
        if "loss" in logs:
            metrics, batch = self._meter.metrics()
            logs = logs | metrics
            if batch is not None:
                self.accelerator.print(describe_batch(*batch, getattr(self.args, "packing", None) is False))
        super().log(logs, *args, **kwargs)


class SpeedMeter(TrainerCallback):
    """Tokens, seconds and memory between two logs."""

    def __init__(self, device: torch.device, rows_shared_by: int = 1):
        self._device, self._rows_shared_by = device, rows_shared_by
        self._tokens: int | torch.Tensor = 0  # on the device, for nothing to wait for it
        self._rows, self._positions = 0.0, 0  # with padding
        self._has_told = False
        self._since: float | None = None  # the last log, or the first step
        self._mark = 0.0  # the last end of a step, of an evaluation or of a save
        self._elsewhere = 0.0  # seconds of evaluation and saving
        self._peak = 0  # bytes; kept here, since measuring a step sets the GPU's own record back

    def count(self, inputs: object) -> None:
        """Count the tokens of a micro-batch of this rank."""
        if not isinstance(inputs, Mapping):  # some trainers make their batch of rows in the step
            return
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is not None:
            self._rows += len(ids) / self._rows_shared_by
            self._positions += ids.numel()
        if mask is not None:
            self._tokens = self._tokens + mask.sum()
        elif ids is not None:
            self._tokens = self._tokens + ids.numel()

    def metrics(self) -> tuple[dict[str, float], tuple[float, float] | None]:
        """Figures of all ranks since the last call, which every rank makes.

        The first call returns the tokens of a row and the share of padding too.
        """
        now = time.perf_counter()
        passed = now - (now if self._since is None else self._since) - self._elsewhere
        counted = [int(self._tokens), passed, self._note_peak(), self._rows, self._positions]
        mine = torch.tensor(counted, dtype=torch.float64, device=self._device)
        every = [mine]
        if dist.is_initialized():
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(every, mine)
        tokens, seconds, peaks, rows, positions = torch.stack(every).unbind(1)
        batch = None
        if self._rows and not self._has_told:
            batch = (tokens.sum() / rows.sum()).item(), 1 - (tokens.sum() / positions.sum()).item()
        self._has_told = True
        self._tokens, self._since, self._mark, self._elsewhere = 0, now, now, 0.0
        metrics = {"memory_bytes": peaks.max().item()}
        return metrics | ({"tokens_per_second": (tokens.sum() / seconds.max()).item()} if tokens.sum() else {}), batch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """With the first step the time begins."""
        self._note_peak()
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """From here on the time may be of an evaluation, or of a save."""
        self._note_peak()
        self._mark = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What has passed was an evaluation, or a save."""
        if self._since is not None:  # else it is before the first step
            now = time.perf_counter()
            self._elsewhere += now - self._mark
            self._mark = now

    on_save = on_evaluate

    def _note_peak(self) -> int:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._peak = max(self._peak, peak)
        return self._peak


def describe_batch(tokens_of_row: float, padding: float, could_pack: bool) -> str:
    """A line of what the first batches hold; of much padding it names what helps."""
    way_out = ": --packing true fills rows with several examples" if padding > 0.5 and could_pack else ""
    return f"batches: {tokens_of_row:.0f} tokens a row, {padding:.0%} of a batch is padding{way_out}"


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
        self._evaluated = 0  # batches of the held-out examples, in an evaluation
        self._state, self._first_step, self._began = TrainerState(), 0, 0.0  # what a script logs before training

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the line."""
        self._state, self._first_step, self._began = state, state.global_step, time.monotonic()
        if state.is_world_process_zero and not self._plain:
            self._live = Live(get_renderable=self._render, console=self._console)  # renewed four times a second
            self._live.start()
            self._console.show_cursor(True)  # or a run that is killed leaves a terminal without one

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._evaluated += 1

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Take over what was logged; in plain output print it."""
        logs, self._evaluated = logs or {}, 0
        if "eval_loss" in logs:
            self._values["held_out"] = logs["eval_loss"]
        self._values |= {name: value for name, value in logs.items() if name in _SHOWN | _SPEED}
        if not (self._plain and state.is_world_process_zero):
            return
        step, done = _place(state)
        if "loss" in logs:
            shown = {name: show for name, show in _SHOWN.items() if name != "held_out"}  # it has lines of its own
            self._print(f"step {step}", done, *self._format(shown | _SPEED), self._layers(), self._left())
        elif "eval_loss" in logs:
            self._print(f"step {step}", _SHOWN["held_out"](logs["eval_loss"]))

    def _print(self, *parts: str) -> None:
        print("  ".join(part for part in parts if part), flush=True)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Give the terminal back, and leave the line as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(ratio=1)
        rest = f"evaluating, batch {self._evaluated}" if self._evaluated else self._left()
        figures = [*_place(self._state), rest, *self._format(_SPEED)]
        for _ in figures:
            line.add_column(no_wrap=True)
        step, total = self._state.global_step, max(1, self._state.max_steps)
        bar = ProgressBar(total=total, completed=step, complete_style="cyan", finished_style="green")
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
        taken = self._state.global_step - self._first_step
        if taken < 1:
            return ""
        seconds = (time.monotonic() - self._began) / taken * (self._state.max_steps - self._state.global_step)
        return f"{timedelta(seconds=round(seconds))} left"


def _place(state: TrainerState) -> tuple[str, str]:
    return f"{state.global_step}/{state.max_steps}", f"{100 * state.global_step / max(1, state.max_steps):.0f}%"


def lisa_metrics(lisa: LisaController) -> dict[str, float]:
    """Scalars of a controller for the trackers: active layers, how often each block was sampled, the cost of switches.

    Seconds and bytes are of the last period whose first step is done; update norms of the last one that has ended.
    """
    record = lisa.records[-1]
    metrics = {
        "lisa/period": lisa.period,
        "lisa/switch_seconds": record.seconds,
        "lisa/state_bytes_per_rank": record.state_bytes_per_rank,
        "lisa/bytes_released": record.bytes_released,
        "lisa/live_bytes": record.live_bytes,
        "lisa/host_bytes": record.host_bytes,
    }
    names = [_metric_name(block.name) for block in lisa.blocks.layers]
    for layer, (name, count) in enumerate(zip(names, lisa.visit_counts, strict=True)):
        metrics[f"lisa/active_layers/{name}"] = int(layer in lisa.active_layers)
        metrics[f"lisa/visits/{name}"] = count
    metrics |= {f"lisa/probability/{name}": odds for name, odds in zip(names, record.probabilities, strict=False)}
    learned = lisa.selection.importance.averages if lisa.selection.importance is not None else []
    metrics |= {f"lisa/importance/{name}": seen for name, seen in zip(names, learned, strict=False) if seen is not None}
    metrics |= {f"lisa/visits/{block}": count for block, count in lisa.block_visit_counts.items()}
    moved = lisa.movement.lines[-1]["blocks"] if lisa.movement.lines else {}
    return metrics | {f"lisa/update_norm/{_metric_name(block)}": one["update"] for block, one in moved.items()}


def _metric_name(block: str) -> str:
    """layers.7 as layer_07, for trackers to sort by, and layers.7.mlp.up_proj as layer_07.mlp.up_proj."""
    kind, *numbered = block.split(".", 2)
    return ".".join([f"layer_{int(numbered[0]):02d}", *numbered[1:]]) if numbered else kind


def hide_secrets_of(args: TrainingArguments) -> None:
    """From now on pickles and dicts of `args` have *** in place of tokens, keys and passwords, nested ones too.

    The Trainer pickles its arguments into `training_args.bin`, which `push_to_hub` uploads, and gives their dict to
    trackers. `args` itself, and copies of it, keep what they need for the hub. Pickles load as the class it was.
    """
    plain: Any = type(args)
    if not issubclass(plain, _HidesSecrets):
        hides = type(plain.__name__, (_HidesSecrets, plain), {"__module__": plain.__module__})
        patch(args, "__class__", hides, of="hidden_secrets")


class _HidesSecrets:
    """Put before a class of arguments."""

    def to_dict(self) -> dict[str, Any]:
        arguments: Any = super()
        return hide_secrets(arguments.to_dict())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, plain = type(self).__bases__
        return copyreg._reconstructor, (plain, object, None), _written_state(self)  # type: ignore[attr-defined]

    def __copy__(self) -> Any:  # not by __reduce_ex__, as copies are by default
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def _written_state(args: Any) -> dict[str, Any]:
    state = hide_secrets(vars(args))
    if state.get("deepspeed_plugin") is not None:  # it has DeepSpeed's config as a dict and in two objects
        plugin = state["deepspeed_plugin"] = copy.deepcopy(args.deepspeed_plugin)
        vars(plugin).update(hide_secrets(vars(plugin)))
        for held in vars(plugin).values():
            if isinstance(getattr(held, "config", None), dict):
                held.config = hide_secrets(held.config)
        state["hf_deepspeed_config"] = plugin.hf_ds_config
    return state
