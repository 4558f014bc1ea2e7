"""What every run logs, whatever its method: tokens a second, memory, the line of its progress; and no secrets."""

import copy
import copyreg
import functools
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
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
from lisa_dist.distributed.health import SLOW, ComputeTime
from lisa_dist.patches import patch
from lisa_dist.run_folder import hide_secrets
from lisa_dist.train.progress import Progress
from lisa_dist.zero.parameters import parameter_numel

_SLOW_LOGS = 3  # in so many logs one after another a rank must be slow to be named


if TYPE_CHECKING:
    _TrainerClass: TypeAlias = Any  # whichever class of Trainer the mixin is put before
else:
    _TrainerClass = object


class MonitoredMixin(_TrainerClass):
    """Put before a Trainer class: adds `tokens_per_second` and `memory_bytes` to its logs, and shows `Progress`.

    Tokens are those of all ranks, padding not counted; their time is that between two logs, without that of evaluating
    and saving. Memory is the highest peak of any rank since the start: of tensors on a GPU, of the process on CPUs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        if any(one.__module__.partition(".")[0] == "trl" for one in type(self).__mro__):  # else it is not imported
            from lisa_dist.loss.chunked import use_slabs

            use_slabs()
        super().__init__(*args, **kwargs)
        hide_secrets_of(self.args)
        self._meter = SpeedMeter(self.args.device)
        self.add_callback(self._meter)
        self._progress = Progress(self.active_now, plain=self.args.disable_tqdm)
        if self.pop_callback(ProgressCallback) is not None or self.pop_callback(PrinterCallback) is not None:
            self.add_callback(self._progress)

    @property
    def stopped_by(self) -> str | None:
        """The signal that ended training early, if one did."""
        return None

    def _print(self, text: str | None) -> None:
        if text is not None and self.args.should_log:
            print(text, flush=True)

    def _warn_if_stopped(self, folder: Path) -> None:
        """Where a model is saved: a script of one's own may not have looked at `stopped_by`."""
        if self.stopped_by is not None:
            done = f"{self.state.global_step} of {self.state.max_steps} steps"
            self._print(f"warning: {self.stopped_by} ended the run after {done}: {folder} is no finished model.")

    def active_now(self) -> str:
        """What trains now, for the line of the progress; "" where it is everything."""
        return ""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; whatever ends it, the terminal is given back."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.stop()

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
            logs = logs | self._meter.metrics()
            if self._meter.batch is not None:
                self.accelerator.print(describe_batch(*self._meter.batch, getattr(self.args, "packing", None) is False))
                self._meter.batch = None
        super().log(logs, *args, **kwargs)


class SlowRanks:
    """The rank that computes longest, for the logs; a warning where it is the same one several times in a row."""

    def __init__(self, compute_time: ComputeTime):
        self._compute_time = compute_time
        self._rank, self._times_in_a_row = -1, 0

    def measure(self) -> tuple[dict[str, float], str | None]:
        """Metrics since the last call and a warning, if there is one; all ranks call it."""
        rank, ratio, host = self._compute_time.slowest()
        self._times_in_a_row = (self._times_in_a_row + 1 if rank == self._rank else 1) if ratio > SLOW else 0
        self._rank = rank if ratio > SLOW else -1
        warning = None
        if self._times_in_a_row >= _SLOW_LOGS:
            warning = f"rank {rank} on host {host} computes {ratio:.2f} times as long as the median rank"
        return {"lisa/slowest_rank": rank, "lisa/slowest_rank_times_median": ratio}, warning


class SpeedMeter(TrainerCallback):
    """Tokens, seconds and memory between two logs."""

    def __init__(self, device: torch.device):
        self._device = device
        self._tokens: int | torch.Tensor = 0  # on the device, for nothing to wait for it
        self._rows = self._positions = 0  # with padding
        self._has_told = False
        self.batch: tuple[float, float] | None = None  # tokens a row and the share of padding, with the first log alone
        self._since: float | None = None  # the last log, or the first step
        self._mark = 0.0  # the last end of a step, of an evaluation or of a save
        self._elsewhere = 0.0  # seconds of evaluation and saving
        self._peak = 0  # bytes; kept here, since measuring a step sets the GPU's own record back

    def count(self, inputs: object) -> None:
        """Count the tokens of a micro-batch of this rank."""
        if not isinstance(inputs, Mapping):  # some trainers make their batch of rows in the step
            return
        if inputs.get("attention_mask") is not None:
            self._tokens = self._tokens + inputs["attention_mask"].sum()
        elif "input_ids" in inputs:
            self._tokens = self._tokens + inputs["input_ids"].numel()
        if "input_ids" in inputs:
            self._rows += len(inputs["input_ids"])
            self._positions += inputs["input_ids"].numel()

    def metrics(self) -> dict[str, float]:
        """Figures of all ranks since the last call, which every rank makes."""
        now = time.perf_counter()
        passed = now - (now if self._since is None else self._since) - self._elsewhere
        counted = [int(self._tokens), passed, self._note_peak(), self._rows, self._positions]
        mine = torch.tensor(counted, dtype=torch.float64, device=self._device)
        every = [mine]
        if dist.is_initialized():
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(every, mine)
        tokens, seconds, peaks, rows, positions = torch.stack(every).unbind(1)
        if self._rows and not self._has_told:
            self.batch = (tokens.sum() / rows.sum()).item(), 1 - (tokens.sum() / positions.sum()).item()
        self._has_told = True
        self._tokens, self._since, self._elsewhere = 0, now, 0.0
        self._mark = now
        metrics = {"memory_bytes": peaks.max().item()}
        return metrics | ({"tokens_per_second": (tokens.sum() / seconds.max()).item()} if tokens.sum() else {})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With the first step the time begins."""
        self._note_peak()
        if self._since is None:
            self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """From here on the time may be of an evaluation, or of a save."""
        self._note_peak()
        self._mark = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What has passed was an evaluation."""
        if self._since is None:  # before the first step
            return
        now = time.perf_counter()
        self._elsewhere += now - self._mark
        self._mark = now

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What has passed was a save."""
        self.on_evaluate(args, state, control)

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
