"""The blocks of a causal language model, which LISA switches on and off. Every parameter belongs to exactly one:

- embed: the input embedding and any other embedding table outside the layers (learned positions);
- layers[i]: decoder layer i;
- head: the language-modelling head. A head tied to the embedding is the same matrix: it is in embed, and head is empty;
- rest: the final norm and whatever else of the language model is neither;
- adapters: those of --lisa_adapters, where there are any (`adapters.py`);
- outside, which LISA never trains: what does not belong to the language model (a vision tower and its projector), and
  parameters that were frozen before LISA came.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from lisa_dist.config_rules import ADAPTERS
from lisa_dist.core.matrices import matrices_of
from lisa_dist.errors import UserError
from lisa_dist.patches import patched
from lisa_dist.tasks import REWARD
from lisa_dist.text import in_one_line
from lisa_dist.zero.parameters import ADAPTER_PREFIX, naming_of, original_of, parameter_numel, parameter_shape

# On a parameter that LISA has frozen, so that a later run in the same process does not take it for the user's choice.
_FROZEN_BY_LISA = "lisa_dist_frozen"
DecayRule = Callable[[nn.Module], Iterable[str]]  # the names of a model's parameters to which weight decay applies
_OF_OTHER_MODELS = ("ForMaskedLM", "ForQuestionAnswering", "ForTokenClassification")  # which write no text


@dataclass(eq=False)
class Block:
    """One block: its name and its parameters by their full names in the model, of which those `decaying` decay.

    Without those names matrices decay that are no biases, as they do in nearly all models.
    """

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    decaying: frozenset[str] | None = None

    @property
    def numel(self) -> int:
        """Elements of all parameters, also where ZeRO-3 has partitioned them."""
        return sum(parameter_numel(parameter) for parameter in self.parameters.values())

    def requires_grad_(self, active: bool) -> None:
        """Let the block train or not. A block that becomes inactive gives up its gradients."""
        for parameter in self.parameters.values():
            if parameter.requires_grad != active:
                setattr(parameter, _FROZEN_BY_LISA, not active)
            parameter.requires_grad_(active)
            if not active:
                parameter.grad = None


@dataclass
class Blocks:
    """The blocks of one model; `tied` says that head and embed share a matrix.

    `layers` are what is sampled: decoder layers, of which there are `num_layers`, or with --lisa_unit module the linear
    modules and experts of them all. `frozen_numel` are the elements of `outside` that the user has frozen.
    """

    embed: Block
    layers: list[Block]
    head: Block
    rest: Block
    outside: Block
    tied: bool
    layers_path: str
    num_layers: int
    frozen_numel: int = 0
    adapters: Block = field(default_factory=lambda: Block(ADAPTERS))

    def __iter__(self) -> Iterator[Block]:
        return iter([self.embed, *self.layers, self.head, self.rest, self.adapters, self.outside])

    def outer(self, name: str) -> Block:
        """The block called embed, head, rest or adapters."""
        return {one.name: one for one in (self.embed, self.head, self.rest, self.adapters)}[name]

    def give_back(self) -> None:
        """Let what LISA has frozen require gradients again; but not what is quantized, which cannot train."""
        for parameter in (parameter for block in self for parameter in block.parameters.values()):
            if original_of(parameter) is None and vars(parameter).pop(_FROZEN_BY_LISA, False):
                parameter.requires_grad_(True)

    def decay_by(self, model: nn.Module, rule: DecayRule | None) -> None:
        """Have the weights decay whose names `rule` says of the model, or else the Trainer's own rule."""
        if rule is None:
            from transformers import Trainer  # takes seconds to import, and a plan of memory has no use for it

            of_trainer: Any = Trainer.get_decay_parameter_names  # looks at nothing of a trainer
            rule = functools.partial(of_trainer, None)
        decaying = frozenset(map(naming_of(model), rule(model)))
        for block in self:
            block.decaying = decaying

    def leave_out_frozen(self) -> None:
        """Move to `outside` what the user has frozen; UserError where that is all of the decoder layers."""
        for block in (self.embed, *self.layers, self.head, self.rest):
            for name, parameter in list(block.parameters.items()):
                if not parameter.requires_grad and not getattr(parameter, _FROZEN_BY_LISA, False):
                    self.outside.parameters[name] = block.parameters.pop(name)
                    self.frozen_numel += parameter_numel(parameter)
        if not any(layer.parameters for layer in self.layers):
            raise UserError(
                "every parameter of the decoder layers is frozen (requires_grad = False) already: LISA freezes and "
                "activates layers itself, and leaves alone what was frozen before it; give it a model that trains."
            )


def why_not_trained(config: PretrainedConfig, task: str) -> str | None:
    """Why a model of this configuration cannot be trained to write text, or to score it; None where it can."""
    architecture = str((config.architectures or [""])[0])
    is_decoder = architecture.endswith(("ForCausalLM", "LMHeadModel"))  # alone, whatever it was taken from
    if config.is_encoder_decoder and architecture and not is_decoder:
        return f"is a {architecture}, an encoder-decoder: LISA trains causal language models"
    if architecture.endswith(_OF_OTHER_MODELS):
        return f"is a {architecture}: LISA trains causal language models"
    if architecture.endswith("ForSequenceClassification") and task != REWARD:
        return (
            f"is a reward model, which scores texts and writes none: give a model that writes them, or --task {REWARD}"
        )
    return None


def number_of_decoder_layers(config: Any) -> int:
    """The number that a model's config of transformers gives; UserError where it gives none, or of several models."""
    try:
        number: int = config.get_text_config().num_hidden_layers
        return number
    except (AttributeError, ValueError) as error:
        raise UserError(
            f"{type(config).__name__} does not say how many decoder layers there are ({in_one_line(error)}): "
            "LISA trains causal language models."
        ) from error


def without_zero3_init() -> AbstractContextManager[None]:
    """In a run under ZeRO-3 transformers would partition any model that is built, in collectives with all ranks."""
    return patched(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None, of="zero3_init")


def model_without_weights(config: PretrainedConfig) -> Any:
    """A causal model on the meta device. Raises UserError where its code, which may be anyone's, cannot build it."""
    try:
        with without_zero3_init(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        named = f"{type(config).__name__}: this model cannot be built"
        raise UserError(f"{named} ({type(error).__name__}: {in_one_line(error)}).") from error


def find_blocks(model: nn.Module, layers_attribute: str | None = None) -> Blocks:
    """Find the blocks of any Hugging Face causal language model, or of the language model inside a VLM.

    `layers_attribute` is the dotted path of the ModuleList of decoder layers. Raises UserError, naming what was seen,
    where it is not given and cannot be found, and for an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder: LISA trains causal language models.")
    embedding: nn.Module | None = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        raise UserError(
            f"{type(model).__name__} has no input embedding (get_input_embeddings): LISA trains causal language models."
        )
    embedding_path = next(name for name, module in model.named_modules() if module is embedding)
    layers_path = layers_attribute or _find_layers_path(model, embedding, embedding_path)
    layer_list = _layer_list(model, layers_path)
    language_model = _language_model(model, embedding)
    models: list[Any] = [model, language_model]
    found = [one.get_output_embeddings() for one in models if hasattr(one, "get_output_embeddings")]
    of_head = next((list(one.parameters()) for one in found if one is not None), [])

    embed, head, rest, outside = (Block(name) for name in ("embed", "head", "rest", "outside"))
    layers = [Block(f"layers.{index}") for index in range(len(layer_list))]
    owner: dict[int, Block] = {}

    def claim(parameters: Iterable[nn.Parameter], block: Block) -> None:
        for parameter in parameters:
            owner.setdefault(id(parameter), block)

    called = naming_of(model)  # adapters of others stay with their layers
    names = {id(parameter): called(name) for name, parameter in model.named_parameters()}
    adapters = Block(ADAPTERS)  # of an earlier run
    claim((one for one in model.parameters() if names[id(one)].startswith(ADAPTER_PREFIX)), adapters)
    for block, layer in zip(layers, layer_list, strict=True):
        claim(layer.parameters(), block)
    claim(embedding.parameters(), embed)
    tied = any(owner.get(id(parameter)) is embed for parameter in of_head)
    claim(of_head, head)
    for tower in _other_models(model, [*embedding.parameters(), *layer_list.parameters(), *of_head]):
        claim(tower.parameters(), outside)
    # The smallest module that holds both the embedding and the layers is the language model's backbone.
    backbone = model.get_submodule(_common_path(embedding_path, layers_path))
    for module in backbone.modules():
        if isinstance(module, nn.Embedding):
            claim(module.parameters(), embed)
    claim(backbone.parameters(), rest)
    if language_model is not None:
        claim(language_model.parameters(), rest)  # a reward model's score, a head's own norm
    for parameter in model.parameters():
        owner.get(id(parameter), outside).parameters[names[id(parameter)]] = parameter
    return Blocks(embed, layers, head, rest, outside, tied, layers_path, num_layers=len(layers), adapters=adapters)


def split_into_modules(model: nn.Module, blocks: Blocks) -> Blocks:
    """The same blocks with each matrix of a decoder layer in the place of the layers, which are otherwise rest.

    They are those of linear modules, named like layers.3.self_attn.q_proj, and tensors of experts, like
    layers.3.mlp.experts.down_proj. Raises UserError for a layer with matrices of other modules.
    """
    rest, units = replace(blocks.rest, parameters=dict(blocks.rest.parameters)), []
    matrices, prefix = matrices_of(model), f"{blocks.layers_path}."
    for layer in blocks.layers:
        of_layer = [matrices[id(one)] for one in layer.parameters.values() if id(one) in matrices]
        has_experts = not all(matrix.is_linear for matrix in of_layer)  # beside a gate, and biases of two dimensions
        for name, parameter in layer.parameters.items():
            if id(parameter) in matrices:
                unit = name.removesuffix(".weight").removeprefix(prefix)
                units.append(Block(f"layers.{unit}", {name: parameter}))
            elif len(parameter_shape(parameter)) > 1 and not has_experts:
                raise UserError(
                    f"--lisa_unit module: {name} is a matrix, and of no linear module; sample layers of "
                    f"{type(model).__name__}: --lisa_unit layer."
                )
            else:
                rest.parameters[name] = parameter
    if not units:
        raise UserError(
            f"--lisa_unit module: the decoder layers of {type(model).__name__} have no linear modules; leave it out."
        )
    return replace(blocks, layers=units, rest=rest)


def _language_model(model: nn.Module, embedding: nn.Module) -> nn.Module | None:
    """The outermost model whose config is of text alone and that has the embedding; None if there is none."""
    for module in model.modules():
        if module is model or isinstance(module, PreTrainedModel):
            config: Any = getattr(module, "config", None)
            is_text = not hasattr(config, "get_text_config") or config.get_text_config() is config
            if is_text and any(inner is embedding for inner in module.modules()):
                return module
    return None


def _other_models(model: nn.Module, own: Iterable[nn.Parameter]) -> list[nn.Module]:
    """Models inside a model that have none of these parameters: encoders of images and sounds."""
    ours = set(map(id, own))
    inner = (module for module in model.modules() if module is not model and isinstance(module, PreTrainedModel))
    return [module for module in inner if not any(id(parameter) in ours for parameter in module.parameters())]


def _find_layers_path(model: nn.Module, embedding: nn.Module, embedding_path: str) -> str:
    """The ModuleList as long as the text config says, nearest to the embedding, outside of other models."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    seen = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Experts are ModuleLists too, and may be as many as there are layers: a list within a list is none of ours.
    outermost: list[str] = [name for name in seen if not any(name.startswith(f"{other}.") for other in seen)]
    fitting = [name for name in outermost if seen[name] == num_layers]
    towers = {id(inner) for tower in _other_models(model, embedding.parameters()) for inner in tower.modules()}
    fitting = [name for name in fitting if id(model.get_submodule(name)) not in towers] or fitting
    depths = {name: len(_common_path(name, embedding_path)) for name in fitting}
    candidates = [name for name in fitting if depths[name] == max(depths.values())]
    if not fitting and len(outermost) == 1:  # a config may count both halves of a layer, or the layers of an encoder
        candidates = outermost
    if len(candidates) != 1:
        listed = ", ".join(f"{name} ({seen[name]} modules)" for name in outermost) or "none"
        raise UserError(
            f"cannot find the decoder layers of {type(model).__name__}: its config says num_hidden_layers = "
            f"{num_layers}, and its module lists are: {listed}. Name the right one with --lisa_layers_attribute."
        )
    return candidates[0]


def _layer_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"--lisa_layers_attribute {path}: {type(model).__name__} has no such module.") from error
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        raise UserError(f"--lisa_layers_attribute {path}: a {type(module).__name__}, which is no list of modules.")
    return module


def _common_path(first: str, second: str) -> str:
    """The dotted path of the smallest module that two modules are both in."""
    return os.path.commonpath([first.replace(".", "/"), second.replace(".", "/")]).replace("/", ".")
