"""Plans: the memory that a run needs under each DeepSpeed config, the fastest that fits, and its command."""

import copy
import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lisa_dist.config import AUTO_LAYERS, LisaConfig
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.core.checkpointing import AUTO, fewest_layers, number_of_layers, parse_checkpointed_layers
from lisa_dist.core.engine_config import prepare_ds_config
from lisa_dist.core.label_logits import why_no_label_logits
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.ds_config import read_ds_config, uses_optimizer_offload
from lisa_dist.errors import UserError
from lisa_dist.memory.estimate import plan_memory
from lisa_dist.memory.kept_states import kept_states
from lisa_dist.memory.known_models import name_or_folder
from lisa_dist.memory.periods import widest_periods
from lisa_dist.memory.plan import DTYPES, WAYS, Plan, PlanArguments
from lisa_dist.memory.stage_settings import StageSettings
from lisa_dist.memory.trace import CHUNKED, LOGITS, RATIO, SCORE, FakeRun, Group, StepTrace, Trained, Workload
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.run_folder import PLANNED_PARTS, REFERENCE
from lisa_dist.tasks import REWARD, SFT
from lisa_dist.text import BYTE_UNITS, format_bytes, format_columns

LOSS_OF_TASK = {"orpo": RATIO, REWARD: SCORE}  # of the others TRL computes what it needs of the logits in chunks
# What else would make room for a layer: settings, and the optimizer that they need, if it is a certain one.
_SMALLER: tuple[tuple[str | None, dict[str, Any]], ...] = (
    (LISA_ADAMW, {"lisa_state_bits": "embed=factored,head=factored,layers=8", "lisa_master": "bf16_sr"}),
    (None, {"lisa_frozen_bits": 4}),
    (None, {"lisa_always_on": "rest"}),
)


class Planner:
    """Plans of one model and method; a step is traced once for each loss and number of checkpointed layers.

    `on_cpu`: of ranks that have no GPU, where device and host are one.
    """

    def __init__(
        self, config: PretrainedConfig, arguments: PlanArguments, lisa_config: LisaConfig, on_cpu: bool = False
    ) -> None:
        self._config, self._arguments, self._lisa, self._on_cpu = config, arguments, lisa_config, on_cpu
        self._traces: dict[tuple[int, str, bool], tuple[FakeRun, list[tuple[list[Group], StepTrace]]]] = {}
        self.num_layers = number_of_decoder_layers(config)
        if arguments.method == "lisa":
            lisa_config.check_num_layers(self.num_layers)
            if lisa_config.lisa_weights_file is not None:
                load_layer_weights(lisa_config.lisa_weights_file, self.num_layers, lisa_config.lisa_activated_layers)
        elif lisa_config != LisaConfig():
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
            )
            for groups, trace in periods
        ]
        parts = max((parts for parts, _ in planned), key=lambda parts: parts.peak)
        host = max((host for _, host in planned), key=lambda host: sum(host.values()))
        if arguments.has_reference:
            whole = sum(parameter.nbytes for parameter in run.model.parameters())
            share = -(-whole // arguments.gpus) if settings.stage == 3 else whole
            if settings.offload_param:
                host = host | {"reference model": share}
            else:
                parts = parts.with_reference(share)
        if arguments.method == "lisa" and self._lisa.lisa_state == "keep":
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
        needed = f"{format_bytes(kept.gpu.peak)} planned with logits"
        if kept.lacks(self._arguments)[0]:
            chunked, why = self._fewest_layers(ds_config, CHUNKED), f"auto: {needed}, and there are "
            return min(chunked, kept, key=lambda plan: plan.gpu.peak), why + format_bytes(self._arguments.budget)
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
                return self.plan(ds_config, count, loss).gpu.peak

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
            run = FakeRun(self._config, workload, lora_rank, self._lisa.lisa_layers_attribute)
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


def with_most_layers(
    config: PretrainedConfig,
    arguments: PlanArguments,
    lisa_config: LisaConfig,
    ds_config: str | dict,
    on_cpu: bool = False,
) -> LisaConfig:
    """The settings of a run with a number in the place of auto; as they are where they have one.

    Layers come before checkpointing less: the number is planned with all layers checkpointed, where the run may choose,
    and with the loss that needs less. Raises UserError, with the closest three settings, where not one layer fits.
    """
    if lisa_config.lisa_activated_layers != AUTO_LAYERS:
        return lisa_config
    num_layers = number_of_decoder_layers(config)
    checkpointed = "all" if arguments.checkpointed_layers == AUTO else arguments.checkpointed_layers

    losses = _losses(config, arguments)

    def peak_of(settings: LisaConfig, layers: int, optim: str | None = None) -> int:
        asked = replace(arguments, checkpointed_layers=checkpointed, optim=optim or arguments.optim)
        planner = Planner(config, asked, replace(settings, lisa_activated_layers=layers), on_cpu)
        peaks = {loss: planner.plan(ds_config, planner.given_count, loss).gpu.peak for loss in losses}
        losses[:] = [min(losses, key=lambda loss: peaks[loss])]  # the one that needs less does so for any number
        return peaks[losses[0]]

    peak = functools.cache(lambda frozen: peak_of(lisa_config, num_layers - frozen))
    frozen = fewest_layers(peak, num_layers - 1, arguments.budget)
    if peak(frozen) > arguments.budget:
        raise UserError(
            f"--lisa_activated_layers auto: not one layer fits {format_bytes(arguments.budget)}: with one "
            f"{format_bytes(peak(frozen))} are planned. {_closest_settings(peak_of, lisa_config)}"
        )
    return replace(lisa_config, lisa_activated_layers=num_layers - frozen)


def _losses(config: PretrainedConfig, arguments: PlanArguments) -> list[str]:
    """How a step may compute its loss."""
    if arguments.task != SFT:
        return [LOSS_OF_TASK.get(arguments.task, CHUNKED)]
    if arguments.loss != AUTO:
        return [arguments.loss]
    why_not = why_no_label_logits(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    return [CHUNKED] if why_not else [CHUNKED, LOGITS]


def _closest_settings(peak_of: Callable[[LisaConfig, int, str | None], int], lisa_config: LisaConfig) -> str:
    """What would make room for a layer, in addition to what is given, from the smallest peak on."""
    found = []
    for optim, settings in _SMALLER:
        try:
            peak = peak_of(replace(lisa_config, **settings), 1, optim)
        except UserError:  # they do not go with what is given
            continue
        flags = settings if optim is None else {"optim": optim, **settings}
        found.append((peak, " ".join(f"--{name} {value}" for name, value in flags.items())))
    return f"The closest: {'; '.join(f'{flags} takes {format_bytes(peak)}' for peak, flags in sorted(found))}."


def make_plans(
    config: PretrainedConfig, arguments: PlanArguments, lisa_config: LisaConfig, ways: Sequence[str] = WAYS
) -> list[Plan]:
    """A plan under each DeepSpeed config, or under --deepspeed alone, from the fastest to the slowest."""
    planner = None if lisa_config.lisa_activated_layers == AUTO_LAYERS else Planner(config, arguments, lisa_config)
    refused: UserError | None = None
    ways = [arguments.deepspeed] if arguments.deepspeed else list(ways)
    if lisa_config.offloaded and not arguments.deepspeed:  # the flag says what is offloaded, whatever a config says
        ways = [way for way in ways if not uses_optimizer_offload(read_ds_config(way))]
    plans = []
    for way in ways:
        try:
            prepare_ds_config(read_ds_config(way), lisa_config, arguments.optim, arguments.precision)
            of_way = planner or Planner(config, arguments, with_most_layers(config, arguments, lisa_config, way))
        except UserError as error:
            refused = error  # 8-bit moments are not for DeepSpeed's host AdamW; not one layer fits
            continue
        plans.append(of_way.cheapest(way))
    if not plans:
        assert refused is not None
        raise refused
    return plans


def command_for(plan: Plan, arguments: PlanArguments) -> str:
    """The command that starts the run of a plan; DATA stands for data that was not given."""
    flags: dict[str, Any] = {
        "model_name_or_path": name_or_folder(arguments.model),
        "dataset_name": arguments.dataset_name,
        "output_dir": f"runs/{Path(name_or_folder(arguments.model)).name}",
        "method": arguments.method,
        "deepspeed": plan.ds_config,
    }
    flags |= {"task": arguments.task} if arguments.task != SFT else {}
    flags |= {"per_device_train_batch_size": arguments.micro_batch_size, "max_length": arguments.seq_length}
    flags |= {"optim": arguments.optim, "bf16": arguments.precision == "bf16"}
    if arguments.task == "grpo":  # seq_length is of a prompt and its answer
        group = next(size for size in range(8, 0, -1) if arguments.answers % size == 0)
        group = group if group > 1 else arguments.answers
        flags |= {"max_completion_length": flags.pop("max_length") // 2, "reward_funcs": "rewards.py"}
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
        flags |= {name: value for name, value in plan.lisa_config.to_dict().items() if value != defaults[name]}
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
    if len({plan.lisa_config.lisa_activated_layers for plan in plans}) > 1:
        lines.append(["", *(f"{plan.lisa_config.lisa_activated_layers} active" for plan in plans)])
    lines.append(["loss", *(plan.workload.loss for plan in plans)])
    for title, fields in PLANNED_PARTS:
        if title == REFERENCE[0] and not arguments.has_reference:
            continue
        lines.append([title, *(shown(sum(plan.gpu.to_dict()[name] for name in fields)) for plan in plans)])
    lines.append(["peak", *(shown(plan.gpu.peak) for plan in plans)])
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


def _slowness(plan: Plan) -> tuple[int, int]:
    """Stages 1 and 2 send the same; among them the one that recomputes less is faster. Then the order of WAYS."""
    place = WAYS.index(plan.ds_config) if plan.ds_config in WAYS else len(WAYS)
    return max(place, 1), plan.workload.checkpointed_layers


def what_fits(plans: Sequence[Plan], arguments: PlanArguments) -> Plan:
    """The fastest plan that fits. Raises ValueError with the closest three, and what each lacks, when none does."""
    fitting = [plan for plan in plans if not any(plan.lacks(arguments))]
    if fitting:
        return min(fitting, key=_slowness)
    closest = sorted(plans, key=lambda plan: sum(plan.lacks(arguments)))[:3]
    listed = "; ".join(
        f"{plan.ds_config} lacks {format_bytes(plan.lacks(arguments)[0])} on a GPU and "
        f"{format_bytes(plan.lacks(arguments)[1])} on the host"
        for plan in closest
    )
    raise UserError(
        f"--gpu_memory {arguments.gpu_memory} on {arguments.gpus} GPU(s): nothing fits. "
        f"The closest: {listed}. More GPUs, a shorter --seq_length, --lisa_state_bits embed=8,head=8, or "
        "--lisa_always_on rest (embed and head sampled as layers are; not with --lisa_unit module) need less."
    )
