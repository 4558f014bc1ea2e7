"""Sequence parallelism: the ranks of a group share every row, and each has a part of its tokens.

A group is `size` ranks in sequence. All but attention looks at one token at a time. In attention a rank gives tokens
for heads: by one exchange it has all tokens of its share of the heads, by another its tokens of all heads again
(Ulysses, arXiv:2309.14509, section 3.1). To ZeRO the ranks of a group are as all others, and its mean of gradients is
right where a rank's loss is its sum over the step's labels of all ranks, times the number of ranks.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PretrainedConfig, masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lisa_dist.errors import UserError
from lisa_dist.tasks import SFT
from lisa_dist.zero.stage3 import asking

NO_LABEL = -100
_FULL, _WINDOWS = "full_attention", "sliding_attention"
_PROBE_TOKENS = 16  # of each rank, in `SequenceParallel.share`
_PACKED_BY_MASK = 16_384  # tokens of a row, whose mask takes 0.75 GiB with its copy in bf16
# The attention of a module that is given parts of rows.
_attention_of: weakref.WeakKeyDictionary[torch.nn.Module, "UlyssesAttention"] = weakref.WeakKeyDictionary()


def check_groups(size: int, ranks: int) -> None:
    """Raise UserError where the ranks are no groups of `size`."""
    if ranks % size:
        raise UserError(
            f"--sequence_parallel {size}: groups of {size} ranks do not make {ranks}; give a number that divides the "
            "ranks."
        )


def check_sequence_parallel(
    size: int,
    ranks: int,
    config: PretrainedConfig,
    attention: str = "sdpa",
    task: str = SFT,
    packed_tokens: int | None = None,
) -> None:
    """Raise UserError where groups of `size` ranks cannot share the rows of a model with this config and attention.

    `packed_tokens`: of the longest row, where several examples share one.
    """
    if size == 1:
        return
    flag, text = f"--sequence_parallel {size}", config.get_text_config()
    if task != SFT:
        raise UserError(f"{flag} with --task {task}: TRL's trainer makes its batches of whole rows; leave it out.")
    check_groups(size, ranks)
    if text is not config:
        raise UserError(f"{flag}: {config.model_type} reads more than text, which is no part of a row; leave it out.")
    if others := sorted({*(getattr(text, "layer_types", None) or [])} - {_FULL, _WINDOWS}):
        raise UserError(
            f"{flag}: layers of {config.model_type} are of type {', '.join(others)}, which carries a state from token "
            "to token, or looks at blocks of them; leave it out."
        )
    heads = getattr(text, "num_attention_heads", size)
    of_keys = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or (of_keys % size and size % of_keys):
        raise UserError(
            f"{flag}: the model has {heads} heads, {of_keys} of keys and values, and each rank takes as many as the "
            "others; give a number that divides them."
        )
    if attention != "sdpa" and "flash" not in attention:
        raise UserError(f"{flag}: attention {attention} has a mask of all tokens; give sdpa or flash_attention_2.")
    if attention == "sdpa" and (packed_tokens or 0) > _PACKED_BY_MASK:
        raise UserError(
            f"{flag}: the mask of packed rows of {packed_tokens} tokens has as many numbers as tokens squared; install "
            "flash-attn, or give --packing false."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, dict)}
    if found := sorted(kind for kind in kinds if kind == "longrope" or "dynamic" in kind):
        raise UserError(
            f"{flag}: rotary embeddings of type {found[0]} depend on the length of a row, of which a rank has a part; "
            "leave it out."
        )
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0):
        raise UserError(
            f"{flag}: the loss of {config.model_type}'s routers is of whole rows; give --router_aux_loss_coef 0."
        )


def shard(batch: dict[str, Any], size: int, place: int) -> dict[str, Any]:
    """The part of a batch's rows, [rows, tokens], that the rank at `place` of its group has, [rows, tokens / size].

    `labels` become those of each token's next, `shift_labels` the same, and `position_ids` are those in the whole row.
    Raises UserError for rows that `size` does not divide, and for padding that comes first.
    """
    rows, tokens = batch["input_ids"].shape
    if tokens % size:
        raise UserError(f"sequence_parallel {size}: rows of {tokens} tokens; pad them to a multiple of {size}.")
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask.diff(dim=1) > 0).any()):
        raise UserError(f"sequence_parallel {size}: padding comes before tokens; pad rows at their end.")
    positions = torch.arange(tokens, device=batch["input_ids"].device).expand(rows, tokens)
    whole = {"position_ids": positions} | batch
    if "labels" in batch:
        whole["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=NO_LABEL)
        whole["shift_labels"] = whole["labels"]
    share = slice(place * tokens // size, (place + 1) * tokens // size)
    is_row = {name: torch.is_tensor(one) and one.shape == (rows, tokens) for name, one in whole.items()}
    return {name: one[:, share].contiguous() if is_row[name] else one for name, one in whole.items()}


class _AllToAll(torch.autograd.Function):
    """Entry i to rank i of a group, and entry i from it; gradients go back the same way. Without a group, as large."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, received = group, torch.empty_like(parts)
        if group is not None:
            dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.forward(ctx, gradients[0].contiguous(), ctx.group), None


def _attend(
    own: Callable[..., Any], module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """In the place of an implementation of attention, for all models of the process; arguments have its names."""
    shared = _attention_of.get(module)
    if shared is None or not shared.is_on(module):
        return own(module, query, key, value, attention_mask, **kwargs)
    return shared.attention(own, module, query, key, value, **kwargs)


class UlyssesAttention:
    """Attention over whole rows, in a model that is given parts of them in training mode, and rows in evaluation mode.

    Without a group it computes as much as a rank of one would, for a plan.
    """

    def __init__(self, size: int, group: Any = None):
        self.size, self._group = size, group
        self._name = ""  # of the implementation
        self._hook: RemovableHandle | None = None
        self._is_probing = False
        self._whole = WeakTensorKeyDictionary()  # positions of rows, by those of this rank's part
        self._last = self._masked = torch.empty(0)  # those of the last forward pass; those that the masks are of
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._windows: set[int | None] = set()  # that attention was called with

    def attend(self, model: Any) -> None:
        """Have the model's attention see whole rows, from now until `close`."""
        name = self._name = model.config._attn_implementation
        known = inspect.signature(model.forward).parameters.values()
        if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in known):
            raise UserError(f"--sequence_parallel {self.size}: {type(model).__name__} takes no position_ids.")
        if getattr(ALL_ATTENTION_FUNCTIONS[name], "func", None) is not _attend:
            ALL_ATTENTION_FUNCTIONS[name] = functools.partial(_attend, ALL_ATTENTION_FUNCTIONS[name])
        _attention_of.update(dict.fromkeys(model.modules(), self))
        self._hook = model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)

    def close(self) -> None:
        """Give the model its own attention back."""
        if self._hook is not None:
            self._hook.remove()
        for module in [module for module, shared in _attention_of.items() if shared is self]:
            del _attention_of[module]

    def is_on(self, module: torch.nn.Module) -> bool:
        """Whether a module is given parts of rows."""
        return module.training or self._is_probing

    def _begin_pass(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take the positions of whole rows; masks follow from them, as the model's own would be those of a part."""
        if not self.is_on(model):
            return None
        if "position_ids" not in kwargs:
            raise UserError(f"sequence_parallel {self.size}: a whole row in training; give it what shard() gives.")
        own = kwargs["position_ids"].contiguous()
        every = [torch.empty_like(own) for _ in range(self.size)]
        if self._group is not None:
            dist.all_gather(every, own, group=self._group)
        self._whole[own] = self._last = torch.cat(every, dim=1)  # for a layer to be computed again, whatever ran since
        return args, {name: one for name, one in kwargs.items() if name != "attention_mask"} | {"position_ids": own}

    def attention(self, own: Callable[..., Any], module: Any, query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        """The implementation `own`, of [rows, heads, tokens, size], over whole rows and this rank's share of heads."""
        if kwargs.get("s_aux") is not None or query.shape[1] % self.size:
            raise UserError(f"--sequence_parallel {self.size}: {type(module).__name__} has sinks, or other heads.")
        given = kwargs.get("position_ids")
        positions = self._last if given is None else self._whole.get(given, self._last)
        copies = max(1, self.size // key.shape[1])  # where there are fewer heads of keys than ranks
        key, value = (one.repeat_interleave(copies, dim=1) if copies > 1 else one for one in (key, value))
        query, key, value = (self._all_to_all(one) for one in (query, key, value))
        groups = getattr(module, "num_key_value_groups", None)
        if groups is not None:
            module.num_key_value_groups = query.shape[1] // key.shape[1]
        mask = self._mask(positions, kwargs.get("sliding_window"), query.dtype)
        output, _ = own(module, query, key, value, mask, **kwargs | {"position_ids": positions})
        if groups is not None:
            module.num_key_value_groups = groups
        return self._all_to_all(output), None

    def _all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each rank's part of dimension 1 to it, joined in dimension 2: [rows, a, b, c] to [rows, a / n, b n, c]."""
        parts = torch.stack(tensor.chunk(self.size, dim=1))
        received: torch.Tensor = _AllToAll.apply(parts, self._group)
        return torch.cat(received.unbind(), dim=2)

    def _mask(self, positions: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """SDPA's for whole rows, once for all layers of a pass; flash-attn goes by positions and the window itself.

        It is what is added to the scores: of a mask of booleans SDPA would make and keep that in each layer.
        """
        self._windows.add(window)
        if "sdpa" not in self._name:
            return None
        if self._masked is not positions:
            self._masked, self._masks = positions, {}
        if window not in self._masks:
            rows, tokens = positions.shape
            documents = masking_utils.find_packed_sequence_indices(positions)
            sees = sliding_window_causal_mask_function(window) if window else causal_mask_function
            if documents is not None:
                sees = and_masks(sees, packed_sequence_mask_function(documents))
            mask = sdpa_mask(
                rows,
                tokens,
                tokens,
                mask_function=sees,
                local_size=window,
                allow_is_causal_skip=documents is None,
                device=positions.device,
            )
            self._masks[window] = mask if mask is None else torch.where(mask, 0.0, -torch.inf).to(dtype)
        return self._masks[window]


class SequenceParallel(UlyssesAttention):
    """The ranks that share rows with this one: `size` in sequence, of which it is the one at `place`.

    Those with the same `data_rank`, of `data_ranks`, are to be given the same rows. All ranks build it.
    """

    def __init__(self, size: int, device_type: str):
        # The names are Accelerate's, whose loaders give the ranks of a "tp" group the same batches.
        self.mesh = init_device_mesh(device_type, (dist.get_world_size() // size, size), mesh_dim_names=("dp", "tp"))
        super().__init__(size, self.mesh.get_group("tp"))
        self.place = self.mesh.get_local_rank("tp")
        self.data_ranks, self.data_rank = self.mesh["dp"].size(), self.mesh.get_local_rank("dp")

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch, by the function `shard`, with what makes a model's loss the mean of all labels.

        That is `num_items_in_batch`, by which models of transformers divide, of this batch, or what the batch has of a
        step of several. DeepSpeed takes the mean of all ranks.
        """
        part = shard(batch, self.size, self.place)
        if "labels" in batch:
            labels = (batch["labels"][:, 1:] != NO_LABEL).sum()
            part["num_items_in_batch"] = batch.get("num_items_in_batch", labels) / self.size
        return part

    def share(self, engine: Any) -> None:
        """Have the model of an engine share rows; all ranks call it before a step. Raises UserError where it cannot."""
        with asking(engine) as model:
            self.attend(model)
            differs = self._differs(model)
        if differs:
            raise UserError(
                f"--sequence_parallel {self.size}: in {type(model).__name__} more than the attention of transformers "
                "looks at other tokens, and a part of a row gives other logits than the row; leave it out."
            )

    def _differs(self, model: Any) -> bool:
        """Whether this rank's part of a row gives other logits than the row.

        How much a difference would be is that of the part as a row of its own.
        """
        row = torch.arange(_PROBE_TOKENS * self.size, device=next(model.parameters()).device)[None]
        part = shard({"input_ids": row % model.config.vocab_size}, self.size, self.place)
        whole = model(input_ids=row % model.config.vocab_size, use_cache=False).logits.chunk(self.size, dim=1)
        alone = model(**part, use_cache=False).logits
        self._windows.clear()
        self._is_probing = True
        try:
            shared = model(**part, use_cache=False).logits
        finally:
            self._is_probing = False
        differences = torch.stack([(one - whole[self.place]).float().abs().max() for one in (shared, alone)])
        dist.all_reduce(differences, dist.ReduceOp.MAX)
        moved, seen = differences.tolist()
        has_windows = _WINDOWS in (getattr(model.config, "layer_types", None) or [])
        return moved > 0.05 * seen or (has_windows and self._windows == {None})
