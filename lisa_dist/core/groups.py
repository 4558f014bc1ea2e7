"""Parameter groups in constant number and order.

Schedulers keep one base learning rate for each group and DeepSpeed one flat buffer, so the groups must not change in
number or order when other layers are activated. Each outer block has its own groups, and each of the gamma active
layers, or each active module, fills one slot; a block has one group for what decays and one for what does not. A slot,
or a sampled outer block, may be empty in a period: its groups stay in the list without parameters.
"""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from lisa_dist.config_rules import StateBits
from lisa_dist.core.blocks import Block
from lisa_dist.errors import UserError
from lisa_dist.zero.parameters import parameter_shape


def decays(block: Block, name: str) -> bool:
    """Whether weight decay applies to a parameter of the block."""
    if block.decaying is not None:
        return name in block.decaying
    return len(parameter_shape(block.parameters[name])) >= 2 and not name.endswith("bias")


def split_by_decay(block: Block) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of a block as {"decay": [...], "no_decay": [...]}, without an empty entry."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"decay": [], "no_decay": []}
    for name, parameter in block.parameters.items():
        kinds["decay" if decays(block, name) else "no_decay"].append(parameter)
    return {kind: parameters for kind, parameters in kinds.items() if parameters}


def build_param_groups(
    outer: Iterable[Block],
    active_layers: Iterable[Block],
    weight_decay: float,
    state_bits: Mapping[str, StateBits] | None = None,
    offloaded: Container[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups: the outer blocks first, then one slot for each active layer.

    Every group carries a `lisa_group` name, such as "embed/decay" or "slot1/no_decay". Where `state_bits` has its block
    (embed, head, rest or layers), that is its `lisa_state_bits`: 32, or of what decays alone 8 or "factored".
    `lisa_host` says that its states are on the host, since `offloaded` has its block.
    """
    named = [(block.name, block.name, block) for block in outer]
    named += [(f"slot{slot}", "layers", layer) for slot, layer in enumerate(active_layers)]
    bits = state_bits or {}
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lisa_group": f"{name}/{kind}",
            **({"lisa_state_bits": bits[policy]} if policy in bits and takes_bits(bits[policy], kind) else {}),
            **({"lisa_host": True} if policy in offloaded else {}),
        }
        for name, policy, block in named
        for kind, parameters in split_by_decay(block).items()
    ]


def takes_bits(bits: StateBits, kind: str) -> bool:
    """Whether a group of this kind has what its block is given: fewer bits than 32 apply to what decays, matrices."""
    return bits == 32 or kind == "decay"


def check_same_kinds(layers: list[Block]) -> None:
    """Raise ValueError when layers differ in which kinds of group they need, so that slots could not stay constant."""
    kinds = [tuple(split_by_decay(layer)) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{layer.name} has parameters of the kinds {kind}, but {layers[0].name} has {kinds[0]}: decoder layers "
                "must all have matrices, and all or none have norms or biases. Choose other layers with "
                "--lisa_layers_attribute, and freeze the same in each, if anything."
            )


def scale_rates(optimizer: torch.optim.Optimizer, scales: Mapping[str, float]) -> None:
    """Have parameter groups step with their learning rate times that of their block in `scales` (--lisa_lr_scale).

    By embed, head, rest and layers. The schedule and the trackers keep the group's own rate: it is changed for the
    optimizer's step alone.
    """
    rates: list[tuple[dict[str, Any], float | torch.Tensor]] = []

    def restore(*_: object) -> None:
        for group, rate in rates:
            group["lr"] = rate
        rates.clear()

    def change(optimizer: torch.optim.Optimizer, *_: object) -> None:
        restore()  # after a step that has raised
        for group in optimizer.param_groups:
            block = group["lisa_group"].partition("/")[0]
            share = scales.get("layers" if block.startswith("slot") else block, 1.0)
            if share != 1:
                rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    if scales:
        optimizer.register_step_pre_hook(change)
        optimizer.register_step_post_hook(restore)
