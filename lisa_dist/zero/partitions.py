"""The partitions of DeepSpeed's ZeRO optimizer, rebuilt in place: the only file that touches DeepSpeed's privates.

DeepSpeed fixes at start which parameters it optimizes. To change them, the SAME optimizer object is taken down to an
empty shell and its class's own `__init__` is run on it again, through the engine's own construction path and with the
same inner optimizer object. So the LR scheduler, Accelerate's wrappers and user code stay bound to it, and DeepSpeed's
own code builds groups, flat buffers, partitions, hooks and buckets.

Who holds what, on each of W ranks, for A active elements:

- weights: stages 1 and 2 hold all of them whole; the parameters of one group are views of one flat buffer. Stage 3
  holds 1/W of each parameter (`ds_tensor`); those of all active parameters are views of one buffer.
- masters and moments: A/W elements each, flat, one partition a group; on the host under offload. Sleeping blocks: none.

What a switch sends: nothing on stages 1 and 2, since every rank cuts its partition from weights it already holds. On
stage 3 DeepSpeed gathers each active parameter once to hang its hook on (A elements in the model's dtype). Masters and
moments never travel: a group of the same parameters has the same partition on the same rank.
"""

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import linear as zero3_linear
from deepspeed.runtime.zero import partitioned_param_coordinator as zero3_coordinator
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.runtime.zero.utils import get_norm_dtype
from packaging.version import Version
from transformers.modeling_layers import GradientCheckpointingLayer

from lisa_dist.config import UserError
from lisa_dist.optim.adamw import LisaAdamW, PartitionStep
from lisa_dist.optim.build import coding_of_states, host_adam_history, replay_host_adam, restore_state
from lisa_dist.optim.states import CopyStream, PartitionKey, PartitionState, Piece

SUPPORTED_DEEPSPEED = ("0.19.8", "0.20")  # from, up to but not including
_INSTALL = "pip install 'deepspeed>={},<{}'".format(*SUPPORTED_DEEPSPEED)


@dataclass(frozen=True)
class _Stage:
    """Where one of DeepSpeed's optimizer classes keeps its things."""

    module: str  # where the engine looks the class up when it constructs it
    class_name: str
    groups: str  # lists of the model's parameters
    masters: str  # this rank's fp32 partition of each list
    private_names: tuple[str, ...]  # what else this file needs of an instance


_STAGE_1_2 = _Stage(
    module="deepspeed.runtime.engine",
    class_name="DeepSpeedZeroOptimizer",
    groups="bit16_groups",
    masters="single_partition_of_fp32_groups",
    private_names=(
        "_wait_for_offload_copies",
        "round_robin_bit16_groups",
        "nccl_start_alignment_factor",
        "partition_size",
        "_get_preflattened_grad_partition",
        "scaled_global_norm",
        "set_norm_for_param_grad_in_gpu",
        "use_grad_accum_attribute",
        "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
        "parallel_partitioned_bit16_groups",
        "real_dp_process_group",
    ),
)
_STAGE_3 = _Stage(
    module="deepspeed.runtime.zero.stage3",
    class_name="DeepSpeedZeroOptimizer_Stage3",
    groups="fp16_groups",
    masters="fp32_partitioned_groups_flat",
    private_names=(
        "parameter_offload",
        "_leaf_module_hooks",
        "initialize_ds_offload",
        "offload_param_pin_memory",
        "_prepare_fp32_grad_for_sub_group",
        "_get_norm_groups",
        "_offload_grad_partition_at_boundary",
        "fp16_partitioned_groups_flat",
        "_reassign_or_swap_out_partitioned_parameters",
        "_unflatten_partitioned_parameters",
        "clip_grad",
        "loss_scale",
    ),
)
_PRIVATE_NAMES = (
    "_grad_acc_hooks",
    "_unpin_offload_buffers",
    "averaged_gradients",
    "unscale_and_clip_grads",
    "get_param_id",
    "model_parallel_group",
    "initialize_optimizer_states",
    "dp_process_group",
    "ipg_buckets",
    "optimizer",
    "state",
    "param_groups",
)

_ENGINE_NAMES = ("_configure_zero_optimizer", "param_names")
_COORDINATOR_NAMES = ("_invalidate_trace", "is_invalid_trace", "_clean_inflight_param_registry")  # stage 3 alone

# What __init__ would set back and a run must keep: the fp16 scaler, hooks the engine registered, and the last norms.
_CARRIED_FIELDS = (
    "loss_scaler",
    "dynamic_loss_scale",
    "custom_loss_scaler",
    "external_loss_scale",
    "torch_autocast_gradscaler",
    "overflow",
    "micro_step_id",
    "_global_grad_norm",
    "_grad_acc_post_hooks",
    "_coalesce_grad_reduction",
    "_is_gradient_accumulation_boundary",
)
NORM_CHUNK = 1 << 22  # elements of a gradient whose norm is taken at once: 32 MiB in fp64
_tie_to_module = getattr(zero3_coordinator, "update_recompute_parameters", None)  # DeepSpeed's own
_LAYER_OF: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of modules of all models, to their layers
# What a parameter keeps of the partition that it was in, and that would keep the partition alive.
_STALE_ATTRIBUTES = ("_hp_mapping", "grad_accum")


def check_deepspeed() -> None:
    """Raise ValueError when the installed DeepSpeed is outside the range that this file was tested with."""
    version = Version(metadata.version("deepspeed"))
    lowest, below = SUPPORTED_DEEPSPEED
    if not Version(lowest) <= version < Version(below):
        raise UserError(
            f"DeepSpeed {version} is installed; LISA re-partitions its optimizer and supports {lowest} up to, not "
            f"including, {below}: {_INSTALL}."
        )


def patch_construction() -> None:
    """Change, for the whole process, three things in how DeepSpeed builds its ZeRO optimizers, which spare memory.

    It makes a gradient of zeros for every master and drops them: all at once they are 4 bytes an active element, at the
    start and at every switch. Under optimizer offload they stay, and Adagrad makes its states of them: there it is as
    it was. The masters of a group that is `lisa_host` go to the host as soon as they are made. And where masters have
    the dtype of the weights, LisaAdamW's are the weights themselves.
    """
    for stage, offload in ((_STAGE_1_2, "cpu_offload"), (_STAGE_3, "offload_optimizer")):
        kind = getattr(import_module(stage.module), stage.class_name)
        if isinstance(vars(kind).get(stage.masters), _Masters):
            continue
        setattr(kind, stage.masters, _Masters(stage))
        made = kind.initialize_optimizer_states

        def initialize(zero, made=made, offload=offload):
            if getattr(zero, offload) or isinstance(zero.optimizer, torch.optim.Adagrad):
                made(zero)

        kind.initialize_optimizer_states = initialize


class _Masters:
    """The attribute of DeepSpeed's optimizers that lists the masters, each of which goes where it belongs."""

    def __init__(self, stage: _Stage):
        self._stage = stage

    def __get__(self, zero, kind=None):
        if zero is None:
            return self
        # An optimizer that was built before this attribute was changed has its masters under the name itself.
        masters = zero.__dict__.get("_lisa_masters", zero.__dict__.get(self._stage.masters))
        if masters is None:
            raise AttributeError("there are no masters yet")
        return masters

    def __set__(self, zero, masters: list) -> None:
        zero.__dict__["_lisa_masters"] = _MastersInPlace(zero, self._stage, masters)


class _MastersInPlace(list):
    """Masters in the order of the groups; `append` puts the host's, or the weights, in the place of some."""

    def __init__(self, zero, stage: _Stage, masters: list):
        super().__init__(masters)
        self._zero, self._stage = zero, stage

    def append(self, master: torch.Tensor) -> None:
        groups, index = self._zero.optimizer.param_groups, len(self)  # stage 3 may have cut groups, which LISA refuses
        if index < len(groups) and groups[index].get("lisa_host"):
            master = _to_host(master)
        elif isinstance(self._zero.optimizer, LisaAdamW):
            weights = _flat_weights(self._zero, self._stage, index)
            is_same = (master.dtype, master.device) == (weights.dtype, weights.device)
            master = weights.detach() if is_same else master
        super().append(master)


def _flat_weights(zero, stage: _Stage, index: int) -> torch.Tensor:
    """This rank's weights of a group, flat, as the model has them."""
    if stage is _STAGE_3:
        return zero.fp16_partitioned_groups_flat[index]
    rank = torch.distributed.get_rank(zero.real_dp_process_group[index])
    # Of the list itself: in the middle of a step `_WrittenPartitions` would give something else.
    return list.__getitem__(zero.parallel_partitioned_bit16_groups, index)[rank]


def _to_host(master: torch.Tensor) -> torch.Tensor:
    return master.detach().to("cpu", copy=True)  # in fp32 stage 3 it is the weights themselves


class ZeroPartitions:
    """This rank's ZeRO partitions of one engine: read them, take them down, build them over other parameters."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        check_deepspeed()
        if os.environ.get("DS_PIN_MEMORY_BACKEND", "").lower() == "native":
            raise UserError(
                "DS_PIN_MEMORY_BACKEND=native: this backend frees buffers that a switch moves over; unset the variable."
            )
        self.engine = engine
        self._stage = _stage_of(engine)
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self._placeholders: dict[int, torch.nn.Parameter] = {}
        self._check_private_names()
        if isinstance(self._zero.optimizer, LisaAdamW):
            self._check_one_pass()
        if self._stage is _STAGE_3:
            zero3_linear.LinearFunctionForZeroStage3 = _LinearOfStage3
            _keep_recomputed_layers_whole(engine.module)

    def _check_one_pass(self) -> None:
        """Refuse what would have DeepSpeed read gradients that LisaAdamW takes past it."""
        if getattr(self._zero, "cpu_offload" if self._stage is _STAGE_1_2 else "offload_optimizer"):
            raise UserError(
                "the engine offloads optimizer states (offload_optimizer) and steps LisaAdamW: on the host DeepSpeed's "
                "own AdamW takes its place; build it with build_optimizer(..., offload=True), or leave the offload to "
                "--lisa_offload."
            )
        if self._zero.torch_autocast_gradscaler is not None:
            raise UserError(
                'the DeepSpeed config has torch_autocast with "dtype": "float16", whose scaler does not see the '
                "gradients that lisa_adamw takes: use bfloat16 there, or --optim adamw_torch_fused."
            )

    # What is there

    @property
    def keeps_no_masters(self) -> bool:
        """Whether bf16 weights are stepped themselves, without masters in fp32."""
        return any(master.dtype == torch.bfloat16 for master in getattr(self._zero, self._stage.masters))

    def keys(self) -> list[PartitionKey]:
        """The partitions in order, each known by the names of its parameters; () for a group without any."""
        groups, held = getattr(self._zero, self._stage.groups), {id(value) for value in self._placeholders.values()}
        return [tuple(self._names[id(value)] for value in group if id(value) not in held) for group in groups]

    def states(self) -> dict[PartitionKey, PartitionState]:
        """This rank's masters and optimizer states as they are now; moments appear with a partition's first step."""
        masters = getattr(self._zero, self._stage.masters)
        inner_state = self._zero.optimizer.state
        return {
            key: PartitionState(master, dict(inner_state.get(master, {})), self._is_weights(index))
            for index, (key, master) in enumerate(zip(self.keys(), masters, strict=True))
            if key
        }

    def _is_weights(self, index: int) -> bool:
        """Whether the master of a group is no copy, but the weights."""
        if not isinstance(self._zero.optimizer, LisaAdamW):
            return False
        master = getattr(self._zero, self._stage.masters)[index]
        return master.data_ptr() == _flat_weights(self._zero, self._stage, index).data_ptr()

    def held_gradients(self) -> list[torch.Tensor]:
        """The gradients that wait for a step: parts of whole ones, on stages 1 and 2, which they keep alive."""
        held = [gradient for group in self._zero.averaged_gradients.values() for gradient in group or ()]
        held += [parameter.grad for parameter in self.engine.module.parameters()]
        held += [getattr(parameter, "grad_accum", None) for parameter in self.engine.module.parameters()]
        return [gradient for gradient in held if gradient is not None]

    def pieces(self) -> dict[PartitionKey, list[Piece]]:
        """Which elements of which parameters this rank's partitions hold; what is left of a partition is padding."""
        rank = torch.distributed.get_rank(self._zero.dp_process_group)
        masters = getattr(self._zero, self._stage.masters)
        # Stages 1 and 2 may lay the parameters of a group out in another order (round_robin_gradients).
        groups = self._zero.fp16_groups if self._stage is _STAGE_3 else self._zero.round_robin_bit16_groups
        cut = _pieces_of_parameters if self._stage is _STAGE_3 else _pieces_of_buffer
        return {
            key: cut([(self._names[id(parameter)], parameter) for parameter in group], rank, master.numel())
            for key, group, master in zip(self.keys(), groups, masters, strict=True)
            if key
        }

    @property
    def coding(self) -> str | None:
        """Whose codes and scales the optimizer keeps 8-bit moments in, if any: "bitsandbytes" or "lisa"."""
        return coding_of_states(self._zero.optimizer)

    def counters(self) -> dict:
        """What a run needs beside the partitions to go on: the loss scale of fp16, and the host AdamW's history."""
        scaler = vars(self._zero.loss_scaler)
        return {
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, int | float)},
            "host_adam": host_adam_history(self._zero.optimizer),
        }

    def layout(self, params: list[torch.nn.Parameter]) -> tuple[list[Piece], int]:
        """Pieces and elements of the partition that this rank would hold of a group of sleeping parameters."""
        rank = torch.distributed.get_rank(self._zero.dp_process_group)
        named = [(self._names[id(parameter)], parameter) for parameter in params]
        if self._stage is _STAGE_3:
            numel = sum(parameter.ds_tensor.ds_numel for parameter in params)
            return _pieces_of_parameters(named, rank, numel), numel
        world_size = torch.distributed.get_world_size(self._zero.dp_process_group)
        alignment = self._zero.nccl_start_alignment_factor * world_size
        numel = -(-sum(parameter.numel() for parameter in params) // alignment) * alignment // world_size
        return _pieces_of_buffer(named, rank, numel), numel

    # What a resume does

    def load_state(self, key: PartitionKey, fields: dict) -> None:
        """Fill one partition with its saved master ("master") and, once it has stepped, moments."""
        inner = self._zero.optimizer
        index = self.keys().index(key)
        master = getattr(self._zero, self._stage.masters)[index]
        master.data.copy_(fields["master"])
        if "step" in fields:
            restore_state(inner, inner.param_groups[index], master, self.pieces()[key], fields)

    def state_of(self, lisa_group: str, pieces: list[Piece], fields: dict) -> PartitionState:
        """The state of a partition that sleeps, from its saved fields, in the form that `lisa_group`'s would have."""
        inner = self._zero.optimizer
        index = [group["lisa_group"] for group in inner.param_groups].index(lisa_group)
        like = getattr(self._zero, self._stage.masters)[index]
        master = fields["master"].to(like.device, like.dtype)
        if "step" in fields:
            restore_state(inner, inner.param_groups[index], master, pieces, fields)
        return PartitionState(master, inner.state.pop(master, {}))

    def load_counters(self, counters: dict) -> None:
        """Go on with the loss scale and the history of a saved run."""
        for name, value in counters["loss_scaler"].items():
            setattr(self._zero.loss_scaler, name, value)
        replay_host_adam(self._zero.optimizer, counters["host_adam"])

    # What a switch does

    def wait_for_device(self) -> None:
        """Let the device end what it was given; to be called before `repartition`."""
        get_accelerator().synchronize()
        if self._stage is _STAGE_1_2:
            self._zero._wait_for_offload_copies()

    def repartition(
        self, params_of_group: list[list[torch.nn.Parameter]], carried: dict, copies: CopyStream | None = None
    ) -> None:
        """Rebuild the partitions over `params_of_group`, one list for each parameter group, as many as before.

        A group without parameters gets a placeholder of one element, which never has a gradient: DeepSpeed takes no
        empty group, and schedulers count groups.

        `carried` maps partition keys to the states that go on; every other partition starts with a master cloned from
        the weights and without moments; those that come from the host are copied on `copies`. Gradients must have been
        used up, and the device be done: call it between two optimizer steps, after `wait_for_device`.
        """
        zero, inner = self._zero, self._zero.optimizer
        assert len(params_of_group) == len(inner.param_groups)
        params_of_group = [params or [self._placeholder(index)] for index, params in enumerate(params_of_group)]
        kept_fields = {name: getattr(zero, name) for name in _CARRIED_FIELDS}
        coordinator_owner = getattr(zero, "parameter_offload", None)

        with _cheap_gc():
            if coordinator_owner is not None:
                self._clear_trace(coordinator_owner, params_of_group)
            self._take_down(params_of_group)
            inner.state.clear()
            for group, params in zip(inner.param_groups, params_of_group, strict=True):
                group["params"] = params
            with _construct_in_place(zero, self._stage, coordinator_owner):
                rebuilt = self.engine._configure_zero_optimizer(inner)
            assert rebuilt is zero
            for name, value in kept_fields.items():
                setattr(zero, name, value)
            self._put_back(carried, copies or CopyStream())

    def _placeholder(self, index: int) -> torch.nn.Parameter:
        if index not in self._placeholders:
            like = next(iter(self.engine.module.parameters()))
            parameter = torch.nn.Parameter(torch.zeros(1, dtype=like.dtype, device=self.engine.device))
            if self._stage is _STAGE_3:
                like.convert_to_zero_parameters(param_list=[parameter])
            self.engine.param_names[parameter] = f"lisa_placeholder.{index}"
            self._placeholders[index] = parameter
        return self._placeholders[index]

    def _clear_trace(self, parameter_offload, next_params_of_group: list[list[torch.nn.Parameter]]) -> None:
        """Make stage 3 record anew in which order modules run, if the backward pass is to end elsewhere.

        Modules run backward down to the lowest parameter that trains, whatever sleeps above it. If that stays, so does
        the order, and the next step is as fast as any other. (DeepSpeed records anew where it meets another order.)
        """
        order = {key: number for number, key in enumerate(self._names)}
        lowest = [
            min((order[id(one)] for group in groups for one in group if id(one) in order), default=None)
            for groups in (getattr(self._zero, self._stage.groups), next_params_of_group)
        ]
        if lowest[0] == lowest[1]:
            parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        else:
            _forget_trace(parameter_offload)

    def _take_down(self, next_params_of_group: list[list[torch.nn.Parameter]]) -> None:
        """Let go of everything that the optimizer object holds or has hung onto the model."""
        zero = self._zero
        staying = {id(parameter) for params in next_params_of_group for parameter in params}
        for hook in [*zero._grad_acc_hooks, *getattr(zero, "_leaf_module_hooks", ())]:
            hook.remove()
        for group in getattr(zero, self._stage.groups):
            for parameter in group:
                for name in _STALE_ATTRIBUTES:
                    if hasattr(parameter, name):
                        setattr(parameter, name, None)
                if self._stage is _STAGE_3 and id(parameter) not in staying:
                    _give_own_storage(parameter, pin=zero.offload_param_pin_memory)
        zero._unpin_offload_buffers()
        zero.__dict__.clear()

    def adapt(self) -> None:
        """Make of what DeepSpeed has built at the start of a run what `repartition` makes of it later."""
        self._put_back({}, CopyStream())

    def _put_back(self, carried: dict[PartitionKey, PartitionState], copies: CopyStream) -> None:
        """Fill the new partitions with the states that go on; copies from the host are queued, not waited for."""
        zero = self._zero
        on_host = [index for index, group in enumerate(zero.optimizer.param_groups) if group.get("lisa_host")]
        if isinstance(zero.optimizer, LisaAdamW):
            pieces = self.pieces()
            _OnePass(self.engine, self._stage, [pieces.get(key, []) for key in self.keys()])
        elif on_host:
            _step_on_host(zero, self._stage, frozenset(on_host))
        if self._stage is _STAGE_1_2 and zero.cpu_offload:
            _send_gradients_in_chunks(zero)
        elif self._stage is _STAGE_3 and zero.offload_optimizer:
            _send_partitions_in_chunks(zero)
        elif zero.model_parallel_group is None:  # else the parts of other ranks' matrices count too
            _take_norms_together(zero, self._stage)
        for index, (key, master) in enumerate(zip(self.keys(), getattr(zero, self._stage.masters), strict=True)):
            state = carried.get(key) if key else None
            if state is None:
                continue
            assert state.master.shape == master.shape, key
            moments, is_weights = state.optimizer_state, self._is_weights(index)
            if state.master.device == master.device:
                if not is_weights:  # else it is there, and the next step may be reading it
                    master.data.copy_(state.master.data)
            else:
                moments = {
                    name: torch.empty_like(value, device=master.device) if _is_per_element(value) else value
                    for name, value in state.optimizer_state.items()
                }
                with copies.after_compute():
                    if not is_weights:
                        master.data.copy_(state.master.data, non_blocking=True)
                    for name, value in state.optimizer_state.items():
                        if _is_per_element(value):
                            moments[name].copy_(value, non_blocking=True)
            if moments:
                zero.optimizer.state[master] = moments

    def before_step(self, call: Callable) -> None:
        """Have `call` called before the optimizer steps any group."""
        self._zero.optimizer.register_step_pre_hook(call)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that ZeRO has wrapped, the same object for the whole run."""
        return self._zero.optimizer

    def local_weights(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What this rank holds of a parameter: its 1/W on stage 3 (nothing while it is on NVMe), else all of it."""
        return parameter.ds_tensor.data if self._stage is _STAGE_3 else parameter.data

    def gathered_bytes(self) -> int:
        """Bytes of the parameters that stage 3 holds whole right now, beside this rank's share of them."""
        if self._stage is not _STAGE_3:
            return 0
        whole = [parameter for parameter in self.engine.module.parameters() if not parameter.ds_persist]
        whole = {parameter.data.untyped_storage().data_ptr(): parameter for parameter in whole}
        shares = {parameter.ds_tensor.untyped_storage().data_ptr() for parameter in whole.values()}
        return sum(
            parameter.data.nbytes
            for place, parameter in whole.items()
            if parameter.data.numel() == parameter.ds_numel and place not in shares
        )

    @property
    def weights_are_sharded(self) -> bool:
        """Whether ranks hold different pieces of the weights (stage 3) or each holds all of them."""
        return self._stage is _STAGE_3

    @property
    def _zero(self):
        return self.engine.optimizer

    def _check_private_names(self) -> None:
        missing = [name for name in _PRIVATE_NAMES + self._stage.private_names if not hasattr(self._zero, name)]
        missing += [name for name in (self._stage.groups, self._stage.masters) if not hasattr(self._zero, name)]
        missing += [name for name in _CARRIED_FIELDS if not hasattr(self._zero, name)]
        if getattr(import_module(self._stage.module), self._stage.class_name, None) is not type(self._zero):
            missing.append(f"{self._stage.module}.{self._stage.class_name}")
        missing += [f"engine.{name}" for name in _ENGINE_NAMES if not hasattr(self.engine, name)]
        if self._stage is _STAGE_3:
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            missing += [name for name in _COORDINATOR_NAMES if not hasattr(coordinator, name)]
            missing += ["update_recompute_parameters"] if _tie_to_module is None else []
        if missing:
            raise UserError(
                f"DeepSpeed {metadata.version('deepspeed')} lacks {', '.join(missing)}, which LISA needs to "
                f"re-partition its {self._stage.class_name}: {_INSTALL}."
            )


class _LinearOfStage3(LinearFunctionForZeroStage3):
    """DeepSpeed's linear function of stage 3, which keeps the input for the weight's gradient alone.

    DeepSpeed's own keeps the inputs of frozen weights too: of every sleeping layer, which is most of the activations.
    """

    @staticmethod
    def setup_context(ctx, inputs, output):
        LinearFunctionForZeroStage3.setup_context(ctx, inputs, output)
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, *inputs[1:], *[None] * (3 - len(inputs)))


def _keep_recomputed_layers_whole(model: torch.nn.Module) -> None:
    """Have stage 3 keep the frozen parameters of a checkpointed layer until the layer's backward pass is done.

    In the recomputation DeepSpeed ties them to the module whose backward pass has begun it, a layer's last matrix, and
    lets go of all of them behind that: most of every sleeping layer would be gathered a third time in each step.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            _LAYER_OF.update(dict.fromkeys(layer.modules(), weakref.ref(layer)))
    zero3_coordinator.update_recompute_parameters = _tie_to_layer


def _tie_to_layer(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    layer = _LAYER_OF.get(module)
    _tie_to_module(module if layer is None else layer(), parameter)


def _take_norms_together(zero, stage: _Stage) -> None:
    """Have DeepSpeed take the norms of all groups with one collective, and of a large gradient chunk by chunk.

    It has a collective for each group, and LISA has two groups for every block that trains. And it makes a copy in fp64
    of a whole gradient: 4 GiB for the embedding of Llama-3.1-8B on one GPU, more than anything else of a step. The
    norms are the same to the bit. Optimizer offload takes its own as gradients are sent.
    """

    def sum_of_squares(index: int) -> torch.Tensor:
        gradients, dtype = zero.averaged_gradients[index], get_norm_dtype()
        chunks = (chunk for gradient in gradients for chunk in gradient.flatten().split(NORM_CHUNK))
        norms = [torch.linalg.vector_norm(chunk.to(dtype)) for chunk in chunks]
        return torch.stack(norms).pow(2).sum() if norms else torch.zeros((), dtype=dtype, device=zero.device)

    def norms_of_groups() -> list[torch.Tensor]:
        sums = torch.stack([sum_of_squares(index) for index in range(len(getattr(zero, stage.groups)))])
        sums = sums if stage is _STAGE_3 else sums.float()
        torch.distributed.all_reduce(sums, group=zero.dp_process_group)
        return list(sums.pow(0.5))

    if stage is _STAGE_3:
        zero._get_norm_groups = norms_of_groups
    else:
        zero.scaled_global_norm = lambda: combine_grad_norm_groups(norms_of_groups())


def _send_gradients_in_chunks(zero) -> None:
    """Have stages 1 and 2 under optimizer offload send a gradient to the host chunk by chunk.

    They make a copy in fp64 for its norm and one in fp32 to send, each of the whole: up to 8 bytes an element of the
    largest gradient, in the middle of the backward pass.
    """
    kind, attribute = type(zero), "grad_accum" if zero.use_grad_accum_attribute else "grad"

    def take_norm(param: torch.nn.Parameter) -> None:
        key = zero.get_param_id(param)
        squares = []
        for _ in _chunks_of_gradient(zero, key):
            kind.set_norm_for_param_grad_in_gpu(zero, param)
            squares.append(zero.norm_for_param_grads[key] ** 2)
        zero.norm_for_param_grads[key] = sum(squares) ** 0.5

    def copy(param: torch.nn.Parameter) -> None:
        gradient = getattr(param, attribute)
        for _ in _chunks_of_gradient(zero, zero.get_param_id(param)):
            setattr(param, attribute, gradient)  # each copy lets go of it
            kind.async_inplace_copy_grad_to_fp32_buffer_from_gpu(zero, param)

    zero.set_norm_for_param_grad_in_gpu = take_norm
    zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = copy
    zero.temp_grad_buffer_for_gpu_offload = _BufferWhenUsed(zero.temp_grad_buffer_for_gpu_offload)


def _chunks_of_gradient(zero, key: int) -> Iterator[None]:
    """Have `grad_position`, which says where this rank's part of a gradient is and goes, say so of each chunk."""
    group, source, target, numel = position = zero.grad_position[key]
    for begins in range(0, numel, NORM_CHUNK):
        zero.grad_position[key] = [group, source + begins, target + begins, min(NORM_CHUNK, numel - begins)]
        yield
    zero.grad_position[key] = position


def _send_partitions_in_chunks(zero) -> None:
    """The same of stage 3, which sends a parameter's partition and takes norms of 250 million elements at once."""
    send_whole = type(zero)._offload_grad_partition_at_boundary

    def send(param: torch.nn.Parameter, partition: torch.Tensor, *swapped) -> None:
        key = zero.get_param_id(param)
        group, target, numel = position = zero.grad_position[key]
        squares, begins = [], 0
        for chunk in partition.split(NORM_CHUNK):
            zero.grad_position[key] = [group, target + begins, numel]
            send_whole(zero, param, chunk, *swapped)
            squares.append(zero.norm_for_param_grads[key] ** 2)
            begins += chunk.numel()
        zero.grad_position[key] = position
        zero.norm_for_param_grads[key] = sum(squares) ** 0.5

    zero._offload_grad_partition_at_boundary = send


class _BufferWhenUsed:
    """Stands for a buffer of the largest gradient's size, on the device, which accumulation alone uses."""

    def __init__(self, buffer: torch.Tensor):
        self._shape, self._dtype, self._device = buffer.shape, buffer.dtype, buffer.device
        self._buffer: torch.Tensor | None = None

    def view(self, *shape: int) -> torch.Tensor:
        """The buffer in this shape, made if it is not there."""
        if self._buffer is None:
            self._buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._buffer.view(*shape)


def _step_on_host(zero, stage: _Stage, on_host: frozenset[int]) -> None:
    """Have DeepSpeed's step, of the groups `on_host`, bring gradients to the host, where masters and moments are.

    The norm has been taken on the device by then. What follows goes by the master's place: AdamW, and the copy of the
    new weights to the device.
    """
    kind, unscale = type(zero), type(zero).unscale_and_clip_grads

    def flat_gradients(index: int) -> torch.Tensor | None:
        flat = kind._get_preflattened_grad_partition(zero, index)
        if index not in on_host:
            return flat
        if flat is not None:
            return flat.to("cpu")
        gradients = zero.averaged_gradients[index]
        flat, begins = torch.zeros(zero.partition_size[index], dtype=gradients[0].dtype, device="cpu"), 0
        for gradient in gradients:  # one at a time: flattened on the device they would be there twice
            flat[begins : begins + gradient.numel()] = gradient.flatten()
            begins += gradient.numel()
        return flat

    def prepare_gradients(index: int) -> None:
        if index in on_host:
            zero.averaged_gradients[index] = [gradient.to("cpu") for gradient in zero.averaged_gradients[index]]
        kind._prepare_fp32_grad_for_sub_group(zero, index)

    def unscale_with_norm_beside(index_or_gradients, total_norm) -> None:
        of_stage_3 = stage is _STAGE_3
        gradient = zero.fp32_partitioned_groups_flat[index_or_gradients].grad if of_stage_3 else index_or_gradients[0]
        unscale(zero, index_or_gradients, None if total_norm is None else total_norm.to(gradient.device))

    if stage is _STAGE_3:
        zero._prepare_fp32_grad_for_sub_group = prepare_gradients
    else:
        zero._get_preflattened_grad_partition = flat_gradients
    zero.unscale_and_clip_grads = unscale_with_norm_beside


class _OnePass:
    """Has DeepSpeed's step hand LisaAdamW what it needs to do all in one pass, in the place of passes of its own.

    DeepSpeed flattens a group's gradients, casts them to fp32, unscales them, and copies masters to weights, each a
    pass over memory and two of them copies of the whole group. Here it takes a single zero, spread over the partition,
    for the gradient; the factor that unscales is noted; and of weights that are written already it copies nothing.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, stage: _Stage, pieces: list[list[Piece]]):
        self._engine, self._stage, self._pieces = engine, stage, pieces
        zero = self._zero = engine.optimizer
        self._step: PartitionStep | None = None
        zero.unscale_and_clip_grads = self._note_scale
        if stage is _STAGE_3:
            zero._prepare_fp32_grad_for_sub_group = self._prepare_sub_group
            zero._reassign_or_swap_out_partitioned_parameters = self._reassign
        else:
            zero._get_preflattened_grad_partition = self._prepare
            zero.parallel_partitioned_bit16_groups = _WrittenPartitions(zero.parallel_partitioned_bit16_groups)

    def _prepare(self, index: int) -> torch.Tensor:
        """Note the step of one group; the gradient that DeepSpeed is to see."""
        zero, of_stage_3 = self._zero, self._stage is _STAGE_3
        master, weights = getattr(zero, self._stage.masters)[index], _flat_weights(zero, self._stage, index)
        flat = None if of_stage_3 else type(zero)._get_preflattened_grad_partition(zero, index)
        gradients = zero.averaged_gradients[index] if flat is None else [flat]
        if master.device != weights.device:  # states are on the host, and DeepSpeed brings the weights back
            gradients = [gradient.to(master.device) for gradient in gradients]
            weights = None
        elif not of_stage_3:
            zero.parallel_partitioned_bit16_groups.written = index
        of_master = weights is None or master.data_ptr() == weights.data_ptr()
        self._step = PartitionStep(
            self._pieces[index], gradients, None if of_master else weights, draw=self._engine.global_steps
        )
        zero.optimizer.prepare(master, self._step)
        return master.new_zeros(1).expand(master.numel())

    def _note_scale(self, index_or_gradients, total_norm) -> None:
        """DeepSpeed's own, of a gradient that is one number."""
        zero, one = self._zero, torch.ones(1, device=self._engine.device)
        if self._stage is _STAGE_3:
            of_one = {index_or_gradients: SimpleNamespace(grad=one)}
            like_zero = SimpleNamespace(
                loss_scale=zero.loss_scale, clip_grad=zero.clip_grad, fp32_partitioned_groups_flat=of_one
            )
            type(zero).unscale_and_clip_grads(like_zero, index_or_gradients, total_norm)
        else:
            type(zero).unscale_and_clip_grads(zero, [one], total_norm)
        step, self._step = self._step, None  # it holds gradients, which are to be gone behind the step
        step.gradient_scale = one.to(step.gradients[0].device)

    def _prepare_sub_group(self, index: int) -> None:
        getattr(self._zero, self._stage.masters)[index].grad = self._prepare(index)
        self._zero.averaged_gradients[index] = None

    def _reassign(self, index: int) -> None:
        master, weights = self._zero.fp32_partitioned_groups_flat[index], self._zero.fp16_partitioned_groups_flat[index]
        if master.device == weights.device:
            self._zero._unflatten_partitioned_parameters(index)
        else:
            type(self._zero)._reassign_or_swap_out_partitioned_parameters(self._zero, index)


class _WrittenPartitions(list):
    """Weights by group and rank, in which DeepSpeed finds a place for its copy of masters, once for each step.

    It looks a group up right after the optimizer's step, and then not before all groups have been stepped. Of the group
    that is `written` it finds something that takes no copy.
    """

    written: int | None = None

    def __getitem__(self, index):
        if self.written is None or index != self.written:
            return super().__getitem__(index)
        self.written = None
        takes_nothing = SimpleNamespace(data=SimpleNamespace(copy_=lambda source: None))
        return [takes_nothing] * len(super().__getitem__(index))


def _is_per_element(value: object) -> bool:
    """Whether a field of an optimizer's state is a moment or belongs to one, and not a count of steps."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _pieces_of_buffer(group: list[tuple[str, torch.nn.Parameter]], rank: int, numel: int) -> list[Piece]:
    """Stages 1 and 2 lay the parameters of a group end to end and cut the whole into a partition for each rank."""
    pieces, begins = [], -rank * numel
    for name, parameter in group:
        first, last = max(begins, 0), min(begins + parameter.numel(), numel)
        if first < last:
            pieces.append(Piece(name, start=first - begins, length=last - first, offset=first))
        begins += parameter.numel()
    return pieces


def _pieces_of_parameters(group: list[tuple[str, torch.nn.Parameter]], rank: int, numel: int) -> list[Piece]:
    """Stage 3 cuts each parameter by itself, the last rank's share filled up with padding."""
    pieces, offset = [], 0
    for name, parameter in group:
        share = parameter.ds_tensor.ds_numel
        length = min(share, parameter.ds_numel - rank * share)
        if length > 0:
            pieces.append(Piece(name, start=rank * share, length=length, offset=offset))
        offset += share
    assert offset == numel
    return pieces


def _stage_of(engine: deepspeed.DeepSpeedEngine) -> _Stage:
    if engine.zero_optimization_stage() == 0:
        raise UserError(
            "the DeepSpeed engine runs ZeRO stage 0: LISA re-partitions ZeRO states; set zero_optimization.stage to 1, "
            "which costs nothing more on one GPU (--deepspeed zero1)."
        )
    class_name = type(engine.optimizer).__name__
    for stage in (_STAGE_1_2, _STAGE_3):
        if class_name == stage.class_name:
            return stage
    if class_name == "BF16_Optimizer":
        raise UserError(
            "the DeepSpeed config has data_types.grad_accum_dtype = fp32 with bf16 at ZeRO stage 1, for which "
            "DeepSpeed takes an optimizer that LISA cannot re-partition: use stage 2, or leave grad_accum_dtype out."
        )
    raise UserError(f"DeepSpeed built a {class_name}, which LISA cannot re-partition: use plain ZeRO stage 1, 2 or 3.")


@contextlib.contextmanager
def _construct_in_place(zero, stage: _Stage, parameter_offload) -> Iterator[None]:
    """While this lasts, the engine's construction of its ZeRO optimizer runs `__init__` on `zero` instead.

    Stage 3 gets its `parameter_offload` back: destroyed and rebuilt, non-reentrant checkpointing with frozen parameters
    crashes, and hanging the module hooks anew costs most of a switch.
    """

    def construct(*args, **kwargs):
        if parameter_offload is not None:
            zero.initialize_ds_offload = lambda **_: parameter_offload
        type(zero).__init__(zero, *args, **kwargs)
        if parameter_offload is not None:
            del zero.initialize_ds_offload
        return zero

    module = import_module(stage.module)
    original = getattr(module, stage.class_name)
    setattr(module, stage.class_name, construct)
    try:
        yield
    finally:
        setattr(module, stage.class_name, original)


def local_shard(parameter: torch.nn.Parameter) -> tuple[int, torch.Tensor]:
    """At which element this rank's part of a parameter begins, and the part, flat: without stage 3 all of it, from 0.

    What fills up the last rank's part on stage 3 is left out, and a rank may have nothing. Raises ValueError where
    stage 3 does not hold the weights as they are, on NVMe or quantized.
    """
    if not hasattr(parameter, "ds_tensor"):
        return 0, parameter.detach().reshape(-1)
    part = parameter.ds_tensor
    if part.status.name != "AVAILABLE" or not part.is_floating_point():
        raise UserError(
            "the DeepSpeed config keeps weights on NVMe (offload_param) or quantized "
            "(zero_quantized_nontrainable_weights), where they cannot be looked at; take a config without, such as "
            "zero3 or zero3_offload."
        )
    begin = torch.distributed.get_rank(parameter.ds_process_group) * part.ds_numel
    length = min(max(parameter.ds_numel - begin, 0), part.ds_numel)
    return begin, part.detach().reshape(-1)[:length]


def forget_module_order(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make stage 3 record anew in which order modules run, after a forward pass that is not training's (a generation).

    Else it would fetch ahead for modules that training passes by, and find them in flight where they are gathered.
    """
    if engine.zero_optimization_stage() == 3:
        _forget_trace(engine.optimizer.parameter_offload)


def drop_prefetched(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let go of what stage 3 fetched ahead and did not use, before parameters are gathered outside of a training step.

    An evaluation that follows the order recorded in training fetches ahead for a backward pass that never comes; a
    parameter in flight can be neither gathered nor cut again.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()


def _forget_trace(parameter_offload) -> None:
    """Make stage 3 record anew in which order modules run."""
    coordinator = parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _give_own_storage(parameter: torch.nn.Parameter, pin: bool) -> None:
    """Copy a stage-3 partition out of the buffer of all active partitions, which it would keep alive whole."""
    partition = parameter.ds_tensor
    if partition.data.numel() == 0:  # on NVMe
        return
    own = partition.data.clone()
    partition.data = get_accelerator().pin_memory(own) if pin else own


@contextlib.contextmanager
def _cheap_gc() -> Iterator[None]:
    """Keep DeepSpeed's explicit `gc.collect()` from walking every object of the program.

    What exists now is set aside; only what the rebuild itself makes is collected.
    """
    already_frozen = gc.get_freeze_count() > 0
    if not already_frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not already_frozen:
            gc.unfreeze()
