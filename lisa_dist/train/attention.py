"""Which attention implementation a run uses, and why; and that packed documents do not see each other."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import is_kernels_available

from lisa_dist.errors import UserError

PROBE_LENGTH = 16  # tokens of a document in `documents_see_each_other`


@dataclass(frozen=True)
class _Flash:
    package: str  # by its name on an index: transformers goes by that too, as versions 2 and 4 share a module
    oldest: str  # that transformers takes
    module: str  # that transformers imports; with it comes the binary
    majors: range  # of CUDA's compute capability
    gpu: str
    install: str


_FLASH = {
    "flash_attention_2": _Flash(
        "flash-attn", "2.3.3", "flash_attn.bert_padding", range(8, 99), "an Ampere GPU or newer",
        "pip install flash-attn --no-build-isolation",
    ),
    "flash_attention_3": _Flash(
        "flash-attn-3", "3.0.0b0", "flash_attn_interface", range(9, 10), "a Hopper GPU",
        "install it from the folder hopper of flash-attention",
    ),
    "flash_attention_4": _Flash(
        "flash-attn-4", "4.0.0a0", "flash_attn.cute", range(9, 99), "a Hopper GPU or newer", "pip install flash-attn-4"
    ),
}  # fmt: skip
_AUTOMATIC = ("flash_attention_3", "flash_attention_2")
_LARGEST_HEAD = 256  # of every flash-attn


def choose_attention(
    requested: str | None, half_precision: bool, config: PretrainedConfig, packed: bool = False, use_cpu: bool = False
) -> tuple[str, str]:
    """The `attn_implementation` for transformers and the reason for it, in a few words.

    What the user asked for is taken as it is. Otherwise the first of flash-attn 3, flash-attn 2, torch's SDPA and eager
    that the GPU, the precision (flash-attn wants `half_precision`, bf16 or fp16) and the model of `config` can use.
    `packed`: documents share rows. Raises UserError for a flash-attn that was asked for and cannot be used.
    """
    run = _Run(config, half_precision, None if use_cpu else gpu_capability())
    if requested is None:
        chosen, why = run.choose()
    else:
        chosen, why = requested, "as asked for"
        name = requested.removeprefix("paged|")  # an older spelling that transformers takes for the same
        if name in _FLASH:
            why += run.check(name)
    if packed and "flash" in chosen:
        why += "; packed rows by its variable-length kernel"
    elif packed and chosen in ("eager", "sdpa", "flex_attention"):
        why += "; packed rows by a block-diagonal mask"
    return chosen, why


class _Run:
    """What an implementation of attention depends on."""

    def __init__(self, config: PretrainedConfig, half_precision: bool, capability: tuple[int, int] | None):
        self._config, self._half_precision, self._capability = config, half_precision, capability
        # The class that TRL will load, of which attributes are asked; None where the model brings its own code.
        name = (config.architectures or [""])[0]
        self._class: Any = getattr(transformers, name, None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)

    def choose(self) -> tuple[str, str]:
        """The best that can be used, and why nothing better."""
        reasons: list[str] = []
        for name in _AUTOMATIC:
            problem = self._problem(name)[0] or self._misfit(name)
            if problem is None:
                return name, "; ".join([f"{_FLASH[name].package} is installed", *reasons])
            if problem not in reasons:
                reasons.append(problem)
        if getattr(self._class, "_supports_sdpa", True):
            return "sdpa", "; ".join(reasons)
        return "eager", "; ".join([*reasons, f"{self._class.__name__} does not support SDPA"])

    def check(self, name: str) -> str:
        """What is to be added to "as asked for". Raises UserError."""
        problem, way_out = self._problem(name)
        if problem is None:
            return ""
        if problem.endswith("is not installed") and is_kernels_available():
            return f"; {problem}, transformers takes a kernel of the hub"
        way_out = f"{way_out}, or leave" if way_out else "leave"
        raise UserError(f"--attn_implementation {name}: {problem}; {way_out} the flag out for SDPA.")

    def _problem(self, name: str) -> tuple[str | None, str | None]:
        """Why this flash-attn cannot run, or None; and what to do about it, where something can be done."""
        flash = _FLASH[name]
        if self._capability is None:
            return "no CUDA device", None
        if not self._half_precision:
            return "flash-attn needs bf16 or fp16", "give --bf16 true"
        # ROCm's compute capability is the number of an AMD architecture, for which there is version 2 only.
        fits = name == "flash_attention_2" if torch.version.hip else self._capability[0] in flash.majors
        if not fits:
            return f"{flash.package} needs {flash.gpu}", None
        if self._class is not None:  # of a model with code of its own nothing is known
            if not self._class._supports_flash_attn:
                return f"{self._class.__name__} does not support flash-attn", None
            head = _largest_head(self._config)
            if head > _LARGEST_HEAD:
                return f"flash-attn takes heads of at most {_LARGEST_HEAD}, and the model's are {head}", None
        problem = import_problem(flash)
        return problem, problem and flash.install

    def _misfit(self, name: str) -> str | None:
        """Why nobody would want this flash-attn for the model who has not asked for it, or None."""
        if self._class is None:
            return "a model with code of its own may not support flash-attn"
        if name not in (getattr(self._class, "_compatible_flash_implementations", None) or [name]):
            return f"{self._class.__name__} does not support {_FLASH[name].package}"
        if name != "flash_attention_2" and getattr(self._config.get_text_config(), "attention_dropout", None):
            return f"{_FLASH[name].package} has no dropout"  # and transformers only warns
        return None


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of this process's GPU, or None."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def import_problem(flash: _Flash) -> str | None:
    """Why it cannot be imported, or None. What is installed need not fit this torch: only an import tells."""
    try:
        version = importlib.metadata.version(flash.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{flash.package} is not installed"
    if Version(version) < Version(flash.oldest):
        return f"{flash.package} {version} is older than {flash.oldest}"
    try:
        importlib.import_module(flash.module)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: an operator that this torch does not know
        return f"{flash.package} {version} cannot be imported ({' '.join(str(error).split())})"
    return None


def _largest_head(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    layers = getattr(text, "per_layer_config", None) or [text]  # a few models have heads of several sizes
    return max(
        getattr(layer, "head_dim", None)
        or getattr(layer, "hidden_size", 0) // getattr(layer, "num_attention_heads", 1)  # absent where there are none
        for layer in layers
    )


def packs_documents(args: Any) -> bool:
    """Whether documents share rows in the run of an SFTConfig, by `--packing` or `--padding_free`.

    Raises UserError where TRL would hand a row to the model without saying where its documents end.
    """
    if (args.packing or args.eval_packing) and args.packing_strategy == "wrapped":
        raise UserError(
            "--packing_strategy wrapped: documents in a row would see each other; choose bfd_split, which cuts only "
            "what is longer than --max_length and loses no token, or bfd."
        )
    packed = args.packing or args.padding_free
    if args.eval_packing and not packed:
        raise UserError(
            "--eval_packing true without --packing true: held-out documents in a row would see each other; give both, "
            "or leave it out."
        )
    return packed


def documents_see_each_other(
    logits_of: Callable[[Mapping[str, Any]], torch.Tensor],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    vocab_size: int,
) -> bool:
    """Whether a document in a packed row changes with the one before it: some models of transformers let it.

    `collate` makes the batch that training makes of rows, `logits_of` gives the model's logits for a batch, of shape
    (1, tokens, vocabulary). It is asked four times: for a document after one and after another, packed, and for the
    same tokens as one document, which says how much a change would be.
    """
    first, other, last = (torch.arange(PROBE_LENGTH * n, PROBE_LENGTH * (n + 1)) % vocab_size for n in range(3))
    packed, joined = [], []
    for before in (first, other):
        row = torch.cat([before, last])
        tokens = row.tolist()
        batch = collate([{"input_ids": tokens, "labels": tokens, "seq_lengths": [PROBE_LENGTH, PROBE_LENGTH]}])
        packed.append(logits_of({name: value for name, value in batch.items() if name != "labels"}))
        joined.append(logits_of({"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}))
    moved, seen = ((one - two)[:, PROBE_LENGTH : 2 * PROBE_LENGTH].float().abs().max() for one, two in (packed, joined))
    return bool(moved > 0.05 * seen)  # behind a mask nothing moves; the margin is for rounding
