"""The header's part on the model: blocks, parameters, optimizer, memory."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lisa_dist.core.activation_checkpointing import checkpointed_layers
from lisa_dist.core.controller import LisaController
from lisa_dist.core.sampling import coverage, describe_coverage
from lisa_dist.ds_config import uses_optimizer_offload
from lisa_dist.optim.build import LISA_ADAMW
from lisa_dist.optim.ops import choose_kernels
from lisa_dist.text import format_by_block, format_bytes, format_count, format_table


def describe_training(
    lisa: LisaController,
    model: torch.nn.Module,
    ds_config: dict[str, Any],
    optim: str,
    ranks: Sequence[tuple[str, str]],
    steps: int | None = None,
) -> str:
    """Return a table of an attached controller: blocks, parameters, `ranks` (rows of their own), states, memory.

    `steps` are the optimizer steps of the whole run, where they are known.
    """
    config, engine = lisa.config, lisa.engine
    numel = {block.name: block.numel for block in lisa.blocks if block.parameters}
    layers = [block.numel for block in lisa.blocks.layers]
    total = sum(numel.values())
    always_on = [name for name in config.always_on if name in numel]
    never = [name for name in (*config.frozen, "outside") if name in numel]
    active_blocks = [*always_on, *lisa.active_blocks]
    active = sum(numel[name] for name in active_blocks) + sum(layers[layer] for layer in lisa.active_layers)
    states = list(lisa.partition_states().values())
    kept = "two moments" if all(state.is_weights for state in states) else "master weights and two moments"
    frozen = lisa.blocks.frozen_numel
    world_size = torch.distributed.get_world_size()

    trained = f"{config.lisa_activated_layers} layers"
    if config.by_module:
        trained = f"modules of {config.lisa_budget} of their parameters"

    def named(names: list[str]) -> str:
        return ", ".join(f"{name} {format_count(numel[name])}" for name in names) or "nothing"

    sharing: Any = getattr(next(model.parameters()), "ds_zero_param_process_group", None)
    of_host = 1 if sharing is None else torch.distributed.get_world_size(sharing)
    of_hosts = f"; the {of_host} of each host have a copy of all weights between them" if of_host > 1 else ""
    rows = [
        ("model", f"{type(model).__name__}, {format_count(total)} parameters"),
        ("decoder layers", _describe_layers(lisa)),
        ("always trained", named(always_on) + (" (embed and head are one tied matrix)" if lisa.blocks.tied else "")),
        *([("sampled like layers", named(list(lisa.block_visit_counts)))] if lisa.block_visit_counts else []),
        ("never trained", named(never) + (f", of which {format_count(frozen)} were frozen before" if frozen else "")),
        *([("outside", _describe_outside(lisa))] if "outside" in never else []),
        (
            "active at a time",
            f"{format_count(active)} ({100 * active / total:.1f}%)" + (": full training" if active == total else ""),
        ),
        ("inactive", format_count(total - active)),
        *([("period", f"{config.lisa_interval_steps} steps with {trained}, {config.lisa_sampler}")] * config.samples),
        *([] if steps is None or not config.samples else [("periods", _describe_coverage(lisa, steps))]),
        *([("scales of it", format_by_block("--lisa_lr_scale", "", config.lr_scales))] if config.lr_scales else []),
        *ranks,
        ("ZeRO", f"stage {ds_config['zero_optimization']['stage']} on {world_size} rank(s){of_hosts}"),
        ("optimizer", _describe_optimizer(optim, ds_config, engine.device.type)),
        ("states per rank", f"{format_count(sum(state.numel for state in states))} elements each of {kept}"),
        *([] if lisa.frozen_layers is None else [("frozen layers", lisa.frozen_layers.describe())]),
        ("checkpointed", f"{checkpointed_layers(model, lisa.blocks)} of {lisa.blocks.num_layers} layers"),
        ("memory now", f"{format_bytes(lisa.live_bytes())} of tensors per rank, before the moments"),
    ]
    return "LISA\n" + format_table(rows)


def _describe_coverage(lisa: LisaController, steps: int) -> str:
    config, selection, num_layers = lisa.config, lisa.selection, lisa.blocks.num_layers
    active, outer = config.lisa_activated_layers, selection.sampled
    found = coverage(
        config.lisa_sampler, num_layers, active, config.lisa_interval_steps, steps, selection.weights, outer
    )
    if config.by_module or active == 0:  # modules differ in size, and their number in a period too
        found = replace(found, layers=None)
    return describe_coverage(found, num_layers)


def _describe_outside(lisa: LisaController) -> str:
    """What is not the language model's, such as a vision tower, by the names at which it parts from the layers'."""
    found, layers_path = {}, f"{lisa.blocks.layers_path}."
    for name in lisa.blocks.outside.parameters:
        paths = itertools.accumulate(name.split("."), "{}.{}".format)
        found[next(path for path in paths if not layers_path.startswith(f"{path}."))] = True
    return f"not of the language model, or frozen before: {', '.join(found)}"


def _describe_layers(lisa: LisaController) -> str:
    units, count = [block.numel for block in lisa.blocks.layers if block.parameters], lisa.blocks.num_layers
    if lisa.config.by_module:
        sizes = f"{format_count(min(units))} to {format_count(max(units))}"
        return f"{count} at {lisa.blocks.layers_path}, of {len(units)} linear modules, {sizes} parameters each"
    return f"{count} at {lisa.blocks.layers_path}, of {format_count(max(units))} parameters each"


def _describe_optimizer(optim: str, ds_config: dict[str, Any], device_type: str) -> str:
    """The optimizer that really runs: under optimizer offload that is not what --optim says."""
    if uses_optimizer_offload(ds_config):
        return f"DeepSpeed's AdamW on the host, in the place of {optim}"
    if optim != LISA_ADAMW:
        return optim
    kernels, why = choose_kernels(device_type)
    return f"{optim} by {kernels} ({why})"
