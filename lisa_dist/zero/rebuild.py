"""A switch, as the ZeRO optimizer sees it: taken down to an empty shell, and built again over other parameters.

`rebuild` is the whole of it, in order. The optimizer object stays the same, so schedulers, Accelerate's wrappers and
user code stay bound to it; DeepSpeed's own constructor makes groups, flat buffers, partitions, hooks and buckets.
"""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from lisa_dist.optim.states import CopyStream, PartitionKey, PartitionState, is_moment
from lisa_dist.zero import stage3
from lisa_dist.zero.stages import Stage, override

# What DeepSpeed's constructor would set back and a run must keep: the fp16 scaler, hooks that the engine registered,
# and the last norms.
CARRIED_FIELDS = (
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
)
# Attributes that stages 1 and 2 give a parameter of theirs: the first two would keep the old partition alive, and a
# model with the others cannot be pickled.
_STALE_ATTRIBUTES = (
    "_hp_mapping",
    "grad_accum",
    "_dp_group",
    "_index_in_param_group",
    "param_idx_in_group",
    "get_full_hp_param",
    "get_full_hp_grad",
    "set_full_hp_param",
    "set_full_hp_grad",
    "load_hp_checkpoint_state",
)


def rebuild(
    engine: deepspeed.DeepSpeedEngine,
    stage: Stage,
    params_of_groups: Sequence[list[torch.nn.Parameter]],
    position: Mapping[int, int],
) -> None:
    """Build the engine's ZeRO optimizer again over `params_of_groups`, as many groups as before, none of them empty.

    `position` is each parameter's place in the model, by id. Every partition has a master cloned from the weights, and
    no moments. Gradients must have been used up, and the device be done.
    """
    zero, inner = engine.optimizer, engine.optimizer.optimizer
    carried_fields = {name: getattr(zero, name) for name in CARRIED_FIELDS}
    parameter_offload = getattr(zero, "parameter_offload", None)
    with _cheap_gc():
        stage3.prepare_order(engine, position, stage.groups(zero), params_of_groups)
        let_go_of_model(zero, stage)
        staying = {id(parameter) for params in params_of_groups for parameter in params}
        for parameter in (one for group in stage.groups(zero) for one in group) if stage.is_stage_3 else ():
            if id(parameter) not in staying:
                stage3.give_own_storage(parameter, pin=zero.offload_param_pin_memory)
        zero.__dict__.clear()
        inner.state.clear()
        for group, params in zip(inner.param_groups, params_of_groups, strict=True):
            group["params"] = params
        with _construct_in_place(zero, stage, parameter_offload):
            rebuilt = engine._configure_zero_optimizer(inner)
    assert rebuilt is zero
    for name, value in carried_fields.items():
        setattr(zero, name, value)


def let_go_of_model(zero: Any, stage: Stage) -> None:
    """Remove from the model what the optimizer has attached to it: hooks on gradients, attributes of parameters."""
    for hook in [*zero._grad_acc_hooks, *getattr(zero, "_leaf_module_hooks", ())]:
        hook.remove()
    for group in stage.groups(zero):
        for parameter in group:
            for name in _STALE_ATTRIBUTES:
                vars(parameter).pop(name, None)


@contextlib.contextmanager
def _construct_in_place(zero: Any, stage: Stage, parameter_offload: Any) -> Iterator[None]:
    """While this lasts, the engine's construction of its ZeRO optimizer runs `__init__` on `zero` instead.

    Stage 3 gets its `parameter_offload` back: destroyed and rebuilt, non-reentrant checkpointing with frozen parameters
    crashes, and attaching the module hooks anew costs most of a switch. The allocator's cache stays: DeepSpeed empties
    it once a group, each time waiting for the device and for copies of kept states, and new blocks fit in old memory.
    """

    def construct(*args: Any, **kwargs: Any) -> Any:
        if parameter_offload is not None:
            override(zero, "initialize_ds_offload", lambda **_: parameter_offload)
        type(zero).__init__(zero, *args, **kwargs)
        if parameter_offload is not None:
            del zero.initialize_ds_offload
        return zero

    module, original, accelerator = import_module(stage.module), stage.optimizer_class, get_accelerator()
    override(module, stage.class_name, construct)
    override(accelerator, "empty_cache", lambda: None)
    over_the_host = getattr(module, "defragment", None)
    if stage.is_stage_3:
        override(module, "defragment", stage3.flatten_partitions)
    try:
        yield
    finally:
        setattr(module, stage.class_name, original)
        vars(accelerator).pop("empty_cache", None)
        if stage.is_stage_3:
            vars(module)["defragment"] = over_the_host


@contextlib.contextmanager
def _cheap_gc() -> Iterator[None]:
    """Keep DeepSpeed's explicit `gc.collect()` from walking every object of the program.

    What exists now is set aside; only what the rebuild itself makes is collected.
    """
    if gc.get_freeze_count() > 0:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def put_back(
    zero: Any,
    stage: Stage,
    keys: Sequence[PartitionKey],
    carried: Mapping[PartitionKey, PartitionState],
    copies: CopyStream,
) -> None:
    """Fill the new partitions with the states that are carried over; copies from the host are queued, not awaited."""
    for index, (key, master) in enumerate(zip(keys, stage.masters(zero), strict=True)):
        state = carried.get(key) if key else None
        if state is None:
            continue
        assert state.master.shape == master.shape, key
        comes_from_host = state.master.device != master.device
        moments = {
            name: torch.empty_like(value, device=master.device) if comes_from_host and is_moment(value) else value
            for name, value in state.optimizer_state.items()
        }
        with copies.after_compute() if comes_from_host else contextlib.nullcontext():
            # A master that is the weights has their values already, and the next step may be reading them.
            if not stage.master_is_weights(zero, index):
                master.data.copy_(state.master.data, non_blocking=comes_from_host)
            for name, value in state.optimizer_state.items():
                if moments[name] is not value:
                    moments[name].copy_(value, non_blocking=True)
        if moments:
            zero.optimizer.state[master] = moments
