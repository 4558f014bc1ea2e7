"""Memory of one run: how many layers are checkpointed, what a step was planned to need, and what one needed.

The number of checkpointed layers (`core/activation_checkpointing.py`) is set before the first step: as given, or with
"auto" to the fewest with which the plan of the worst period fits the budget. One early step is measured (`StepMeter`).
"auto" then corrects the plan by its error for that step and sets the number again; if the run had planned how many
layers train, and they do not fit, fewer do from the next period on. The run ends with a table of both.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lisa_dist.core.activation_checkpointing import (
    AUTO,
    Checkpointing,
    checkpoint_layers,
    checkpointed_layers,
    fewest_layers,
    let_backward_end,
    number_of_layers,
)
from lisa_dist.core.controller import LisaController
from lisa_dist.distributed.collectives import gather, sharing_errors
from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.memory.estimate import StepEstimate
from lisa_dist.memory.meter import StepMeter
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.memory.workload import MemoryParts, StageSettings, Trained, Workload
from lisa_dist.run_folder import MEMORY_NAME, MEMORY_PARTS
from lisa_dist.text import format_bytes, format_columns


class _MeasuredStep(NamedTuple):
    """One step that was measured, and what the plan of it needs to know."""

    step: int
    workload: Workload | None  # its first micro-batch
    trained: Trained
    parts: MemoryParts


class RunMemory:
    """Sets the number of checkpointed layers, measures one step and reports both; every rank calls every method.

    `config` is the model's, None for a model or a loss that cannot be planned. `longest` is the largest possible
    micro-batch. `checkpointed` is --checkpointed_layers, parsed; `budget` the bytes of a device, and `measure_budget`
    what they are found to be once a step has run; `beside` the bytes of a model that does not train.
    `layers_are_planned`: a plan has chosen how many layers train, not the user. Raises ValueError where "auto" cannot
    plan.
    """

    def __init__(
        self,
        lisa: LisaController,
        ds_config: dict[str, Any],
        *,
        optim: str,
        config: PretrainedConfig | None,
        longest: Workload | None,
        checkpointed: int | str | None,
        budget: int | None,
        measure_budget: Callable[[], int] | None = None,
        beside: int = 0,
        layers_are_planned: bool = False,
    ) -> None:
        assert lisa.is_attached, "attach the controller to a DeepSpeed engine first"
        self._lisa, self._engine = lisa, lisa.engine
        self._longest, self._beside = longest, beside
        self._checkpointed, self._budget, self._measure_budget = checkpointed, budget, measure_budget
        self._model, self._num_layers = self._engine.module, lisa.blocks.num_layers
        self._checkpointing = Checkpointing(self._model)
        self._estimate: StepEstimate | None = None
        if config is not None:
            hidden_size = config.get_text_config().hidden_size
            self._settings = StageSettings.of(ds_config, hidden_size, lisa.gathers_layers)
            self._estimate = StepEstimate(
                FakeRuns(config, on_disk=False),  # no other run has the shapes of this one's micro-batches
                lisa.config,
                self._engine.dp_world_size,
                optim,
                accumulates=self._engine.gradient_accumulation_steps() > 1,
                on_cpu=self._engine.device.type == "cpu",
            )
        self._first_step = self._engine.global_steps
        self._meter: StepMeter | None = None
        self._measured: _MeasuredStep | None = None
        self._micro_batch: Workload | None = None
        self._count: int | None = None  # of checkpointed layers, once it is set
        self._planned_peaks: dict[tuple[int, int], int] = {}  # of the worst period, by layers checkpointed and active
        can_plan = config is not None and longest is not None
        self._corrects_layers = layers_are_planned and can_plan and budget is not None
        if checkpointed == AUTO and not can_plan:
            raise UserError(
                "--checkpointed_layers auto: the largest micro-batch cannot be planned: it takes a --max_length, and a "
                "causal language model with its own loss or TRL's, of which nothing was frozen before. Give none, all "
                "or a number of layers."
            )
        if checkpointed == AUTO and budget is None:
            raise UserError("--checkpointed_layers auto: give --gpu_memory where there is no GPU to ask.")

    def set_checkpointing(self) -> str | None:
        """Checkpoint as many layers as --checkpointed_layers says; a line to print, if there is one."""
        if self._checkpointed is None:
            return None
        if self._checkpointed != AUTO:
            self._count = number_of_layers(self._checkpointed, self._num_layers)
            checkpoint_layers(self._model, self._lisa.blocks, self._count)
            return None
        line = self._set_fewest_layers(plan_error=0)
        if self._lisa.config.lisa_interval_steps == 1:
            line += "; not corrected by a measured step, since each is the first of its period"
        return line

    def restore_checkpointing(self) -> None:
        """Set the number again after a trainer has turned checkpointing off for a moment and then on for all layers."""
        if not self._checkpointing.has_changed():
            return
        blocks = self._lisa.blocks
        if self._count is not None and checkpointed_layers(self._model, blocks) != self._count:
            checkpoint_layers(self._model, blocks, self._count)
        let_backward_end(self._model)
        self._checkpointing.has_changed()  # by this itself

    def begin_step(self, step: int) -> None:
        """Measure this step if it is the first one whose moments exist already."""
        interval = self._lisa.config.lisa_interval_steps
        if self._measured is None and step > self._first_step and step % interval != 0:
            self._meter = StepMeter(self._lisa)
            self._meter.start()

    @property
    def wants_micro_batch(self) -> bool:
        """Whether the step is measured, and the shape of its first micro-batch is not known yet."""
        return self._meter is not None and self._micro_batch is None

    def note_micro_batch(self, workload: Workload | None) -> None:
        """The shape of the measured step's first micro-batch."""
        if self.wants_micro_batch and workload is not None:
            count = checkpointed_layers(self._model, self._lisa.blocks)
            self._micro_batch = replace(workload, checkpointed_layers=count)

    def end_step(self, step: int) -> str | None:
        """Record what the step needed and correct the numbers that are planned; a line to print, if there is one."""
        if self._meter is None:
            return None
        meter, self._meter = self._meter, None
        meter.stop()
        if meter.parts is None:
            return None
        always_on = tuple(name for name in self._lisa.config.always_on if self._lisa.blocks.outer(name).parameters)
        trained = Trained(self._lisa.active_layers, always_on, self._lisa.active_blocks)
        self._measured = _MeasuredStep(step, self._micro_batch, trained, meter.parts)
        if self._checkpointed != AUTO and not self._corrects_layers:
            return None
        if self._measure_budget is not None:
            self._budget = min(gather(self._measure_budget()))
        planned = self._plan_measured_step(self._measured)[0]
        plan_errors = gather(meter.parts.peak - planned.peak if planned else None)
        plan_error = max(error or 0 for error in plan_errors)
        lines = [self._set_fewest_layers(plan_error)] if self._checkpointed == AUTO else []
        lines += self._lower_layers(plan_error) if self._corrects_layers and None not in plan_errors else []
        return f"step {step} took {format_bytes(meter.parts.peak)} at its peak: {'; '.join(lines)}" if lines else None

    def abandon(self) -> None:
        """Measure no more, as when a step has raised."""
        if self._meter is not None:
            self._meter.stop(failed=True)
            self._meter = None

    def report(self) -> dict[str, Any] | None:
        """The measured step's parts in bytes, and what was planned for that step; None where none was measured."""
        if (measured := self._measured) is None:
            return None
        planned, host, problem = self._plan_measured_step(measured)
        if planned is not None and self._engine.device.type == "cuda":  # as its allocator measures them
            planned = replace(planned, activations=planned.activations + planned.logits, logits=0)
        workload = measured.workload
        return {
            "step": measured.step,
            "rows": workload and workload.micro_batch_size,
            "tokens": workload and workload.seq_length,
            "checkpointed_layers": workload and workload.checkpointed_layers,
            "planned": planned and planned.to_dict(),
            "planned_host": host,
            "not_planned": problem,
            "measured": measured.parts.to_dict(),
        }

    def write_report(self, output_dir: str | Path) -> None:
        """Print the report, and write it to lisa_memory.json."""
        report = self.report()
        print(format_report(report), flush=True)
        if report is not None:
            path = Path(output_dir) / MEMORY_NAME
            try:
                with replacing(path) as new:
                    new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            except OSError as error:  # the model is still to be saved
                print(f"{path} could not be written ({error.strerror})", flush=True)

    # The plan

    def _set_fewest_layers(self, plan_error: int) -> str:
        """Checkpoint the fewest layers with which the plan of the worst period fits; a line to print.

        `plan_error`: bytes that a step needs more than is planned for it.
        """
        layers = self._lisa.selection.gamma
        self._count, planned = self._fewest(
            "--checkpointed_layers auto", lambda count: self._planned_peak(count, layers) + plan_error, self._num_layers
        )
        checkpoint_layers(self._model, self._lisa.blocks, self._count)
        return f"{self._count} of {self._num_layers} layers checkpointed, for which {self._compared(planned)}"

    def _lower_layers(self, plan_error: int) -> list[str]:
        """Train as many layers as fit, one at least, from the next period on; a line to print where they are fewer."""
        layers = self._lisa.selection.gamma
        if layers < 2:  # none, where a resumed run trains embedding and head alone
            return []
        count = checkpointed_layers(self._model, self._lisa.blocks)
        fewer, planned = self._fewest(
            "--lisa_activated_layers auto",
            lambda fewer: self._planned_peak(count, layers - fewer) + plan_error,
            layers - 1,
        )
        if fewer == 0:
            return []
        self._lisa.selection.sample_fewer(layers - fewer)
        return [
            f"{layers - fewer} of {self._num_layers} layers train from the next period on, not {layers}, for which "
            f"{self._compared(planned)}"
        ]

    def _fewest(self, flag: str, peak: Callable[[int], int], most: int) -> tuple[int, int]:
        """The lowest number up to `most` whose peak fits, the same on all ranks, and that peak in bytes."""
        chosen = 0, 0
        with sharing_errors():
            if self._engine.global_rank == 0:
                assert self._budget is not None
                try:
                    count = fewest_layers(peak, most, self._budget)
                    chosen = count, peak(count)
                except UserError as error:
                    raise UserError(f"{flag}: {error} Give a number of layers.") from error
        return gather(chosen)[0]

    def _compared(self, planned: int) -> str:
        assert self._budget is not None
        compared = "of" if planned <= self._budget else "and there are"
        return f"at most {format_bytes(planned)} are planned {compared} {format_bytes(self._budget)}"

    def _planned_peak(self, count: int, layers: int) -> int:
        """Bytes that the plan of the worst period needs with `count` layers checkpointed and `layers` active."""
        if (count, layers) not in self._planned_peaks:
            assert self._longest is not None
            assert self._estimate is not None
            workload = replace(self._longest, checkpointed_layers=count)
            config = replace(self._lisa.config, lisa_activated_layers=layers)
            parts, _ = replace(self._estimate, config=config).worst(self._settings, workload)
            self._planned_peaks[count, layers] = parts.with_more("buffers", self._beside).needed
        return self._planned_peaks[count, layers]

    def _plan_measured_step(
        self, measured: _MeasuredStep
    ) -> tuple[MemoryParts | None, dict[str, int] | None, str | None]:
        """Device and host of the measured step as planned, or else why there is no plan."""
        if self._estimate is None or measured.workload is None:
            return None, None, "no causal language model with its own loss or TRL's"
        try:
            rank = self._engine.global_rank
            parts, host = self._estimate.of(self._settings, measured.workload, measured.trained, rank)
            return parts.with_more("buffers", self._beside), host, None
        except UserError as error:
            return None, None, str(error)


def format_report(report: dict[str, Any] | None) -> str:
    """The table at the end of a run: each part as planned for the measured step, and as measured."""
    if report is None:
        return "memory: no step was measured, since each is the first of its period or of the run"
    planned, measured = report["planned"], report["measured"]
    lines = [["", "planned", "measured"]]
    for title, fields in [*MEMORY_PARTS, ("peak", ("peak",))]:
        sums = [sum(parts[name] for name in fields) if parts else None for parts in (planned, measured)]
        lines.append([title, *("-" if size is None else format_bytes(size) for size in sums)])
    shape = f"step {report['step']}"
    if report["rows"]:
        shape += f", {report['rows']} x {report['tokens']} tokens, {report['checkpointed_layers']} layers checkpointed"
    note = f"\nnot planned: {report['not_planned']}" if report["not_planned"] else ""
    return f"memory of {shape}, on each rank\n{format_columns(lines)}{note}"
