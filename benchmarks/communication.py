"""What do ranks send each other in a step? Bytes of each collective: counted, and by a formula; both must be equal.

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

python benchmarks/communication.py
"""

import argparse
import gc
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from arms import CALLBACK, FULL, LISA, SIDE_BY_SIDE, STATIC, Arm, Run, parsed, shrunk_arms, shrunk_config
from bench import group_parser, positive, print_table, write_results
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from rank_group import RankGroup
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig

from lisa_dist import load_ds_config
from lisa_dist.blocks import Blocks, find_blocks
from lisa_dist.config import UserError
from lisa_dist.ds_config import read_ds_config
from lisa_dist.movement import SAMPLE
from lisa_dist.plan import load_model_config
from lisa_dist.sampling import Draw
from lisa_dist.selection import BlockSelection

INTERVAL = 3  # steps of a period: the first, the second, and an ordinary one
PERIOD = 20  # of a real run, where a switch is spread over its period
LARGE_WORLD = 8  # GPUs of the large model
MOMENTS = ("switch", "first step", "second step", "step")
CONTROL = "control: "
KEEPS_NONE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
COLORS = {"all_reduce": "#2563eb", "reduce_scatter_tensor": "#60a5fa", "all_gather_into_tensor": "#d9580d"}
# Operator: what it is called, and which of its arguments is the whole.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_allgather_base_": ("all_gather_into_tensor", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather_coalesced", 0),
    "barrier": ("barrier", None),
}


# Counting


class CollectiveCounter(TorchDispatchMode):
    """While it is on, bytes and calls of every collective of this process, whoever asks for it.

    It sees torch's own operators, below torch.distributed and deepspeed.comm. Raises KeyError for one that it cannot
    count.
    """

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count the operator if it sends something, and run it."""
        if function.namespace == "c10d":
            name, whole = _COLLECTIVES[function._schema.name.removeprefix("c10d::")]
            tensors = [] if whole is None else list(_tensors_of(args[whole]))
            # Weights, gradients and samples of them are floats, and more than one.
            if all(one.numel() == 1 or not one.is_floating_point() for one in tensors):
                name = CONTROL + name
            self.bytes[name] += sum(one.nbytes for one in tensors)
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def _tensors_of(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for one in value:
            yield from _tensors_of(one)


class CountedRun(Run):
    """An arm whose steps are counted."""

    def count(self, length: int) -> dict:
        """Take a period of INTERVAL steps and the next: what its moments send, and the layers of both.

        These are MOMENTS of LISA, and of the other arms, whose steps are all alike from the third on, a step.
        """
        self.steps(INTERVAL, length)
        was = self.active_layers
        with CollectiveCounter() as counter:
            self.begin()
        counted = {"was": was, "active": self.active_layers, "switch": _told(counter)}
        for number, moment in enumerate(MOMENTS[1:] if self.lisa else MOMENTS[-1:]):
            if number:
                self.begin()
            tokens = self._next_tokens(length)
            with CollectiveCounter() as counter:
                self.engine.backward(self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
                self.engine.step()
            counted[moment] = _told(counter)
        return counted


class Counting:
    """What a rank does: it counts one arm after the other."""

    def __init__(self):
        gc.freeze()  # else DeepSpeed's collections would walk all that was imported, at every switch
        dist.barrier()  # of DeepSpeed's shared memory a rank gives up the name next, which others must have seen

    def count(self, length: int, *args, **kwargs) -> dict:
        """What a run of these arguments sends, by `CountedRun.count`."""
        run = CountedRun(*args, **kwargs)
        counted = run.count(length)
        run.engine.destroy()
        return counted


def _told(counter: CollectiveCounter) -> dict[str, dict[str, int]]:
    return {"bytes": dict(+counter.bytes), "calls": dict(counter.calls)}


# What the formulas know of a run


@dataclass(frozen=True)
class Visit:
    """A step enters a module or leaves it; `params` are what the module itself computes with, by name."""

    enters: bool
    module: int
    params: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """An arm's model in numbers: elements by parameter, parameters by group of the optimizer, what has gradients."""

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
        with torch.device("meta"):
            filled = load_ds_config(ds_config, model=AutoModelForCausalLM.from_config(config, dtype=dtype))
        return cls(world, dtype.itemsize, DeepSpeedZeroConfig(**filled["zero_optimization"]))

    def padded(self, numel: int) -> int:
        """Elements of a parameter that is cut into equal parts, one a rank (stage 3)."""
        return ceil(numel / self.world) * self.world


def layout_of(arm: Arm, model: str, shrink: int, num_layers: int | None, active: Sequence[int]) -> Layout:
    """The layout of an arm in which the layers `active` train; nothing of it comes from a run that is counted."""
    config = shrunk_config(model, shrink, num_layers)
    whole, groups, blocks = _prepared(arm, config, active, "meta")
    # The order of modules is that of a model of the same kind, 32 wide.
    narrow, *_ = _prepared(arm, shrunk_config(model, shrunk_config(model).hidden_size // 32, num_layers), active, "cpu")
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    return Layout(
        numel={name: parameter.numel() for name, parameter in whole.named_parameters()},
        groups=[[names[id(parameter)] for parameter in group] for group in groups],
        trained=[name for name, parameter in whole.named_parameters() if parameter.requires_grad],
        blocks={block.name: [names[id(one)] for one in block.parameters.values()] for block in blocks},
        visits=visits_of(narrow),
        norms_together=arm.method == "lisa",
    )


def _prepared(
    arm: Arm, config: PretrainedConfig, active: Sequence[int], device: str
) -> tuple[torch.nn.Module, list[list[torch.nn.Parameter]], Blocks]:
    """The model with what trains now, the parameters of its optimizer by group, and its blocks."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
        blocks = find_blocks(model)
        if arm.method == "lora":
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(lora_dropout=0.0, target_modules="all-linear", **arm.settings)
            model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    registered = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    if arm.method in ("static", "callback", "lisa"):
        selection, draw = BlockSelection(arm.config, blocks), Draw(tuple(active), ())
        selection.activate(draw)
        groups = selection.params_of_groups(draw) if arm.method == "lisa" else []
        if arm.method == "static":  # and callback registers all, and freezes then
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
            CONTROL + "all_reduce": overflow,
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


def bytes_by_formula(arm: Arm, layout: Layout, settings: Settings, was: Sequence[int], active: Sequence[int]) -> dict:
    """All MOMENTS of an arm; those of a switch of LISA alone."""
    if arm.method != "lisa":
        return {"step": step_bytes(layout, settings)}
    gamma, changes = arm.config.lisa_activated_layers, set(was) != set(active)
    outer = [block for block in arm.config.always_on if layout.blocks[block]]
    blocks = [*outer, *(f"layers.{layer}" for layer in was)]
    found = {"switch": switch_bytes(layout, settings, gamma, blocks, changes), "step": step_bytes(layout, settings)}
    if not changes:
        return found | {"first step": found["step"], "second step": found["step"]}
    same_order = "embed" in arm.config.always_on  # to which the backward pass goes down in every period
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


# The script


def ds_configs(num_elements: int) -> dict[str, str | dict]:
    """The shipped configs, and stage 3 as models meet it of which half, or nothing, is within the reuse distance."""
    found: dict[str, str | dict] = {name: name for name in ("zero1", "zero2", "zero3")}
    keeps_half = {"stage3_max_reuse_distance": num_elements // 2}
    for name, keys in {"zero3, keeps half": keeps_half, "zero3, keeps none": KEEPS_NONE}.items():
        config = read_ds_config("zero3")
        config["zero_optimization"] |= keys
        found[name] = config
    return found


@dataclass(frozen=True)
class Compared:
    """An arm under one config: what each rank has counted, and the formula."""

    layout: Layout
    counted: list[dict]
    formula: dict[str, Counter]

    def rows(self) -> Iterator[tuple[str, str, list[int], int]]:
        """Moment, collective, bytes that each rank has counted, bytes by the formula."""
        for moment, by_collective in self.formula.items():
            names = {*by_collective, *(name for one in self.counted for name in one[moment]["bytes"])}
            for name in sorted(names, key=lambda name: (name.startswith(CONTROL), name)):
                yield moment, name, [one[moment]["bytes"].get(name, 0) for one in self.counted], by_collective[name]

    def differs(self) -> bool:
        """Whether any rank has counted anything else than the formula says."""
        return any(set(counted) != {formula} for _, _, counted, formula in self.rows())

    def figures(self) -> dict:
        """For the results, in bytes; `wire`: what a rank sends of it in rings."""
        moments = {
            moment: {
                "counted": self.counted[0][moment]["bytes"],
                "formula": dict(+found),
                "calls": self.counted[0][moment]["calls"],
                "wire": on_wire(found, len(self.counted)),
            }
            for moment, found in self.formula.items()
        }
        return {"active_share": self.layout.active_share, "equal": not self.differs(), "moments": moments}


def compare_all(arguments: argparse.Namespace) -> dict[str, dict[str, Compared]]:
    """Every arm under every config; static trains the layers that LISA has drawn."""
    model, dtype = (arguments.model, arguments.shrink, arguments.num_layers), getattr(torch, arguments.dtype)
    config = shrunk_config(*model)
    with torch.device("meta"):
        num_elements = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    configs, counted = ds_configs(num_elements), {}
    side_by_side = shrunk_arms(SIDE_BY_SIDE, arguments.shrink)
    with RankGroup(arguments.ranks, Counting) as ranks:
        for name, ds_config in configs.items():
            layers: Sequence[int] = ()
            for arm in sorted(side_by_side, key=lambda arm: arm is not LISA):
                settings = {"layers": layers, "interval": INTERVAL, "dtype": dtype}
                found = ranks.call("count", arguments.length, arm, config, ds_config, **settings)
                counted[name, arm.name], layers = found, layers or found[0]["active"]
    compared: dict[str, dict[str, Compared]] = {}
    layouts: dict[tuple, Layout] = {}
    for name, ds_config in configs.items():
        settings = Settings.of(ds_config, config, arguments.ranks, dtype)
        for arm in side_by_side:
            found = counted[name, arm.name]
            was, active = found[0]["was"], found[0]["active"]
            key = arm.name, active
            layouts[key] = layout = layouts.get(key) or layout_of(arm, *model, active)
            formula = bytes_by_formula(arm, layout, settings, was, active)
            compared.setdefault(name, {})[arm.name] = Compared(layout, found, formula)
    return compared


def of_sleeping_layers(compared: dict[str, Compared]) -> dict[str, int]:
    """What callback sends in a step that static, with as many layers, does not."""
    callback, static = (compared[arm.name].formula["step"] for arm in (CALLBACK, STATIC))
    return {name: size - static[name] for name, size in callback.items() if not name.startswith(CONTROL)}


def at_full_size(model: str) -> dict[str, dict]:
    """By the formula alone: bytes of a step of a model as it is, under the shipped configs, in bf16."""
    found: dict[str, dict] = {}
    for arm in (FULL, LISA):
        gamma = arm.config.lisa_activated_layers
        was, active = range(gamma), range(gamma, 2 * gamma)  # all layers are alike
        layout = layout_of(arm, model, 1, None, active)
        for name in ("zero1", "zero2", "zero3"):
            settings = Settings.of(name, shrunk_config(model), LARGE_WORLD, torch.bfloat16)
            moments = bytes_by_formula(arm, layout, settings, was, active)
            found.setdefault(name, {})[arm.name] = {
                "active_share": layout.active_share,
                "step": dict(moments["step"]),
                "wire": on_wire(moments["step"], LARGE_WORLD),
                "mean_of_period": mean_of_period(moments, LARGE_WORLD),
            } | ({"switch": dict(moments["switch"])} if arm is LISA else {})
    return found


def print_counted(compared: dict[str, dict[str, Compared]]) -> None:
    """Every number, counted and by the formula."""
    rows = []
    for name, arms in compared.items():
        for arm, one in arms.items():
            for moment, collective, counted, formula in one.rows():
                if moment in ("switch", "step") or name.startswith("zero3"):  # else all steps are alike
                    said = "" if set(counted) == {formula} else "differs"
                    by_rank = " ".join(map(str, sorted(set(counted))))
                    rows.append([name, arm, moment, collective, by_rank, str(formula), said])
    print_table(["config", "arm", "", "collective", "bytes counted", "by formula", ""], rows)


def print_shares(compared: dict[str, dict[str, Compared]], sleeping: dict[str, dict[str, int]], world: int) -> None:
    """Bytes that a rank sends beside those of full training, and what callback has sent for sleeping layers."""
    print(f"\nSent by a rank in a step, of full training's; in brackets with switches, one in {PERIOD} steps:")
    full = {name: on_wire(arms[FULL.name].formula["step"], world) for name, arms in compared.items()}
    rows = []
    for arm in SIDE_BY_SIDE:
        row = [arm.name, f"{compared['zero1'][arm.name].layout.active_share:.3f}"]
        for name, arms in compared.items():
            moments = arms[arm.name].formula
            step, mean = on_wire(moments["step"], world) / full[name], mean_of_period(moments, world) / full[name]
            row.append(f"{step:.3f} ({mean:.3f})" if arm is LISA else f"{step:.3f}")
        rows.append(row)
    print_table(["arm", "active share", *compared], rows)
    print("\nBytes of a step that callback sends for sleeping layers, beyond what static does:")
    rows = [[name, collective, str(size)] for name, found in sleeping.items() for collective, size in found.items()]
    print_table(["config", "collective", "bytes"], rows)


def print_large(large: dict[str, dict], model: str) -> None:
    """What the formula says of a model at its full size."""
    print(f"\n{model} on {LARGE_WORLD} GPUs in bf16, not counted but by the formula, GB of a step:")
    rows = []
    for name, arms in large.items():
        for arm, found in arms.items():
            step = found["step"]
            share = found["wire"] / arms[FULL.name]["wire"]
            sizes = [sum(size for key, size in step.items() if word in key) for word in ("reduce", "gather")]
            sizes += [sum(step.values()), found["wire"], found["mean_of_period"], sum(found.get("switch", {}).values())]
            shares = f"{found['active_share']:.3f}", f"{share:.3f}"
            rows.append([name, arm, *shares, *(f"{size / 1e9:.2f}" for size in sizes)])
    header = ["config", "arm", "active share", "of full", "reduced", "gathered", "both", "sent by a rank"]
    print_table([*header, f"mean of {PERIOD}", "a switch"], rows)


def plot(compared: dict[str, dict[str, Compared]], path: Path) -> None:
    """Bytes of a step in parts of full training's, by collective, for each config; a dot is the active share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(compared), 3), layout="constrained")
    panels = figure.subplots(1, len(compared), sharey=True, squeeze=False)[0]
    for axes, (name, arms) in zip(panels, compared.items(), strict=True):
        whole = sum(arms[FULL.name].formula["step"].values())
        begins = [0.0] * len(arms)
        for collective, color in COLORS.items():
            parts = [one.formula["step"][collective] / whole for one in arms.values()]
            if any(parts):
                axes.barh(list(arms), parts, left=begins, color=color, label=collective)
            begins = [begin + part for begin, part in zip(begins, parts, strict=True)]
        axes.plot([one.layout.active_share for one in arms.values()], list(arms), "o", color="#111827", markersize=4)
        axes.set(title=name, xlabel="of full training's bytes")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6, loc="lower right")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}")


def main() -> None:
    """Count, compare, print, write; ends with 1 where a number differs."""
    parser = group_parser(__doc__, "communication.json", shrink=16)
    parser.add_argument("--length", type=positive, default=32, help="tokens of a row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    about_large = f"of this model, as it is, the formula gives the bytes on {LARGE_WORLD} GPUs"
    parser.add_argument("--large", default="llama2-70b", help=about_large)
    arguments = parsed(parser)
    try:
        load_model_config(arguments.large)
    except UserError as error:
        parser.error(str(error).replace("--model", "--large"))
    compared = compare_all(arguments)
    sleeping = {name: of_sleeping_layers(arms) for name, arms in compared.items()}
    large = at_full_size(arguments.large)
    print_counted(compared)
    print_shares(compared, sleeping, arguments.ranks)
    print_large(large, arguments.large)
    settings = {name: getattr(arguments, name) for name in ("shrink", "num_layers", "ranks", "length", "dtype")}
    figures = {
        "settings": settings | {"model": Path(arguments.model).name, "period": PERIOD},
        "counted": {name: {arm: one.figures() for arm, one in arms.items()} for name, arms in compared.items()},
        "of_sleeping_layers_by_callback": sleeping,
        "by_formula_alone": {f"{Path(arguments.large).name}, {LARGE_WORLD} GPUs, bf16": large},
    }
    write_results(arguments.results, figures)
    plot(compared, arguments.results.with_suffix(".png"))
    differ = [(name, arm) for name, arms in compared.items() for arm, one in arms.items() if one.differs()]
    if differ:
        sys.exit(f"counted and formula differ: {', '.join(f'{arm} under {name}' for name, arm in differ)}.")


if __name__ == "__main__":
    main()
