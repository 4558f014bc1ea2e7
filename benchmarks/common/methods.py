"""The methods that the benchmarks compare: what trains, with which settings, by which optimizer.

- full: every parameter in every step; lora: peft's adapters on all linear layers but the head, without dropout.
- static: embeddings, head and a fixed set of layers, the rest frozen by hand before plain DeepSpeed is built: the
  lower bound.
- callback: every parameter registered, `requires_grad` flipped at each period, as a Trainer callback does it.
- lisa: this package; galore, apollo: AdamW on projected gradients of the matrices of layers.

Results have the rows of methods that are gone, too: they went with the settings of LISA that they had.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import lisa_dist
from lisa_dist.config_rules import AUTO_LAYERS

INTERVAL = 20  # K
FUSED = "adamw_torch_fused"


@dataclass(frozen=True)
class Method:
    """One side of a comparison. `settings` are those of LisaConfig; of LoRA, GaLore and APOLLO their own."""

    name: str
    kind: str  # full | lora | static | callback | lisa | galore | apollo
    settings: dict = field(default_factory=dict)
    optim: str = FUSED
    bf16: bool = False  # weights in bf16 on a CPU too
    rate: float = 1.0  # the middle of its learning rates, in units of quality.py's --rate
    memory_of: tuple[str, float] = ("lisa 2", 1.0)  # in which as many layers train as fit, where they are "auto"
    checkpointed: int | str = 0  # layers whose activations are computed again, or "all"
    length: int | None = None  # tokens of a row, where they are not the script's
    attention: str = "sdpa"
    liger: bool = False  # its kernels, with the loss fused with the head
    compiled: bool = False  # each decoder layer by itself

    @property
    def config(self) -> lisa_dist.LisaConfig:
        """What LISA, or what static and callback do in its place, is to train."""
        return lisa_dist.LisaConfig(**self.settings if self.kind in ("lisa", "static", "callback") else {})


def lora(rank: int, rate: float = 1.0) -> Method:
    return Method(f"lora r{rank}", "lora", {"r": rank, "lora_alpha": 2 * rank}, rate=rate)


FULL, STATIC, CALLBACK, LISA = (Method(name, name) for name in ("full", "static", "callback", "lisa"))
LORA_16, LORA_128 = lora(16), lora(128)
SIDE_BY_SIDE = (FULL, LORA_16, LORA_128, STATIC, CALLBACK, LISA)  # of the scripts in cost/

# Settings of LISA that several methods share.
EMBED_FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
KEEP, FIXED, BALANCED = {"lisa_state": "keep"}, {"lisa_sampler": "fixed"}, {"lisa_sampler": "balanced"}
EIGHT = {"lisa_state_bits": "embed=8,head=8,layers=8"}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
NO_MASTER = {"lisa_master": "bf16_sr"}
MODULES = {"lisa_unit": "module"}
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_sampler": "reshuffle"}
# As their packages have them.
GALORE = {"rank": 16, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = GALORE | {"scale": 1.0, "proj": "random", "scale_type": "channel"}


def lisa(name: str, layers: int | str, settings: dict | None = None, **more) -> Method:
    return Method(name, "lisa", {"lisa_activated_layers": layers} | (settings or {}), **more)


def one_pass(name: str, layers: int | str, settings: dict | None = None, **more) -> Method:
    """By the optimizer that computes a step in one pass."""
    return lisa(name, layers, settings, optim="lisa_adamw", **more)


def modules(name: str, of_layers: int, num_layers: int | None, settings: dict | None = None, **more) -> Method:
    """As many parameters as so many layers have, in modules; of so many layers, or of the model's own."""
    budget = AUTO_LAYERS if num_layers is None else str(of_layers / num_layers)
    return Method(name, "lisa", MODULES | {"lisa_budget": budget} | (settings or {}), **more)


IN_LORA_S = {"memory_of": ("lora r16", 1.1)}
ALL = (
    *SIDE_BY_SIDE,
    one_pass("full one pass", "all", FIXED),
    lora(8, rate=2),
    lora(32),
    lora(64),
    Method("galore r16", "galore", GALORE, rate=4),
    Method("apollo r16", "apollo", APOLLO),
    *(lisa(f"lisa {layers}", layers) for layers in (1, 2, 3, 4, 8)),
    *(lisa(f"lisa 1 {sampler}", 1, {"lisa_sampler": sampler}) for sampler in ("reshuffle", "adaptive")),
    *(lisa(f"lisa 2 {sampler}", 2, {"lisa_sampler": sampler}) for sampler in ("reshuffle", "adaptive", "balanced")),
    lisa("lisa 2 as published", 2, {"lisa_state": "reset_all"}),
    lisa("fixed 2", 2, FIXED),
    lisa("embed and head", 0, rate=4),
    lisa("one block", 1, BADAM),
    *(lisa(f"lisa 2 K {steps}", 2, {"lisa_interval_steps": steps}) for steps in (5, 50, 100)),
    *(lisa(f"lisa 2 keep, K {steps}", 2, KEEP | {"lisa_interval_steps": steps}) for steps in (5, 1)),
    *(lisa(f"lisa {layers} keep", layers, KEEP) for layers in (2, 4)),
    lisa("lisa 2, embed and head / 2", 2, {"lisa_lr_scale": "embed=0.5,head=0.5"}),
    # Smaller states, and layers frozen in fewer bits.
    one_pass("lisa 2 one pass", 2),
    one_pass("lisa 2, 8 bits", 2, EIGHT),
    one_pass("lisa 2, factored", 2, FACTORED),
    one_pass("lisa 14, factored", 14, FACTORED),
    one_pass("lisa 2 bf16", 2, bf16=True),
    *(one_pass(f"lisa 2, frozen {bits} bits", 2, {"lisa_frozen_bits": bits}, bf16=True) for bits in (8, 4)),
    # As many layers as fit.
    one_pass("lisa auto", AUTO_LAYERS, SMALL),
    one_pass("lisa in lora's memory", AUTO_LAYERS, SMALL, **IN_LORA_S),
    one_pass("lisa in lora's, 32 bits", AUTO_LAYERS, FACTORED, **IN_LORA_S),
    one_pass("lisa in lora's, no masters", AUTO_LAYERS, SMALL | NO_MASTER, bf16=True, **IN_LORA_S),
    one_pass("lisa in lora's, embed frozen", AUTO_LAYERS, EMBED_FROZEN | {"lisa_state_bits": "layers=8"}, **IN_LORA_S),
    one_pass(
        "lisa at lora's peak, embed frozen",
        AUTO_LAYERS,
        EMBED_FROZEN | {"lisa_state_bits": "layers=8"},
        memory_of=("lora r16", 1.0),
    ),
    # Embedding and head frozen.
    *(lisa(f"lisa {layers}, embed frozen", layers, EMBED_FROZEN) for layers in (2, 8)),
    one_pass("lisa 14, embed frozen", 14, EMBED_FROZEN),
    one_pass("lisa 14 keep, embed frozen", 14, EMBED_FROZEN | KEEP),
    one_pass("lisa 14 keep, K 5, embed frozen", 14, EMBED_FROZEN | KEEP | {"lisa_interval_steps": 5}),
    one_pass("lisa 14 K 10, embed frozen", 14, EMBED_FROZEN | {"lisa_interval_steps": 10}),
    one_pass("lisa 14 fixed, embed frozen", 14, EMBED_FROZEN | FIXED),
    one_pass("lisa 14 balanced, embed frozen", 14, EMBED_FROZEN | BALANCED),
    # Modules in the place of layers; of SmolLM2's 30.
    modules("lisa modules", 2, None),
    modules("lisa modules adaptive", 2, None, {"lisa_sampler": "adaptive"}),
    modules("lisa modules 8, embed frozen", 8, 30, EMBED_FROZEN),
    modules("lisa modules 8 fixed, embed frozen", 8, 30, EMBED_FROZEN | FIXED, optim="lisa_adamw"),
    modules("lisa modules 14 fixed, embed frozen", 14, 30, EMBED_FROZEN | FIXED, optim="lisa_adamw"),
)
METHODS = {method.name: method for method in ALL}


def shrunk_methods(methods: Iterable[Method], shrink: int) -> tuple[Method, ...]:
    """The same methods for a model whose widths are divided by `shrink`: LoRA's ranks are too, but stay at least 1."""
    return tuple(
        replace(lora(max(1, method.settings["r"] // shrink)), name=method.name) if method.kind == "lora" else method
        for method in methods
    )
