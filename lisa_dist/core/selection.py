"""Which blocks of one model train when, and the parameter groups over them, in constant number and order.

Schedulers keep one base learning rate for each group and DeepSpeed one flat buffer, so the groups must not change in
number or order when other layers are activated. Each outer block has its own groups, and each of the gamma active
layers, or each active module, fills one slot; a block has one group for what decays and one for what does not. A slot,
or a sampled outer block, may be empty in a period: its groups stay in the list without parameters.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import ADAPTERS, FACTORED, OUTER_BLOCKS, StateBits
from lisa_dist.core.blocks import Block, Blocks
from lisa_dist.core.layer_weights import LayerImportance, load_layer_weights
from lisa_dist.core.sampling import (
    ActiveSet,
    Period,
    SampledBlock,
    fill,
    inclusion_probabilities,
    sample_period,
    sample_units,
)
from lisa_dist.errors import UserError
from lisa_dist.optim.states import PartitionKey
from lisa_dist.text import format_active, format_count
from lisa_dist.zero.parameters import parameter_shape


class BlockSelection:
    """What trains in each period of a run, and its parameter groups; UserError for what the model cannot have."""

    def __init__(self, config: LisaConfig, blocks: Blocks):
        num_layers = len(blocks.layers)
        config.check_num_layers(num_layers)
        if not config.by_module:
            check_same_kinds(blocks.layers)
        self._config, self._blocks = config, blocks
        self._sizes = [layer.numel for layer in blocks.layers]
        self._budget = unit_budget(config, self._sizes) if config.by_module else 0
        self.most_active = most_active(config, self._sizes)
        self.gamma = config.lisa_activated_layers  # layers of a period, or fewer (`sample_fewer`)
        self.sampled = sampled_blocks(config, blocks)
        _check_factored(config, blocks)
        file = config.lisa_weights_file
        self.weights = None if file is None else load_layer_weights(file, num_layers, config.lisa_activated_layers)
        self.importance = LayerImportance(num_layers) if config.lisa_sampler == "adaptive" else None
        self._layer_of = {name: number for number, layer in enumerate(blocks.layers) for name in layer.parameters}
        self._names = {id(parameter): name for block in blocks for name, parameter in block.parameters.items()}

    def sample(self, period: int) -> ActiveSet:
        """What a period trains besides the always-trained blocks."""
        sampler, seed, weights = self._config.lisa_sampler, self._config.lisa_seed, self.weights_now
        if self._config.by_module:
            return sample_units(sampler, self._sizes, self._budget, seed, period, weights)
        return sample_period(sampler, Period(len(self._sizes), self.gamma, seed, period, weights, self.sampled))

    def sample_fewer(self, layers: int) -> None:
        """Sample `layers`, no more than the settings say, from the next period on; the optimizer keeps its slots."""
        assert 1 <= layers <= self.most_active
        self.gamma = layers
        self.sampled = sampled_blocks(replace(self._config, lisa_activated_layers=layers), self._blocks)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the layers, as JSON has it."""
        importance = None if self.importance is None else list(self.importance.averages)
        state = {"weights": self.weights, "importance": importance}
        return state if self.gamma == self._config.lisa_activated_layers else state | {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what a saved run (`LisaController.state_dict`) had learned of its layers."""
        if state["config"]["lisa_activated_layers"] == self._config.lisa_activated_layers and "gamma" in state:
            self.sample_fewer(state["gamma"])
        if self.importance is not None and state.get("importance") is not None:
            self.importance.averages = list(state["importance"])

    @property
    def weights_now(self) -> list[float] | None:
        """What layers are sampled by in the next period, or None where all are alike."""
        return self.weights if self.importance is None else self.importance.weights()

    def probabilities(self, active: ActiveSet) -> list[float]:
        """The probability of each layer to be sampled, by the current weights; of modules, whose sizes decide, none."""
        weights = self.weights_now
        return [] if weights is None or self._config.by_module else inclusion_probabilities(weights, len(active.layers))

    def layer_of(self, key: PartitionKey) -> int | None:
        """The decoder layer of a partition, or None for one of embed, head and rest."""
        return self._layer_of.get(key[0])

    def widest(self, active: ActiveSet) -> ActiveSet:
        """The set with a layer in every slot and every sampled outer block, since DeepSpeed takes no empty group."""
        others = [layer for layer, size in enumerate(self._sizes) if layer not in active.layers and size > 0]
        others.sort(key=self._sizes.__getitem__)  # layers of a size stay in order
        layers = sorted([*active.layers, *others[: self.most_active - len(active.layers)]])
        return ActiveSet(tuple(layers), tuple(block.name for block in self.sampled))

    def trained(self, active: ActiveSet) -> list[Block]:
        """The blocks that train, in the model's order; none without parameters."""
        inactive = self.inactive(active)
        return [block for block in self._blocks if block.parameters and block not in inactive]

    def inactive(self, active: ActiveSet) -> list[Block]:
        """The blocks that do not train."""
        trained = [*self._outer(active), *self._layers(active)]
        return [block for block in self._blocks if block not in trained]

    def describe(self, active: ActiveSet) -> str:
        """What trains besides the always-trained blocks: layers by number, modules like 3.mlp.up_proj."""
        return format_active([layer.name.removeprefix("layers.") for layer in self._layers(active)], active.blocks)

    def activate(self, active: ActiveSet) -> None:
        """Let exactly the active blocks require gradients."""
        inactive = self.inactive(active)
        for block in self._blocks:
            block.requires_grad_(block not in inactive)

    def param_groups(self, active: ActiveSet, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The parameter groups of the widest set: the same number and order whatever is sampled."""
        groups = self._groups(self.widest(active), weight_decay)
        if not groups:
            raise UserError(
                "--lisa_activated_layers 0, and what else would train has requires_grad=False in this model: nothing "
                "trains; activate layers, or leave embed, head or rest trainable."
            )
        return groups

    def params_of_groups(self, active: ActiveSet) -> list[list[torch.nn.Parameter]]:
        """The parameters of each of `param_groups` that are active; a group may have none."""
        params = {group["lisa_group"]: group["params"] for group in self._groups(active)}
        return [params.get(group["lisa_group"], []) for group in self.param_groups(active)]

    def names_of(self, params_of_groups: Iterable[list[torch.nn.Parameter]]) -> list[PartitionKey]:
        """The names of the parameters of each group."""
        return [tuple(self._names[id(parameter)] for parameter in params) for params in params_of_groups]

    def _outer(self, active: ActiveSet) -> list[Block]:
        """The outer blocks that train, in the order of their groups; none without parameters."""
        names = [name for name in (*OUTER_BLOCKS, ADAPTERS) if name in (*self._config.always_on, *active.blocks)]
        return [block for block in map(self._blocks.outer, names) if block.parameters]

    def _layers(self, active: ActiveSet) -> list[Block]:
        return [self._blocks.layers[layer] for layer in active.layers]

    def _groups(self, active: ActiveSet, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        bits, offloaded = self._config.state_bits, self._config.offloaded
        return build_param_groups(self._outer(active), self._layers(active), weight_decay, bits, offloaded)


def most_active(config: LisaConfig, sizes: Sequence[int]) -> int:
    """Gamma, or the most modules that fit the budget: the slots of the optimizer."""
    if not config.by_module:
        return config.lisa_activated_layers
    smallest = sorted(range(len(sizes)), key=sizes.__getitem__)
    return len(fill(smallest, sizes, unit_budget(config, sizes)))


def unit_budget(config: LisaConfig, sizes: Sequence[int]) -> int:
    """Parameters that a period may train of modules of these sizes. Raises UserError where not one fits."""
    smallest, total = min(filter(None, sizes)), sum(sizes)
    budget = int(config.budget * total * (1 + 1e-9))  # 0.29 of 100 is 28.999999999999996
    if budget < smallest:
        raise UserError(
            f"--lisa_budget {config.lisa_budget}: {format_count(budget)} of {format_count(total)} parameters, and the "
            f"smallest module has {format_count(smallest)}; give {math.ceil(1e4 * smallest / total) / 100:g}% or more."
        )
    return budget


def sampled_blocks(config: LisaConfig, blocks: Blocks) -> list[SampledBlock]:
    """The outer blocks that are sampled, with their probabilities and places; tied matrices are one, in embed."""
    probabilities = dict(config.block_probabilities)
    if blocks.tied:
        _check_tied(config)
        if "head" in probabilities:
            probabilities["embed"] = probabilities.pop("head")
    gamma, num_layers = config.lisa_activated_layers, len(blocks.layers)
    layer_numel = sum(layer.numel for layer in blocks.layers) / num_layers
    sampled = []
    for name in config.sampled:
        block = blocks.outer(name)
        if block.parameters:
            places = min(gamma, round(block.numel / layer_numel))
            sampled.append(SampledBlock(name, probabilities.get(name) or gamma / num_layers, places))
    total = sum(block.probability for block in sampled)
    if total > 1:
        listed = ", ".join(f"{block.name}={block.probability:g}" for block in sampled)
        raise UserError(
            f"--lisa_block_probability {config.lisa_block_probability}: a period trains at most one sampled block, but "
            f"the probabilities add up to {total:g} ({listed})."
        )
    return sampled


def _check_tied(config: LisaConfig) -> None:
    """Refuse settings that differ for embed and head, which are one matrix."""

    def differ(given: Mapping[str, object] | Sequence[str]) -> bool:
        if isinstance(given, Mapping):  # a head without a value of its own has that of the embedding
            return given.get("head", given.get("embed")) != given.get("embed")
        return ("embed" in given) != ("head" in given)

    probabilities = config.block_probabilities
    policies = (
        f"--lisa_always_on {config.lisa_always_on}, --lisa_frozen {config.lisa_frozen}, "
        f"--lisa_block_probability {config.lisa_block_probability}"
    )
    for flags, are_two in (
        (policies, differ(config.always_on) or differ(config.frozen)),
        (policies, len({probabilities[name] for name in ("embed", "head") if name in probabilities}) > 1),
        (f"--lisa_state_bits {config.lisa_state_bits}", differ(config.state_bits)),
        (f"--lisa_offload {config.lisa_offload}", differ(config.offloaded)),
        (f"--lisa_lr_scale {config.lisa_lr_scale}", differ(config.given_scales)),
    ):
        if are_two:
            way_out = "both or neither" if "offload" in flags else "both the same"
            raise UserError(f"{flags}: embed and head of this model are one tied matrix; give {way_out}.")


def _check_factored(config: LisaConfig, blocks: Blocks) -> None:
    for block in (blocks.outer(name) for name, given in config.state_bits.items() if given == FACTORED):
        for name, parameter in block.parameters.items():
            shape = parameter_shape(parameter)
            if decays(block, name) and len(shape) != 2:
                raise UserError(
                    f"--lisa_state_bits {config.lisa_state_bits}: moments by row and column are for matrices, and "
                    f"{name} in {block.name} has the shape {list(shape)}; give {block.name}=8."
                )


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

    Every group has a `lisa_group` name, such as "embed/decay" or "slot1/no_decay"; `lisa_state_bits` where `state_bits`
    has its block (embed, head, rest or layers); and `lisa_host` where `offloaded` has it.
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
    """Whether a group of this kind has the bits of its block: fewer than 32 apply to what decays, matrices."""
    return bits == 32 or kind == "decay"


def check_same_kinds(layers: list[Block]) -> None:
    """Raise UserError when layers differ in which kinds of group they need, so that slots could not stay constant."""
    first = tuple(split_by_decay(layers[0]))
    for layer in layers:
        if (kind := tuple(split_by_decay(layer))) != first:
            raise UserError(
                f"{layer.name} has parameters of the kinds {kind}, but {layers[0].name} has {first}: decoder layers "
                "must all have matrices, and all or none have norms or biases. Choose other layers with "
                "--lisa_layers_attribute, and freeze the same in each, if anything."
            )


def scale_rates(optimizer: torch.optim.Optimizer, scales: Mapping[str, float]) -> None:
    """Have parameter groups step with their learning rate times that of their block in `scales` (--lisa_lr_scale).

    The schedule and the trackers keep the group's own rate: it is changed for the optimizer's step alone.
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
