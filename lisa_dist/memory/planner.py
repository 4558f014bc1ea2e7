"""Plans: the memory that a run needs under each DeepSpeed config, the fastest that fits, and its command."""

import copy
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.checkpointing import AUTO, fewest_layers, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.engine_checks import prepare_ds_config
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.ds_config import read_ds_config
from lisa_dist.errors import UserError
from lisa_dist.loss.label_logits import why_no_label_logits
from lisa_dist.memory.estimate import plan_memory
from lisa_dist.memory.kept_states import kept_states
from lisa_dist.memory.periods import widest_periods
from lisa_dist.memory.plan import DTYPES, NO_DATA, Plan, PlanArguments
from lisa_dist.memory.stage_settings import StageSettings
from lisa_dist.memory.step_trace import StepTrace
from lisa_dist.memory.trace import FakeRun, FakeRuns
from lisa_dist.memory.workload import CHUNKED, LOGITS, RATIO, SCORE, Group, Trained, Workload
from lisa_dist.model_names import name_or_folder
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.run_folder import PLANNED_PARTS, REFERENCE
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import BYTE_UNITS, format_bytes, format_columns

LOSS_OF_TASK = {"orpo": RATIO, REWARD: SCORE}  # of the others TRL computes what it needs of the logits in chunks


class Planner:
    """Plans of one model and method; a step is traced once for each loss and number of checkpointed layers.

    `on_cpu`: of ranks that have no GPU, where device and host are one. The model's `runs` may be shared by planners.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        arguments: PlanArguments,
        lisa_config: LisaConfig,
        on_cpu: bool = False,
        runs: FakeRuns | None = None,
    ) -> None:
        self._config, self._arguments, self._lisa, self._on_cpu = config, arguments, lisa_config, on_cpu
        self._runs = runs or FakeRuns(config)
        self._traces: dict[tuple[int, str, bool], tuple[FakeRun, list[tuple[list[Group], StepTrace]]]] = {}
        self.num_layers = number_of_decoder_layers(config)
        if arguments.method == "lisa":
            lisa_config.check_num_layers(self.num_layers)
            if lisa_config.lisa_weights_file is not None:
                load_layer_weights(lisa_config.lisa_weights_file, self.num_layers, lisa_config.lisa_activated_layers)
        elif lisa_config != LisaConfig(lisa_layers_attribute=lisa_config.lisa_layers_attribute):
            raise UserError(f"--method {arguments.method}: flags that begin with --lisa_ are for --method lisa.")
        if arguments.method != "lisa" and arguments.optim == LISA_ADAMW:
            raise UserError(
                f"--optim {LISA_ADAMW} with --method {arguments.method}: it is for --method lisa; give another, such "
                "as adamw_torch_fused."
            )
        given = parse_checkpointed_layers(arguments.checkpointed_layers)
        # The number of checkpointed layers; None: the fewest that fit.
        self._count = None if given is None or given == AUTO else number_of_layers(given, self.num_layers)
        if arguments.method != "lisa" and self._count not in (None, 0, self.num_layers):
            raise UserError(
                f"--checkpointed_layers {self._count} with --method {arguments.method}: it checkpoints all layers or "
                f"none; give none or all."
            )

    @property
    def _keeps(self) -> bool:
        return self._arguments.method == "lisa" and self._lisa.lisa_state == "keep"

    @property
    def given_count(self) -> int:
        """The number of checkpointed layers that was given; all, where it was left to the plans."""
        return self.num_layers if self._count is None else self._count

    def plan(self, ds_config: str | dict, checkpointed_layers: int, loss: str) -> Plan:
        """The plan of the worst period under one DeepSpeed config: short name, path, or its content."""
        arguments = self._arguments
        settings = StageSettings.of(self._read(ds_config), self._config.get_text_config().hidden_size)
        by_rows = settings.reduces_rows(arguments.optim, arguments.method)
        run, periods = self._trace(checkpointed_layers, loss, by_rows)
        planned = [
            plan_memory(
                run,
                groups,
                trace,
                settings,
                arguments.gpus,
                optim=arguments.optim,
                master=self._lisa.lisa_master,
                accumulates=arguments.gradient_accumulation_steps > 1,
                on_cpu=self._on_cpu,
                plain=arguments.method != "lisa",
                keeps=self._keeps,
            )
            for groups, trace in periods
        ]
        parts = max((parts for parts, _ in planned), key=lambda parts: parts.needed)
        host = max((host for _, host in planned), key=lambda host: sum(host.values()))
        if arguments.has_reference:
            whole = sum(parameter.nbytes for parameter in run.model.parameters())
            share = -(-whole // arguments.gpus) if settings.stage == 3 else whole
            if settings.offload_param:
                host = host | {"reference model": share}
            else:
                parts = parts.with_reference(share)
        if self._keeps:
            host = host | {"kept states": kept_states(run, self._lisa, settings.stage, arguments.gpus, arguments.optim)}
        if self._lisa.lisa_frozen_bits != 16:
            originals = sum(module.weight.nbytes for module in run.held_modules([]))
            host = host | {"originals of the layers": -(-originals // min(arguments.gpus, arguments.gpus_per_host))}
        return Plan(str(ds_config), run.workload, parts, host, self._lisa)

    def _read(self, given: str | dict) -> dict:
        ds_config = copy.deepcopy(given) if isinstance(given, dict) else read_ds_config(given)
        prepare_ds_config(ds_config, self._lisa, self._arguments.optim, self._arguments.precision)
        return ds_config

    def cheapest(self, ds_config: str | dict) -> Plan:
        """With the fewest checkpointed layers that fit, since recomputing only costs; of other methods none or all."""
        return self.choose_loss(ds_config)[0]

    def choose_loss(self, ds_config: str | dict) -> tuple[Plan, str]:
        """The cheapest plan, and why it has its loss.

        --loss auto keeps logits where they fit and no layer need be checkpointed for them; where nothing fits, the loss
        that needs less is planned.
        """
        given, task = self._arguments.loss, self._arguments.task
        if task != SFT:
            return self._fewest_layers(ds_config, LOSS_OF_TASK.get(task, CHUNKED)), f"TRL's of {task}"
        why_not = why_no_label_logits(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self._config), None))
        if given == LOGITS and why_not:
            raise UserError(f"--loss logits: {why_not}; give --loss chunked.")
        if given != AUTO or why_not:
            loss = CHUNKED if given == AUTO else given
            return self._fewest_layers(ds_config, loss), f"auto: {why_not}" if given == AUTO else f"--loss {given}"
        kept = self._fewest_layers(ds_config, LOGITS)
        needed = f"{format_bytes(kept.gpu.needed)} planned with logits"
        if kept.lacks(self._arguments)[0]:
            chunked, why = self._fewest_layers(ds_config, CHUNKED), f"auto: {needed}, and there are "
            return min(chunked, kept, key=lambda plan: plan.gpu.needed), why + format_bytes(self._arguments.budget)
        count = kept.workload.checkpointed_layers
        if self._count is None and count:
            fewer = count - 1 if self._arguments.method == "lisa" else 0
            if not self.plan(ds_config, fewer, CHUNKED).lacks(self._arguments)[0]:
                return self._fewest_layers(ds_config, CHUNKED), "auto: with logits more layers would be checkpointed"
        return kept, f"auto: {needed}, of {format_bytes(self._arguments.budget)}"

    def _fewest_layers(self, ds_config: str | dict, loss: str) -> Plan:
        if self._count is not None:
            return self.plan(ds_config, self._count, loss)
        if self._arguments.method == "lisa":

            def peak(count: int) -> int:
                return self.plan(ds_config, count, loss).gpu.needed

            return self.plan(ds_config, fewest_layers(peak, self.num_layers, self._arguments.budget), loss)
        none = self.plan(ds_config, 0, loss)
        return none if not none.lacks(self._arguments)[0] else self.plan(ds_config, self.num_layers, loss)

    def _trace(
        self, checkpointed_layers: int, loss: str, by_rows: bool
    ) -> tuple[FakeRun, list[tuple[list[Group], StepTrace]]]:
        if (checkpointed_layers, loss, by_rows) not in self._traces:
            arguments = self._arguments
            workload = Workload(
                arguments.seq_length,
                arguments.rows,
                DTYPES[arguments.precision],
                checkpointed_layers,
                loss=loss,
                triton=not self._on_cpu,
                padded=arguments.rows > 1,
                frozen_bits=self._lisa.lisa_frozen_bits,
                by_module=self._lisa.by_module,
            )
            lora_rank = arguments.lora_r if arguments.method == "lora" else 0
            run = self._runs.of(workload, lora_rank, self._lisa.lisa_layers_attribute)
            config = self._lisa
            periods: Sequence[Trained | None] = [None]
            if arguments.method == "lisa":
                sampled = sampled_blocks(config, run.blocks)
                periods = widest_periods(config, run.blocks, sampled, checkpointed_layers)
            traces = []
            for period in periods:
                groups = run.groups(period, arguments.optim, config.state_bits, config.offloaded, by_rows)
                traces.append((groups, run.trace(groups)))
            self._traces[checkpointed_layers, loss, by_rows] = run, traces
        return self._traces[checkpointed_layers, loss, by_rows]


_PREFERENCES = {"dataset_name": "trl-lib/ultrafeedback_binarized"}
# Data of the hub that a run of each task takes as they are.
_EXAMPLES: dict[str, dict[str, str]] = {
    SFT: {"dataset_name": "openai/gsm8k", "dataset_config": "main"},
    "dpo": _PREFERENCES,
    "kto": {"dataset_name": "trl-lib/kto-mix-14k"},
    "orpo": _PREFERENCES,
    "reward": _PREFERENCES,
    "grpo": {"dataset_name": "trl-lib/tldr"},
}


def command_for(plan: Plan, arguments: PlanArguments, learning_rate: float | None = None) -> str:
    """The command that starts the run of a plan; where no data were given, on those of the hub for its task."""
    data = {"dataset_name": arguments.dataset_name}
    flags: dict[str, Any] = {
        "model_name_or_path": name_or_folder(arguments.model),
        **(_EXAMPLES[arguments.task] if arguments.dataset_name == NO_DATA else data),
        "output_dir": f"runs/{Path(name_or_folder(arguments.model)).name}",
        "method": arguments.method,
        "deepspeed": plan.ds_config,
    }
    flags |= {"task": arguments.task} if arguments.task != SFT else {}
    flags |= {"precompute_ref_log_probs": True} if arguments.precompute_ref_log_probs else {}
    flags |= {"beta": arguments.beta} if arguments.beta is not None else {}
    flags |= {"per_device_train_batch_size": arguments.micro_batch_size, "max_length": arguments.seq_length}
    flags |= {"optim": arguments.optim, "bf16": arguments.precision == "bf16"}
    if arguments.task == "grpo":  # seq_length is of a prompt and its answer
        group = next(size for size in range(8, 0, -1) if arguments.answers % size == 0)
        group = group if group > 1 else arguments.answers
        reward = "think_format_reward" if arguments.dataset_name == NO_DATA else "rewards.py"
        flags |= {"max_completion_length": flags.pop("max_length") // 2, "reward_funcs": reward}
        flags |= {"num_generations": group}
    if arguments.loss != AUTO or plan.workload.loss == LOGITS:
        flags |= {"loss": LOGITS if arguments.loss == AUTO else arguments.loss}
    if arguments.gradient_accumulation_steps > 1:
        flags |= {"gradient_accumulation_steps": arguments.gradient_accumulation_steps}
    if arguments.method == "lora":
        flags |= {"lora_r": arguments.lora_r, "lora_dropout": 0.0}  # whose masks the plan does not count
    if arguments.method != "lisa":
        flags |= {"checkpointed_layers": "all" if plan.workload.checkpointed_layers else "none"}
    else:
        flags |= {"checkpointed_layers": plan.workload.checkpointed_layers}
        defaults = LisaConfig().to_dict()
        always = () if plan.lisa_config.by_module else ("lisa_activated_layers",)  # which without it have a preset
        given = plan.lisa_config.to_dict()
        flags |= {name: value for name, value in given.items() if name in always or value != defaults[name]}
    flags |= {} if learning_rate is None else {"learning_rate": learning_rate}
    words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    hosts = -(-arguments.gpus // arguments.gpus_per_host)
    if hosts == 1:
        return f"lisa-dist train --gpus {arguments.gpus} {words}"
    several = f"--hostfile hostfile --num_nodes {hosts} --num_gpus {arguments.gpus_per_host}"
    return f"deepspeed {several} --no_local_rank --module lisa_dist.cli train {words}"


def format_plans(plans: Sequence[Plan], arguments: PlanArguments) -> str:
    """The table: a row for each part, a column for each DeepSpeed config."""
    unit, name = _unit_of(plans)

    def shown(size: int) -> str:
        return f"{size / unit:.2f}" if size else "-"

    checkpointed = [f"{plan.workload.checkpointed_layers} checkpointed" for plan in plans]
    lines = [[f"{name} on each GPU", *(plan.ds_config for plan in plans)], ["layers", *checkpointed]]
    if arguments.method == "lisa" and not plans[0].lisa_config.by_module:
        lines.append(["", *(f"{plan.lisa_config.lisa_activated_layers} active" for plan in plans)])
    lines.append(["loss", *(plan.workload.loss for plan in plans)])
    for title, fields in PLANNED_PARTS:
        if title == REFERENCE[0] and not arguments.has_reference:
            continue
        lines.append([title, *(shown(sum(plan.gpu.to_dict()[name] for name in fields)) for plan in plans)])
    lines.append(["peak", *(shown(plan.gpu.peak) for plan in plans)])
    lines.append(["and held by other streams", *(shown(plan.gpu.pool) for plan in plans)])
    lines.append([f"{name} on the host, a rank", *(shown(plan.host_bytes) for plan in plans)])
    for title in dict.fromkeys(title for plan in plans for title in plan.host):
        lines.append([f"  {title}", *(shown(plan.host.get(title, 0)) for plan in plans)])
    lines.append(["fits", *("yes" if not any(plan.lacks(arguments)) else "no" for plan in plans)])
    return format_columns(lines)


def _unit_of(plans: Sequence[Plan]) -> tuple[int, str]:
    """The largest unit of which every plan's peak has a tenth at least."""
    smallest = min(plan.gpu.peak for plan in plans)
    return next((unit, name) for unit, name in BYTE_UNITS if smallest >= unit / 10 or name == "KiB")


def plot_plans(plans: Sequence[Plan], arguments: PlanArguments) -> None:
    """Draw a bar of stacked parts for each plan, and the budget as a line, to `--plot`."""
    assert arguments.plot is not None
    from matplotlib.figure import Figure  # slow to import, and a table does not need it

    unit, name = _unit_of(plans)
    figure = Figure(figsize=(1.5 * len(plans) + 3, 5), layout="constrained")
    axes = figure.subplots()
    names, bottoms = [plan.ds_config for plan in plans], [0.0] * len(plans)
    for title, fields in PLANNED_PARTS:
        heights = [sum(plan.gpu.at_peak()[name] for name in fields) / unit for plan in plans]
        if any(heights):
            axes.bar(names, heights, bottom=bottoms, label=title)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    if arguments.budget / unit <= 5 * max(bottoms):  # else the bars of a small model could not be seen
        axes.axhline(arguments.budget / unit, color="black", linestyle="--", label="budget")
    axes.set_ylabel(f"{name} on each GPU at the peak")
    axes.set_title(f"{Path(arguments.model).name}, {arguments.method}, {arguments.gpus} GPU(s)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(arguments.plot, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {arguments.plot}: cannot be written ({error}).") from error
