"""What ZeRO-3 gathers and keeps: inputs of frozen weights, recomputed layers, the order of modules, prefetches."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.utils import groups, set_z3_leaf_module, z3_leaf_module
from transformers.modeling_layers import GradientCheckpointingLayer

from lisa_dist.ds_config import fill_layer_gathers
from lisa_dist.zero.parameters import parameter_numel

# The decoder layer of each module, of all models in the process.
_layer_of: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()
# Decoder layers, of all models in the process.
_gathered_at_once: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
# By coordinator: an order of modules, and what is let go of by module and place in it.
_releases: weakref.WeakKeyDictionary[Any, tuple[Any, dict[tuple[int, int], set[int]]]] = weakref.WeakKeyDictionary()
# DeepSpeed's own; a release without it is reported by `override`.
keep_until_module_is_done = getattr(partitioned_param_coordinator, "update_recompute_parameters", None)


class LinearFunction(LinearFunctionForZeroStage3):
    """DeepSpeed's linear function of stage 3, keeping the input only where the weight needs a gradient.

    DeepSpeed's own keeps the inputs of frozen weights too: of every frozen layer, which is most of the activations.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        LinearFunctionForZeroStage3.setup_context(ctx, inputs, output)
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, *inputs[1:], *[None] * (3 - len(inputs)))


def flatten_partitions(partitions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make partitions of one dtype and device views of one new buffer, in their order; the buffer.

    DeepSpeed copies them to the host, pageable, and back, so that the device need not hold both. In a switch it can:
    the buffer of gradients, which is as large, is gone, and the next one is not there yet.
    """
    buffer = torch.empty(sum(one.numel() for one in partitions), dtype=partitions[0].dtype, device=partitions[0].device)
    for partition, place in zip(partitions, buffer.split([one.numel() for one in partitions]), strict=True):
        place.copy_(partition)
        partition.data = place
    return buffer


def remember_checkpointed_layers(model: torch.nn.Module) -> None:
    """Note the layer of each module of a model whose layers can be checkpointed."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            _layer_of.update(dict.fromkeys(layer.modules(), weakref.ref(layer)))


def keep_until_layer_is_done(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Keep a parameter that a recomputation has gathered until the layer's backward pass is done.

    DeepSpeed ties it to the module whose backward pass began the recomputation, a layer's last matrix, and partitions
    it again right after: most of every frozen layer would be gathered a third time in each step.
    """
    assert keep_until_module_is_done is not None
    reference = _layer_of.get(module)
    layer = None if reference is None else reference()
    keep_until_module_is_done(module if layer is None else layer, parameter)


def largest_layer(layers: Iterable[torch.nn.Module]) -> int | None:
    """Elements of the largest decoder layer; None where one has a part that is gathered at once by itself.

    So DeepSpeed has it of mixtures, for experts that no token of a rank comes to.
    """
    layers = list(layers)
    parts = [part for layer in layers for part in layer.modules() if part is not layer]
    if any(hasattr(part, "experts") or z3_leaf_module(part) for part in parts):
        return None
    return max(sum(parameter_numel(parameter) for parameter in layer.parameters()) for layer in layers)


def gather_by_layers(model: Any, layers: Sequence[torch.nn.Module], ds_config: dict[str, Any]) -> bool:
    """Before the engine is built: have it gather each decoder layer at once, if `fill_layer_gathers` says so."""
    hidden_size = model.config.get_text_config().hidden_size
    by_layers = fill_layer_gathers(ds_config, largest_layer(layers), hidden_size)
    for layer in layers:
        set_z3_leaf_module(layer, by_layers)
        (_gathered_at_once.add if by_layers else _gathered_at_once.discard)(layer)
    return by_layers


def reduce_by_parameters(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Have each gradient of a layer that is gathered at once be reduced when it arrives, as those of other layers.

    DeepSpeed waits for the backward hook of the layer, which torch calls too early where no input needs a gradient:
    below it all is frozen. It would reduce zeros, and never the gradients.
    """
    for parameter in parameters:
        if getattr(parameter, "ds_z3_leaf_module", None) in _gathered_at_once:
            vars(parameter).pop("ds_z3_leaf_module")


def what_to_release(coordinator: Any, module: Any, step: int) -> set[int]:
    """By `ds_id`, the parameters of a module to let go of at a place in the recorded order of modules.

    They are those that no module needs again within the reuse distance. DeepSpeed gives the same answer for a place
    when the order is another one, as after a switch; and where a module is gathered at once, it takes all that contain
    it, which come again when the backward pass begins, for ones that need all parameters.
    """

    def own(name: str) -> Any:
        return getattr(coordinator, f"_PartitionedParameterCoordinator__{name}")

    def parameters_of(one: Any) -> Any:
        return partitioned_param_coordinator.iter_params(one, recurse=z3_leaf_module(one))

    order, key = own("submodule_order"), (module.ds_id, step)
    known_order, known = _releases.get(coordinator, ((), {}))
    if known_order is not order:
        _releases[coordinator] = order, (known := {})
    if key not in known:
        known[key], passed = {one.ds_id for one in parameters_of(module) if not one.ds_persist}, 0
        for later in order[step:]:
            if passed >= own("max_reuse_dist_in_numel"):
                break
            known[key] -= {one.ds_id for one in parameters_of(later)}
            passed += sum(one.ds_numel for one in parameters_of(later))
    fetched = own("most_recent_step_id_param_fetched_for")  # later uses are not prefetched where it is whole
    return known[key] - {one.ds_id for one in parameters_of(module) if fetched[one] > step}


@contextlib.contextmanager
def asking(engine: deepspeed.DeepSpeedEngine) -> Iterator[Any]:
    """The engine's model in evaluation mode and without gradients, to be asked between steps of training."""
    model: Any = engine.module
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)
        forget_module_order(engine)


def forget_module_order(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have stage 3 record anew in which order modules run, after a forward pass that is not training's (a generation).

    Otherwise it would prefetch for modules that training does not run, and find them in flight when it gathers them.
    """
    if engine.zero_optimization_stage() == 3:
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


def forget_sharing_ranks(model: torch.nn.Module) -> None:
    """Have the next engine make its own group of ranks that share weights, or none, as its config says.

    DeepSpeed keeps the first one of a process. A model that it has cut already has its group.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def drop_prefetched(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let go of what stage 3 prefetched and did not use, before parameters are gathered outside of a training step.

    An evaluation that follows the order recorded in training prefetches for a backward pass that never comes; a
    parameter in flight can be neither gathered nor partitioned.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()


def prepare_order(
    engine: deepspeed.DeepSpeedEngine,
    position: Mapping[int, int],
    groups: Sequence[Sequence[torch.nn.Parameter]],
    next_groups: Sequence[Sequence[torch.nn.Parameter]],
) -> None:
    """At a switch: have stage 3 record the order of modules anew only if the backward pass will end elsewhere.

    Modules run backward down to the lowest parameter that trains, whatever is frozen above it. If that stays, so does
    the order, and the next step is as fast as any other. `position` is a parameter's place in the model, by id; a
    placeholder has none.
    """

    def lowest(trained: Sequence[Sequence[torch.nn.Parameter]]) -> int | None:
        ids = (id(parameter) for group in trained for parameter in group)
        return min((position[key] for key in ids if key in position), default=None)

    if lowest(groups) == lowest(next_groups):
        drop_prefetched(engine)
    else:
        forget_module_order(engine)


def give_own_storage(parameter: Any, pin: bool) -> None:
    """Copy a partition out of the one buffer of all active partitions, which it would keep alive whole."""
    partition = parameter.ds_tensor
    if partition.data.numel() == 0:  # on NVMe
        return
    own = partition.data.clone()
    partition.data = get_accelerator().pin_memory(own) if pin else own
