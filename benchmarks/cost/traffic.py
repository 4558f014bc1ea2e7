"""Formulas of what ranks send in a step: bytes of each collective, from a method's layout and its DeepSpeed config.

Bytes are those of the whole tensor: of what a reduction takes in, of what an all-gather gives out. On the wire a ring
of N ranks puts, of each rank and byte, 2(N - 1)/N for an all-reduce and (N - 1)/N for everything else. What is no
weight and no gradient (norms, flags, digests, the set of layers) stands for itself, as "control", but for LISA's norms,
which go together and are numbers like gradients.

By DeepSpeed 0.19, without offload or gradient checkpointing:

- Stages 1 and 2 sum gradients by all-reduce, though each rank keeps a part alone (use_multi_rank_bucket_allreduce),
  and gather weights by group of the optimizer, whatever has trained of it.
- Stage 3 sums gradients by reduce-scatter and gathers a parameter whenever a module wants it and it is not there. It
  is there still where it is small enough to stay (stage3_param_persistence_threshold: gathered once, after the step),
  where its next use was near enough (stage3_max_reuse_distance), or where it was fetched ahead. So a model within the
  reuse distance is gathered once a step, and a matrix whose two uses are further apart twice.

communication.py holds these formulas against what it counts.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.common.methods import Method
from benchmarks.common.runs import adapted, model_of, shrunk_config
from lisa_dist import load_ds_config
from lisa_dist.core.blocks import Blocks, find_blocks
from lisa_dist.core.movement import SAMPLE
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.core.selection import BlockSelection

PERIOD = 20  # steps of a real run's period, over which a switch is spread
CONTROL = "control: "


# What the formulas know of a run


@dataclass(frozen=True)
class Visit:
    """A step enters a module or leaves it; `params` are what the module itself computes with, by name."""

    enters: bool
    module: int
    params: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A method's model in numbers: elements by parameter, parameters by group of the optimizer, what has gradients."""

    numel: dict[str, int]
    groups: list[list[str]]
    trained: list[str]
    blocks: dict[str, list[str]]  # of those that LISA may train
    visits: list[Visit]  # of one forward and backward pass
    norms_together: bool = False  # with one collective for all groups, as LISA takes them, and not one for each

    @property
    def active_share(self) -> float:
        """Elements with gradients, in parts of all of the model."""
        model = [name for name in self.numel if ".lora_" not in name]
        return sum(self.numel[name] for name in self.trained) / sum(self.numel[name] for name in model)


@dataclass(frozen=True)
class Settings:
    """Of a run: ranks, bytes of an element, and the DeepSpeed config without "auto"."""

    world: int
    element: int
    zero: DeepSpeedZeroConfig

    @classmethod
    def of(cls, ds_config: str | dict, config: PretrainedConfig, world: int, dtype: torch.dtype) -> "Settings":
        """The settings of a model's config."""
        filled = load_ds_config(ds_config, model=model_of(config, dtype))
        return cls(world, dtype.itemsize, DeepSpeedZeroConfig(**filled["zero_optimization"]))

    def padded(self, numel: int) -> int:
        """Elements of a parameter that is cut into equal parts, one a rank (stage 3)."""
        return ceil(numel / self.world) * self.world


def layout_of(method: Method, model: str, shrink: int, num_layers: int | None, active: Sequence[int]) -> Layout:
    """The layout of a method in which the layers `active` train; nothing of it comes from a run that is counted."""
    config = shrunk_config(model, shrink, num_layers)
    whole, groups, blocks = _prepared(method, config, active, "meta")
    # The order of modules is that of a model of the same kind, 32 wide.
    narrow, *_ = _prepared(
        method, shrunk_config(model, shrunk_config(model).hidden_size // 32, num_layers), active, "cpu"
    )
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    return Layout(
        numel={name: parameter.numel() for name, parameter in whole.named_parameters()},
        groups=[[names[id(parameter)] for parameter in group] for group in groups],
        trained=[name for name, parameter in whole.named_parameters() if parameter.requires_grad],
        blocks={block.name: [names[id(one)] for one in block.parameters.values()] for block in blocks},
        visits=visits_of(narrow),
        norms_together=method.kind == "lisa",
    )


def _prepared(
    method: Method, config: PretrainedConfig, active: Sequence[int], device: str
) -> tuple[torch.nn.Module, list[list[torch.nn.Parameter]], Blocks]:
    """The model with what trains now, the parameters of its optimizer by group, and its blocks."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
        blocks = find_blocks(model)
        model = adapted(model, method) if method.kind == "lora" else model
    registered = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    if method.kind in ("static", "callback", "lisa"):
        selection, draw = BlockSelection(method.config, blocks), ActiveSet(tuple(active), ())
        selection.activate(draw)
        groups = selection.params_of_groups(draw) if method.kind == "lisa" else []
        if method.kind == "static":  # and callback registers all, and freezes then
            registered = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not groups:
        groups = [[one for one in registered if (one.ndim > 1) == decays] for decays in (True, False)]
    return model, [group for group in groups if group], blocks


class _WhenPassed(torch.autograd.Function):
    """Does nothing to a tensor, and calls when its gradient comes by."""

    @staticmethod
    def forward(ctx, tensor, call):
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.call()
        return gradient, None


def visits_of(model: torch.nn.Module) -> list[Visit]:
    """How one step enters and leaves the modules of a model, found by taking a pass of it.

    As DeepSpeed's hooks have it: the backward pass enters a module with the gradient of something that it gave out,
    and leaves it when all that it was given, by place, has its own; where nothing of that wants one, never.
    """
    visits: list[Visit] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_order = {name: number for number, name in enumerate(names.values())}
    hooks = []

    def follow(number: int, module: torch.nn.Module) -> None:
        used = list(module.parameters(recurse=False))
        if hasattr(module, "lora_A"):  # peft asks it for its dtype from here, and DeepSpeed fetches it for both
            used.append(module.lora_A["default"].weight)
        params = tuple(sorted((names[id(one)] for one in used), key=in_order.get))
        awaited = 0

        def enter() -> None:
            visits.append(Visit(True, number, params))

        def leave() -> None:
            visits.append(Visit(False, number, params))

        def leave_with_the_last() -> None:
            nonlocal awaited
            awaited -= 1
            if awaited == 0:
                leave()

        def before(module, inputs):
            nonlocal awaited
            enter()
            awaited = sum(isinstance(one, torch.Tensor) and one.requires_grad for one in inputs)
            return tree_map_only(torch.Tensor, lambda one: _WhenPassed.apply(one, leave_with_the_last), inputs)

        def after(module, inputs, output):
            leave()
            return tree_map_only(torch.Tensor, lambda one: _WhenPassed.apply(one, enter), output)

        hooks.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    for number, module in enumerate(model.modules()):
        follow(number, module)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    model.train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return visits


# The formulas: bytes by collective


def step_bytes(layout: Layout, settings: Settings) -> Counter:
    """One step in the middle of a period."""
    if settings.zero.stage == 3:
        return _stage_3(layout, settings, gathered_by_trace(layout, settings))
    # A gradient goes as it is, in buckets without gaps; a group of weights in equal parts of an even length.
    alignment = 2 * settings.world
    groups = [sum(layout.numel[name] for name in group) for group in layout.groups]
    overflow = int(settings.element < 4)  # a flag, in bf16
    return _norms(layout, 4 * len(layout.groups)) + Counter(
        {
            "all_reduce": settings.element * sum(layout.numel[name] for name in layout.trained),
            "all_gather_into_tensor": settings.element * sum(ceil(size / alignment) * alignment for size in groups),
            CONTROL + "all_reduce": 0 if layout.norms_together else overflow,  # which the norms tell
        }
    )


def _stage_3(layout: Layout, settings: Settings, gathered: int) -> Counter:
    """A step of stage 3 whose passes gather so many elements; what persists is gathered when the step is done."""
    padded = settings.padded
    after = sum(padded(layout.numel[name]) for name in persistent(layout, settings))
    norms = 8 * sum(_sub_groups(layout, settings, group) for group in layout.groups)
    return _norms(layout, norms) + Counter(
        {
            "reduce_scatter_tensor": settings.element * sum(padded(layout.numel[name]) for name in layout.trained),
            "all_gather_into_tensor": settings.element * (gathered + after),
        }
    )


def _norms(layout: Layout, size: int) -> Counter:
    """One of each group. A number by itself is control; numbers together look as gradients do."""
    return Counter({"all_reduce" if layout.norms_together else CONTROL + "all_reduce": size})


def persistent(layout: Layout, settings: Settings) -> set[str]:
    """What stage 3 keeps whole between a step's end and the next one's."""
    return {name for name, numel in layout.numel.items() if numel <= settings.zero.param_persistence_threshold}


def _sub_groups(layout: Layout, settings: Settings, group: list[str]) -> int:
    """Into how many stage 3 cuts a group: each is full with the parameter that fills it."""
    count = held = 0
    for name in group:
        held += settings.padded(layout.numel[name]) // settings.world
        if held >= settings.zero.sub_group_size:
            count, held = count + 1, 0
    return count + (held > 0)


def gathered_by_trace(layout: Layout, settings: Settings, there: set[str] | None = None) -> int:
    """Elements that stage 3 gathers in the passes of a step whose order of modules it knows.

    Entering a module gathers what is missing of it, then fetches ahead, up to stage3_prefetch_bucket_size elements and
    not beyond stage3_max_live_parameters. Leaving it lets go of what has no use among the next
    stage3_max_reuse_distance elements, unless fetching ahead has come by a later use and found it there. `there`: what
    is whole before the first module, by default all that persists.
    """
    numel, zero = layout.numel, settings.zero
    stays = persistent(layout, settings)
    order = [visit.params for visit in layout.visits if visit.enters]
    to_come = deque((place, name) for place, params in enumerate(order) for name in params)
    there, users = set(stays if there is None else there), defaultdict(set)
    seen_ahead: dict[str, int] = defaultdict(lambda: -1)  # the last use that fetching has come by
    gathered = live = place = 0

    def gather(names: Iterable[str]) -> None:
        nonlocal gathered, live
        missing = set(names) - there
        there.update(missing)
        gathered += sum(settings.padded(numel[name]) for name in missing)
        live += sum(numel[name] for name in missing)

    for visit in layout.visits:
        if visit.enters:
            gather(visit.params)
            for name in visit.params:
                users[name].add(visit.module)
            own = {name for name in visit.params if seen_ahead[name] < place}
            while own:
                use, name = to_come.popleft()
                own.remove(name)
                seen_ahead[name] = use
            room, ahead = min(zero.max_live_parameters - live, zero.prefetch_bucket_size), set()
            while to_come and sum(numel[name] for name in ahead) < room:
                use, name = to_come.popleft()
                seen_ahead[name] = max(seen_ahead[name], use)
                if name not in there:
                    ahead.add(name)
            gather(ahead)
            place += 1
            continue
        leaving = {name for name in visit.params if name not in stays and seen_ahead[name] <= place}
        passed = 0
        for params in order[place:]:
            if passed >= zero.max_reuse_distance or not leaving:
                break
            leaving.difference_update(params)
            passed += sum(numel[name] for name in params)
        for name in visit.params:
            users[name].discard(visit.module)
            if name in leaving & there and not users[name]:
                there.remove(name)
                live -= numel[name]
    return gathered


def gathered_without_trace(layout: Layout, settings: Settings, there: set[str]) -> int:
    """The same of the step that learns the order: leaving a module lets go of all of it. `there`: what has stayed."""
    there, users, gathered = set(there), defaultdict(set), 0
    for visit in layout.visits:
        if visit.enters:
            gathered += sum(settings.padded(layout.numel[name]) for name in visit.params if name not in there)
            there.update(visit.params)
        for name in visit.params:
            users[name] = users[name] | {visit.module} if visit.enters else users[name] - {visit.module}
            if not users[name]:
                there.discard(name)
    return gathered


def first_step_bytes(layout: Layout, settings: Settings, same_order: bool) -> Counter:
    """The first step after a switch: stage 3 learns the order of modules again, if it is not the same."""
    if settings.zero.stage < 3:
        return step_bytes(layout, settings)
    there = persistent(layout, settings) - set(layout.trained)  # a switch has cut what trains
    if same_order:
        return _stage_3(layout, settings, gathered_by_trace(layout, settings, there))
    found = _stage_3(layout, settings, gathered_without_trace(layout, settings, there))
    return found + Counter({CONTROL + "broadcast": _of_list(0)})  # no order yet is compared, too


def second_step_bytes(layout: Layout, settings: Settings, same_order: bool) -> Counter:
    """The second: ranks compare the order that they have learnt, of modules and, in two lists, of parameters."""
    if settings.zero.stage < 3 or same_order:
        return step_bytes(layout, settings)
    entered = [visit for visit in layout.visits if visit.enters]
    lists = _of_list(len(entered)) + 2 * _of_list(sum(len(visit.params) for visit in entered))
    return step_bytes(layout, settings) + Counter({CONTROL + "broadcast": lists})


def _of_list(length: int) -> int:
    """A list that ranks compare: its length, then its numbers."""
    return 8 * (1 + length)


def switch_bytes(layout: Layout, settings: Settings, gamma: int, trained: Iterable[str], changes: bool) -> Counter:
    """A switch of LISA: `trained` are the blocks whose period ends, `changes` says whether others follow.

    Two compares of a number from each rank, and rank 0's period, drawn block and gamma layers. On stage 3 also the
    sample of each block that shows its movement, in fp32, and each parameter that will train, to hang its hook on,
    unless it is whole because it persists.
    """
    found = Counter({CONTROL + "all_gather": 2 * 8 * settings.world, CONTROL + "broadcast": 8 * (gamma + 2)})
    if settings.zero.stage == 3:
        sampled = sum(_sample(layout, layout.blocks[block]) for block in trained)
        hooked = set(layout.trained) - persistent(layout, settings) if changes else ()
        elements = sum(settings.padded(layout.numel[name]) for name in hooked)
        found += Counter({"reduce": 4 * sampled, "all_gather_into_tensor": settings.element * elements})
    return found


def _sample(layout: Layout, params: list[str]) -> int:
    """Elements of a block that LISA looks at: all of a small parameter, of others their part of SAMPLE."""
    of_block = sum(layout.numel[name] for name in params)
    return sum(min(layout.numel[name], ceil(SAMPLE * layout.numel[name] / of_block)) for name in params)


def bytes_by_formula(
    method: Method, layout: Layout, settings: Settings, was: Sequence[int], active: Sequence[int]
) -> dict:
    """All moments of a method, as communication.py names them; those of a switch of LISA alone."""
    if method.kind != "lisa":
        return {"step": step_bytes(layout, settings)}
    gamma, changes = method.config.lisa_activated_layers, set(was) != set(active)
    outer = [block for block in method.config.always_on if layout.blocks[block]]
    blocks = [*outer, *(f"layers.{layer}" for layer in was)]
    found = {"switch": switch_bytes(layout, settings, gamma, blocks, changes), "step": step_bytes(layout, settings)}
    if not changes:
        return found | {"first step": found["step"], "second step": found["step"]}
    same_order = "embed" in method.config.always_on  # to which the backward pass goes down in every period
    return found | {
        "first step": first_step_bytes(layout, settings, same_order),
        "second step": second_step_bytes(layout, settings, same_order),
    }


def on_wire(by_collective: dict[str, int], world: int) -> float:
    """Bytes that a rank sends, the mean of all, when every collective is a ring."""
    return sum(
        size * (world - 1) / world * (2 if "all_reduce" in collective else 1)
        for collective, size in by_collective.items()
    )


def mean_of_period(moments: dict[str, Counter], world: int) -> float:
    """Bytes that a rank sends in a step, what comes with a switch spread over PERIOD steps."""
    sent = {moment: on_wire(by_collective, world) for moment, by_collective in moments.items()}
    ordinary = PERIOD - (2 if "switch" in sent else 0)
    step = sent.pop("step")
    return (sum(sent.values()) + ordinary * step) / PERIOD
