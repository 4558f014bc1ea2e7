"""Which blocks of one model train when: the settings of LISA met with the model's blocks.

`sampling` knows numbers alone; this file knows which parameters they stand for. It knows no engine and no rank.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lisa_dist.config import LisaConfig
from lisa_dist.config_rules import FACTORED, OUTER_BLOCKS, StateBits
from lisa_dist.core.blocks import Block, Blocks
from lisa_dist.core.groups import build_param_groups, check_same_kinds, decays
from lisa_dist.core.importance import LayerImportance
from lisa_dist.core.layer_weights import load_layer_weights
from lisa_dist.core.sampling import ActiveSet, SampledBlock, fill, inclusion_probabilities, sample_period, sample_units
from lisa_dist.errors import UserError
from lisa_dist.optim.states import PartitionKey
from lisa_dist.text import format_active, format_count
from lisa_dist.zero.parameters import parameter_shape


class BlockSelection:
    """What trains in each period of a run, and its parameter groups.

    Raises ValueError for settings that this model cannot have.
    """

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
        self._state_bits = _state_bits(config, blocks)
        self._offloaded = _offloaded(config, blocks)
        _check_lr_scales(config, blocks)
        file = config.lisa_weights_file
        self.weights = None if file is None else load_layer_weights(file, num_layers, config.lisa_activated_layers)
        self.importance = LayerImportance(num_layers) if config.lisa_sampler == "adaptive" else None
        self._layer_of = {name: number for number, layer in enumerate(blocks.layers) for name in layer.parameters}
        self._names = {id(parameter): name for block in blocks for name, parameter in block.parameters.items()}

    def sample(self, period: int) -> ActiveSet:
        """What a period trains besides the always-trained blocks."""
        config = self._config
        if config.by_module:
            sizes, budget = self._sizes, self._budget
            return sample_units(config.lisa_sampler, sizes, budget, config.lisa_seed, period, self.weights_now)
        return sample_period(
            config.lisa_sampler,
            len(self._blocks.layers),
            self.gamma,
            config.lisa_seed,
            period,
            self.weights_now,
            self.sampled,
        )

    def sample_fewer(self, layers: int) -> None:
        """Sample `layers`, no more than the settings say, from the next period on; the optimizer keeps its slots."""
        assert 1 <= layers <= self.most_active
        self.gamma = layers
        self.sampled = sampled_blocks(replace(self._config, lisa_activated_layers=layers), self._blocks)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the layers, as JSON has it."""
        importance = None if self.importance is None else self.importance.state_dict()
        state = {"weights": self.weights, "importance": importance}
        return state if self.gamma == self._config.lisa_activated_layers else state | {"gamma": self.gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what a saved run (`LisaController.state_dict`) had learned of its layers."""
        if state["config"]["lisa_activated_layers"] == self._config.lisa_activated_layers and "gamma" in state:
            self.sample_fewer(state["gamma"])
        if self.importance is not None and state.get("importance") is not None:
            self.importance.load_state_dict(state["importance"])

    @property
    def weights_now(self) -> list[float] | None:
        """What layers are sampled by in the next period, or None where all are alike."""
        return self.weights if self.importance is None else self.importance.weights()

    def probabilities(self, active: ActiveSet) -> list[float]:
        """The probability that each layer had to be sampled, by the current weights; empty where there are none.

        Empty for modules too, whose sizes decide as well.
        """
        weights = self.weights_now
        return [] if weights is None or self._config.by_module else inclusion_probabilities(weights, len(active.layers))

    def layer_of(self, key: PartitionKey) -> int | None:
        """The decoder layer of a partition, or None for one of embed, head and rest."""
        return self._layer_of.get(key[0])

    def widest(self, active: ActiveSet) -> ActiveSet:
        """The set with a layer in every slot and every outer block that is ever sampled.

        What the optimizer is built over, since DeepSpeed takes no group without parameters.
        """
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
        blocks = [
            self._blocks.outer(name) for name in OUTER_BLOCKS if name in (*self._config.always_on, *active.blocks)
        ]
        return [block for block in blocks if block.parameters]

    def _layers(self, active: ActiveSet) -> list[Block]:
        return [self._blocks.layers[layer] for layer in active.layers]

    def _groups(self, active: ActiveSet, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        outer, layers = self._outer(active), self._layers(active)
        return build_param_groups(outer, layers, weight_decay, self._state_bits, self._offloaded)


def most_active(config: LisaConfig, sizes: Sequence[int]) -> int:
    """Gamma, or the most modules that fit the budget: the slots of the optimizer."""
    if not config.by_module:
        return config.lisa_activated_layers
    smallest = sorted(range(len(sizes)), key=sizes.__getitem__)
    return len(fill(smallest, sizes, unit_budget(config, sizes)))


def unit_budget(config: LisaConfig, sizes: Sequence[int]) -> int:
    """Parameters that a period may train of modules of these sizes. Raises ValueError where not one fits."""
    smallest, total = min(filter(None, sizes)), sum(sizes)
    budget = int(config.budget * total * (1 + 1e-9))  # 0.29 of 100 is 28.999999999999996
    if budget < smallest:
        raise UserError(
            f"--lisa_budget {config.lisa_budget}: {format_count(budget)} of {format_count(total)} parameters, and the "
            f"smallest module has {format_count(smallest)}; give {math.ceil(1e4 * smallest / total) / 100:g}% or more."
        )
    return budget


def sampled_blocks(config: LisaConfig, blocks: Blocks) -> list[SampledBlock]:
    """The outer blocks that are sampled, with their probabilities and places; tied matrices are one, in embed.

    Raises ValueError when embed and head are tied and not treated as one, or the probabilities add up to more than 1.
    """
    policies = {name: [name in config.always_on, name in config.frozen] for name in ("embed", "head")}
    probabilities = dict(config.block_probabilities)
    if blocks.tied:
        given = {probabilities.pop(name) for name in ("embed", "head") if name in probabilities}
        if policies["embed"] != policies["head"] or len(given) > 1:
            raise UserError(
                f"--lisa_always_on {config.lisa_always_on}, --lisa_frozen {config.lisa_frozen}, "
                f"--lisa_block_probability {config.lisa_block_probability}: embed and head of this model are one tied "
                "matrix; give both the same."
            )
        if given:
            probabilities["embed"] = given.pop()
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


def _check_lr_scales(config: LisaConfig, blocks: Blocks) -> None:
    scales = config.lr_scales
    if blocks.tied and scales.get("head", scales.get("embed")) != scales.get("embed"):
        raise UserError(
            f"--lisa_lr_scale {config.lisa_lr_scale}: embed and head of this model are one tied matrix; give both the "
            "same."
        )


def _state_bits(config: LisaConfig, blocks: Blocks) -> dict[str, StateBits]:
    bits = config.state_bits
    if blocks.tied and bits.get("head", bits.get("embed")) != bits.get("embed"):
        raise UserError(
            f"--lisa_state_bits {config.lisa_state_bits}: embed and head of this model are one tied matrix; give both "
            "the same."
        )
    for block in (blocks.outer(name) for name, given in bits.items() if given == FACTORED):
        for name, parameter in block.parameters.items():
            shape = parameter_shape(parameter)
            if decays(block, name) and len(shape) != 2:
                raise UserError(
                    f"--lisa_state_bits {config.lisa_state_bits}: moments by row and column are for matrices, and "
                    f"{name} in {block.name} has the shape {list(shape)}; give {block.name}=8."
                )
    return bits


def _offloaded(config: LisaConfig, blocks: Blocks) -> tuple[str, ...]:
    if blocks.tied and ("embed" in config.offloaded) != ("head" in config.offloaded):
        raise UserError(
            f"--lisa_offload {config.lisa_offload}: embed and head of this model are one tied matrix; give both or "
            "neither."
        )
    return config.offloaded
