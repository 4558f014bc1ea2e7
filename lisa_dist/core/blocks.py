"""The blocks of a causal language model: embed, the decoder layers, head, and rest.

LISA switches blocks on and off, so every parameter of the model belongs to exactly one of them:

- embed: the input embedding and any other embedding table outside the layers (learned positions);
- layers[i]: decoder layer i;
- head: the language-modelling head. A head tied to the embedding is the same matrix: it is in embed, and head is empty;
- rest: the final norm and whatever else of the language model is neither;
- outside: what does not belong to the language model at all (a vision tower and its projector). LISA never trains it.

Parameters are distinguished by identity, never by name, so tied matrices are counted once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lisa_dist.errors import UserError
from lisa_dist.zero.parameters import parameter_numel


@dataclass(eq=False)
class Block:
    """One block: its name and its parameters by their full names in the model."""

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of all parameters, also where ZeRO-3 has partitioned them."""
        return sum(parameter_numel(parameter) for parameter in self.parameters.values())

    def requires_grad_(self, active: bool) -> None:
        """Let the block train or not. A block that becomes inactive gives up its gradients."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(active)
            if not active:
                parameter.grad = None


@dataclass
class Blocks:
    """The blocks of one model; `tied` says that head and embed share a matrix."""

    embed: Block
    layers: list[Block]
    head: Block
    rest: Block
    outside: Block
    tied: bool
    layers_path: str

    def __iter__(self) -> Iterator[Block]:
        return iter([self.embed, *self.layers, self.head, self.rest, self.outside])

    def outer(self, name: str) -> Block:
        """The block called embed, head or rest."""
        return {"embed": self.embed, "head": self.head, "rest": self.rest}[name]


def find_blocks(model: nn.Module, layers_attribute: str | None = None) -> Blocks:
    """Find the blocks of any Hugging Face causal language model, or of the language model inside a VLM.

    `layers_attribute` is the dotted path of the ModuleList of decoder layers, for models where it cannot be found.
    Raises ValueError naming what was seen when it cannot decide.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding = _embedding(model)
    head = _call_if_there(model, "get_output_embeddings")
    layers_path = layers_attribute or _find_layers_path(model, names[id(embedding)])
    layer_list = _module_at(model, layers_path)
    if not isinstance(layer_list, nn.ModuleList | nn.Sequential):
        raise UserError(
            f"--lisa_layers_attribute {layers_path}: a {type(layer_list).__name__}, which is no list of modules."
        )

    # The smallest module that holds both the embedding and the layers is the language model's backbone.
    backbone = _common_prefix(names[id(embedding)], layers_path)
    owner: dict[int, str] = {}

    def claim(module: nn.Module | None, block: str) -> None:
        for parameter in module.parameters() if module is not None else ():
            owner.setdefault(id(parameter), block)

    for index, layer in enumerate(layer_list):
        claim(layer, f"layers.{index}")
    claim(embedding, "embed")
    tied = head is not None and any(owner.get(id(parameter)) == "embed" for parameter in head.parameters())
    claim(head, "head")
    backbone_module = _module_at(model, backbone)
    for module in backbone_module.modules():
        if isinstance(module, nn.Embedding):
            claim(module, "embed")
    claim(backbone_module, "rest")
    if not _has_towers(model):
        claim(model, "rest")  # a reward model's score, a head's own norm

    blocks = {name: Block(name) for name in ("embed", "head", "rest", "outside")}
    blocks |= {f"layers.{index}": Block(f"layers.{index}") for index in range(len(layer_list))}
    for name, parameter in model.named_parameters():
        blocks[owner.get(id(parameter), "outside")].parameters[name] = parameter
    return Blocks(
        embed=blocks["embed"],
        layers=[blocks[f"layers.{index}"] for index in range(len(layer_list))],
        head=blocks["head"],
        rest=blocks["rest"],
        outside=blocks["outside"],
        tied=tied,
        layers_path=layers_path,
    )


def _call_if_there(model: nn.Module, method: str) -> nn.Module | None:
    return getattr(model, method)() if hasattr(model, method) else None


def _embedding(model: nn.Module) -> nn.Module:
    embedding = _call_if_there(model, "get_input_embeddings")
    if embedding is None:
        raise UserError(
            f"{type(model).__name__} has no input embedding (get_input_embeddings): LISA trains causal language models."
        )
    return embedding


def _has_towers(model: nn.Module) -> bool:
    """Whether the model is more than a language model: its config then holds a text config of its own."""
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def _find_layers_path(model: nn.Module, embedding_path: str) -> str:
    """The ModuleList as long as the text config says, nearest to the embedding."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    seen = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Experts are ModuleLists too, and may be as many as there are layers: a list within a list is none of ours.
    outermost = [name for name in seen if not any(name.startswith(f"{other}.") for other in seen)]
    fitting = [name for name in outermost if seen[name] == num_layers]
    nearest = max((_common_depth(name, embedding_path) for name in fitting), default=0)
    candidates = [name for name in fitting if _common_depth(name, embedding_path) == nearest]
    if len(candidates) != 1:
        listed = ", ".join(f"{name} ({seen[name]} modules)" for name in outermost) or "none"
        raise UserError(
            f"cannot find the decoder layers of {type(model).__name__}: its config says num_hidden_layers = "
            f"{num_layers}, and its module lists are: {listed}. Name the right one with --lisa_layers_attribute."
        )
    return candidates[0]


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"--lisa_layers_attribute {path}: {type(model).__name__} has no such module.") from error
    return module


def _common_prefix(first: str, second: str) -> str:
    depth = _common_depth(first, second)
    return ".".join(first.split(".")[:depth])


def _common_depth(first: str, second: str) -> int:
    depth = 0
    for left, right in zip(first.split("."), second.split("."), strict=False):
        if left != right:
            break
        depth += 1
    return depth
