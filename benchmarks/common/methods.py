"""The methods that the benchmarks compare: what trains, with which settings, by which optimizer.

- full: every parameter in every step; lora: peft's adapters on all linear layers but the head, without dropout.
- static: embeddings, head and a fixed set of layers, the rest frozen by hand before plain DeepSpeed is built: the
  lower bound.
- callback: every parameter registered, `requires_grad` flipped at each period, as a Trainer callback does it.
- lisa: this package.

Results have the rows of methods that are gone, too.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import lisa_dist
from lisa_dist.config_rules import AUTO_LAYERS

INTERVAL = 20  # K
FUSED = "adamw_torch_fused"


@dataclass(frozen=True)
class Method:
    """One side of a comparison. `settings` are those of LisaConfig; of LoRA its own."""

    name: str
    kind: str  # full | lora | static | callback | lisa
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
        return lisa_dist.LisaConfig.plain(**self.settings if self.kind in ("lisa", "static", "callback") else {})


def lora(rank: int, rate: float = 1.0) -> Method:
    return Method(f"lora r{rank}", "lora", {"r": rank, "lora_alpha": 2 * rank}, rate=rate)


FULL, STATIC, CALLBACK, LISA = (Method(name, name) for name in ("full", "static", "callback", "lisa"))
LORA_16, LORA_128 = lora(16), lora(128)
SIDE_BY_SIDE = (FULL, LORA_16, LORA_128, STATIC, CALLBACK, LISA)  # of the scripts in cost/

# Settings of LISA that several methods share.
EMBED_FROZEN = {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}
KEEP, FIXED = {"lisa_state": "keep"}, {"lisa_sampler": "fixed"}
EIGHT, LAYERS_8 = {"lisa_state_bits": "embed=8,head=8,layers=8"}, {"lisa_state_bits": "layers=8"}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
SMALL = {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
HALVED_K_50 = {"lisa_lr_scale": "embed=0.5,head=0.5", "lisa_interval_steps": 50}
FORMS = {"8 bits": 8, "4 bits": 4, "fp8": "fp8"}  # of frozen layers
ADAPTERS = {"lisa_adapters": 16}
ADAPTERS_8 = EIGHT | {"lisa_adapters": 32, "lisa_frozen_bits": 8, "lisa_master": "bf16_sr"}  # in LoRA's memory
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_sampler": "reshuffle"}


def lisa(name: str, layers: int | str, settings: dict | None = None, optim: str = FUSED, **more) -> Method:
    return Method(name, "lisa", {"lisa_activated_layers": layers} | (settings or {}), optim, **more)


def modules_of(share: float) -> dict:
    """Settings by which modules with so much of the layers' parameters train."""
    return {"lisa_unit": "module", "lisa_budget": str(float(share))}


def modules(name: str, layers: int | str, settings: dict, optim: str = FUSED) -> Method:
    """As many parameters as so many of SmolLM2's 30 layers have, or as two of the model's, in modules."""
    budget = {"lisa_unit": "module", "lisa_budget": layers} if isinstance(layers, str) else modules_of(layers / 30)
    return Method(name, "lisa", budget | settings, optim)


one_pass = functools.partial(lisa, optim="lisa_adamw")  # computes a step in one pass
IN_LORA_S = {"memory_of": ("lora r16", 1.1)}
ALL = (
    *SIDE_BY_SIDE,
    one_pass("full one pass", "all", FIXED),
    lora(8, rate=2),
    lora(32),
    lora(64),
    *(lisa(f"lisa {layers}", layers) for layers in (1, 2, 3, 4, 8)),
    *(lisa(f"lisa {n} {name}", n, {"lisa_sampler": name}) for n in (1, 2) for name in ("reshuffle", "adaptive")),
    lisa("lisa 2 as published", 2, {"lisa_state": "reset_all"}),
    lisa("fixed 2", 2, FIXED),
    lisa("embed and head", 0, rate=4),
    lisa("one block", 1, BADAM),
    *(lisa(f"lisa {layers} keep", layers, KEEP) for layers in (2, 4)),
    one_pass("lisa 2 one pass", 2),
    one_pass("lisa 2, 8 bits", 2, EIGHT),
    one_pass("lisa 2, factored", 2, FACTORED),
    one_pass("lisa 2 bf16", 2, bf16=True),
    *(one_pass(f"lisa 2, frozen {name}", 2, {"lisa_frozen_bits": form}, bf16=True) for name, form in FORMS.items()),
    # As many layers as fit.
    one_pass("lisa auto", AUTO_LAYERS, SMALL),
    one_pass("lisa in lora's memory", AUTO_LAYERS, SMALL, **IN_LORA_S),
    one_pass("lisa in lora's, embed frozen", AUTO_LAYERS, EMBED_FROZEN | LAYERS_8, **IN_LORA_S),
    one_pass("lisa at lora's peak, embed frozen", AUTO_LAYERS, EMBED_FROZEN | LAYERS_8, memory_of=("lora r16", 1.0)),
    *(lisa(f"lisa {layers}, embed frozen", layers, EMBED_FROZEN) for layers in (2, 8)),
    one_pass("lisa 14, embed frozen", 14, EMBED_FROZEN),
    # By the share of layers, with the small states that the plans of shares.py have.
    *(one_pass(f"lisa {n}, small", n, SMALL) for n in (5, 8, 10, 30)),
    *(one_pass(f"lisa {n}, adapters", n, SMALL | ADAPTERS) for n in (0, 1, 2, 3, 4, 5, 10, 15)),
    *(one_pass(f"lisa {n}, adapters, embed frozen", n, EMBED_FROZEN | LAYERS_8 | ADAPTERS) for n in (1, 5)),
    *(one_pass(f"lisa {n}, adapters r32, frozen 8 bits", n, ADAPTERS_8, bf16=True) for n in (1, 5)),
    *(modules(f"lisa modules {n}, small", n, SMALL, "lisa_adamw") for n in (5, 6, 10, 12)),
    *(modules(f"lisa modules {n}, small, halved, K 50", n, SMALL | HALVED_K_50, "lisa_adamw") for n in (5, 6)),
    modules("lisa modules", AUTO_LAYERS, {}),
)
METHODS = {method.name: method for method in ALL}


def checkpointed(method: Method) -> Method:
    """The same method with the activations of all layers computed again."""
    return replace(method, name=f"{method.name}, checkpointed", checkpointed="all")


def shrunk_methods(methods: Iterable[Method], shrink: int) -> tuple[Method, ...]:
    """The same methods for a model whose widths are divided by `shrink`: LoRA's ranks are too, but stay at least 1."""
    return tuple(
        replace(lora(max(1, method.settings["r"] // shrink)), name=method.name) if method.kind == "lora" else method
        for method in methods
    )
