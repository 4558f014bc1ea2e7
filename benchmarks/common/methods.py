"""The methods that the benchmarks compare: what trains, with which settings, by which optimizer.

- full: every parameter in every step; lora: peft's adapters on all linear layers but the head, without dropout.
- static: embeddings, head and a fixed set of layers, the rest frozen by hand before plain DeepSpeed is built: the
  lower bound.
- callback: every parameter registered, `requires_grad` flipped at each period, as a Trainer callback does it.
- lisa: this package.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import lisa_dist

INTERVAL = 20  # K
FUSED = "adamw_torch_fused"


@dataclass(frozen=True)
class Method:
    """One side of a comparison. `settings` are those of LisaConfig; of LoRA its own."""

    name: str
    kind: str  # full | lora | static | callback | lisa
    settings: dict = field(default_factory=dict)
    optim: str = FUSED
    checkpointed: int | str = 0  # layers whose activations are computed again, or "all"
    length: int | None = None  # tokens of a row, where they are not the script's
    attention: str = "sdpa"
    liger: bool = False  # its kernels, with the loss fused with the head
    compiled: bool = False  # each decoder layer by itself

    @property
    def config(self) -> lisa_dist.LisaConfig:
        """What LISA, or what static and callback do in its place, is to train."""
        return lisa_dist.LisaConfig.plain(**self.settings if self.kind in ("lisa", "static", "callback") else {})


def lora(rank: int) -> Method:
    """Return LoRA with adapters of a rank."""
    return Method(f"lora r{rank}", "lora", {"r": rank, "lora_alpha": 2 * rank})


FULL, STATIC, CALLBACK, LISA = (Method(name, name) for name in ("full", "static", "callback", "lisa"))
LORA_16, LORA_128 = lora(16), lora(128)
SIDE_BY_SIDE = (FULL, LORA_16, LORA_128, STATIC, CALLBACK, LISA)  # of the scripts in cost/

EMBED_FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
EIGHT = {"lisa_state_bits": "embed=8,head=8,layers=8"}


def checkpointed(method: Method) -> Method:
    """The same method with the activations of all layers computed again."""
    return replace(method, name=f"{method.name}, checkpointed", checkpointed="all")


def shrunk_methods(methods: Iterable[Method], shrink: int) -> tuple[Method, ...]:
    """The same methods for a model whose widths are divided by `shrink`: LoRA's ranks are too, but stay at least 1."""
    return tuple(
        replace(lora(max(1, method.settings["r"] // shrink)), name=method.name) if method.kind == "lora" else method
        for method in methods
    )
