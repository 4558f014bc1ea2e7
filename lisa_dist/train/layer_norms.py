"""How large the weights of each block are and how much a step changes them: what the paper's layerwise study looks at.

For a block l of the model, all norms L2 over all of its weights together, in every n-th step:

- weight norm: w(l) = 1/T sum_t ||theta_t(l)||, theta_t being the weights after the update of step t;
- update norm: the mean of ||theta_t(l) - theta_{t-1}(l)||, of that one step, 0 where the block is inactive or frozen;
- moved norm: ||theta_T(l) - theta_0(l)||, all that the run has added, as it is at the end;
- product norm, of adapters alone: the mean of ||s B_t A_t||, of what they add to the frozen weights.

Under LoRA theta is the merged weight W + s B A, without the rounding that a merge to bf16 would bring; its norms are
taken piece by piece, and nothing is merged in the model. A module that trains as a copy (`modules_to_save`) counts as
the copy. Without adapters weights count as the model holds them: what bf16 rounds away is no update.

Who sends what: under ZeRO-3 each rank squares its part of each weight, and one reduction adds up three numbers of each
block; adapters, which are small, are gathered before. Else each rank has all weights, rank 0 alone looks and nothing is
sent. In a step that is looked at a rank that looks has a second copy of its part of the weights that may train, in
their dtype, and one more on the host for all of the run.

Source: section 3.1 of Pan et al. (arXiv 2403.17919).
"""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.core.blocks import Blocks, find_blocks
from lisa_dist.distributed.collectives import together
from lisa_dist.errors import UserError
from lisa_dist.files import SaveError, replacing, warning_of_failure
from lisa_dist.run_folder import NORMS, NORMS_NAME, PRODUCT
from lisa_dist.zero.gradients import NORM_CHUNK
from lisa_dist.zero.parameters import is_partitioned, local_shard, parameter_shape

_NOT_MEASURED = "whose norms are not taken: LoRA's on linear layers and embeddings are, without DoRA and biases."


class LayerNorms(TrainerCallback):
    """Takes the norms of each block in every `every`-th step, and writes them to `lisa_norms.csv` in `output_dir`.

    For any Hugging Face Trainer, on DeepSpeed or without, of all weights, of some, or of LoRA adapters. The file is
    there from the first save on, with what was seen until then, and whole at the end of the run; a resumed run begins
    anew. `layers_attribute` is that of `find_blocks`. Raises ValueError when training begins where there are adapters
    of another kind, or fewer steps than `every`.
    """

    def __init__(self, every: int = 1, layers_attribute: str | None = None):
        self.every = every
        self._layers_attribute = layers_attribute

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the weights, and keep what they are."""
        if state.max_steps < self.every:
            raise UserError(
                f"--layer_norms {self.every}: the run has {state.max_steps} steps, so none would be looked at; give at "
                f"most {state.max_steps}."
            )
        blocks = find_blocks(model.get_base_model() if isinstance(model, PeftModel) else model, self._layers_attribute)
        self._weights = list(_find_weights(model, blocks))
        found = {weight.block for weight in self._weights}
        self._blocks = [block.name for block in blocks if block.name in found]
        self._factors = [factor for weight in self._weights for factor in weight.factors]
        self._sharded = any(is_partitioned(weight.parameter) for weight in self._weights)
        self._looks_here = self._sharded or state.is_world_process_zero
        self._device = args.device
        self._start = [[part.cpu() for part in each] for each in self._changing()]
        self._before: list[list[torch.Tensor]] | None = None
        self._sums = torch.zeros(len(self._blocks), 3, dtype=torch.float64)
        self._num_looks = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the weights as they are before a step that is looked at."""
        if (state.global_step + 1) % self.every == 0:
            self._before = self._changing()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at the weights after the step."""
        if self._before is not None:
            self._sums += self._norms(self._before)
            self._before = None
            self._num_looks += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what was seen so far."""
        self._write(Path(str(args.output_dir)))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the norms, and let go of the weights. Norms that cannot be written are a warning of rank 0."""
        with warning_of_failure("norms") if state.is_world_process_zero else contextlib.suppress(SaveError):
            self._write(Path(str(args.output_dir)))
        self._weights, self._factors, self._start = [], [], []

    def _changing(self) -> list[list[torch.Tensor]]:
        """Copies of each weight that training may change; nothing on a rank that does not measure."""
        whole = self._gather_adapters()
        return [weight.changing(whole) for weight in self._weights] if self._looks_here else []

    def _norms(self, then: list[list[torch.Tensor]]) -> torch.Tensor:
        """Each block's norms of weights, of what was added since `then`, and of products; (blocks, 3) in fp64."""
        whole = self._gather_adapters()
        squares = torch.zeros(len(self._blocks), 3, dtype=torch.float64, device=self._device)
        if self._looks_here:
            for weight, before in zip(self._weights, then, strict=True):
                row = squares[self._blocks.index(weight.block)]
                for piece in weight.pieces(before, whole):
                    row += torch.stack([part.square().sum() for part in piece]).to(self._device)
        if self._sharded:
            dist.all_reduce(squares)
        return squares.sqrt().cpu()

    def _gather_adapters(self) -> dict[int, torch.Tensor]:
        """The factors of all adapters, whole and in fp32, by the ids of their parameters."""
        with deepspeed.zero.GatheredParameters(self._factors, enabled=self._sharded and bool(self._factors)):
            return {id(factor): factor.detach().to(torch.float32, copy=self._sharded) for factor in self._factors}

    def _write(self, folder: Path) -> None:
        if not self._num_looks:  # a resumed run that had no such step left
            return
        table = self._sums / self._num_looks
        # In the order of the columns: weight, update, moved and, of adapters, product.
        table = torch.cat([table[:, :2], self._norms(self._start)[:, 1:2], table[:, 2:]], dim=1)
        columns = [*NORMS, PRODUCT] if self._factors else [*NORMS]
        with together(folder):
            if not dist.is_initialized() or dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / NORMS_NAME) as path, path.open("w", encoding="utf-8", newline="") as file:
                    lines = csv.writer(file, lineterminator="\n")
                    lines.writerow(["block", *columns])
                    for block, norms in zip(self._blocks, table.tolist(), strict=True):
                        lines.writerow([block, *norms[: len(columns)]])


class _Weight:
    """A parameter of the model, of which this rank holds all or, under ZeRO-3, a part."""

    block: str

    def __init__(self, parameter: nn.Parameter, trains: bool):
        self.parameter, self._trains = parameter, trains
        self.factors: list[nn.Parameter] = []  # of adapters

    def changing(self, whole: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Copies of what training may change."""
        return [local_shard(self.parameter)[1].clone()] if self._trains else []

    def pieces(self, then: list[torch.Tensor], whole: dict[int, torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """In fp64, piece by piece: the weight here, what was added since `then`, and the product of adapters."""
        _, now = local_shard(self.parameter)
        before = then[0] if then else now
        for piece, old in zip(now.split(NORM_CHUNK), before.split(NORM_CHUNK), strict=True):
            piece = piece.double()
            yield piece, piece - old.to(piece), piece.new_zeros(1)


class _Adapted(_Weight):
    """A frozen matrix and its adapters: W + s B A, of which this rank's elements are computed on demand."""

    def __init__(self, matrix: nn.Parameter, layer: LoraLayer):
        super().__init__(matrix, trains=True)
        adapters: Any = layer  # whose factors are in dictionaries of modules
        embeds = any(name in adapters.lora_embedding_A for name in adapters.active_adapters)
        # An embedding, and a linear layer that keeps its matrix the other way round, add the transposed product.
        self._transposed = embeds or getattr(adapters, "fan_in_fan_out", False)
        self._pairs = [
            (adapters.lora_embedding_B[name], adapters.lora_embedding_A[name], adapters.scaling[name])
            if embeds
            else (adapters.lora_B[name].weight, adapters.lora_A[name].weight, adapters.scaling[name])
            for name in adapters.active_adapters
        ]
        self.factors = [factor for left, right, _ in self._pairs for factor in (left, right)]

    def changing(self, whole: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """L and R, so that L R has the shape of the matrix; several adapters side by side."""
        lefts, rights = [], []
        for left, right, scale in self._pairs:
            left, right = whole[id(left)] * scale, whole[id(right)]
            lefts.append(right.T if self._transposed else left)
            rights.append(left.T if self._transposed else right)
        return [torch.cat(lefts, dim=1), torch.cat(rights)]

    def pieces(self, then: list[torch.Tensor], whole: dict[int, torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """As of any weight; the product in fp32."""
        first, matrix = local_shard(self.parameter)
        left, right = self.changing(whole)
        left_then, right_then = (factor.to(left) for factor in then)
        # L R - L' R' = (L - L') R + L' (R - R'): no difference of two large products.
        left_added = torch.cat([left - left_then, left_then], dim=1)
        right_added = torch.cat([right, right - right_then])
        columns = right.shape[1]
        for piece in matrix.split(NORM_CHUNK):
            rows = slice(first // columns, -(-(first + piece.numel()) // columns))
            at = slice(first - rows.start * columns, first - rows.start * columns + piece.numel())
            product = (left[rows] @ right).view(-1)[at].double()
            added = (left_added[rows] @ right_added).view(-1)[at].double()
            yield piece.to(product) + product, added, product
            first += piece.numel()


def _find_weights(model: Any, blocks: Blocks) -> Iterator[_Weight]:
    """Every weight that acts in the language model, once, in its block."""
    is_peft = isinstance(model, PeftModel)
    model = model.get_base_model() if is_peft else model
    inside = [block for block in blocks if block is not blocks.outside]
    owner = {id(parameter): block.name for block in inside for parameter in block.parameters.values()}
    # What does not act by itself: factors, a matrix with adapters, what a copy stands for.
    factors, with_adapters, replaced = set(), set(), []
    for path, module in model.named_modules() if is_peft else ():
        if isinstance(module, ModulesToSaveWrapper):
            replaced.append(f"{path}.original_module.")
        elif isinstance(module, BaseTunerLayer):
            matrix = getattr(module.get_base_layer(), "weight", None)
            if not isinstance(module, LoraLayer) or matrix is None or len(parameter_shape(matrix)) != 2:
                raise UserError(f"--layer_norms: {path} has an adapter ({type(module).__name__}) {_NOT_MEASURED}")
            adapted = _Adapted(matrix, module)
            factors |= {id(factor) for factor in adapted.factors}
            with_adapters.add(f"{path}.base_layer.weight")
            if (block := owner.get(id(adapted.factors[0]))) is not None:
                adapted.block = block
                yield adapted
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    at_head = tuple(f"{path}." for path, module in model.named_modules() if module is head)
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for key, aliases in names.items():
        acting = [name for name in aliases if name not in with_adapters and not name.startswith(tuple(replaced))]
        if key in factors or key not in owner or not acting:
            continue
        if ".lora_" in acting[0]:
            raise UserError(f"--layer_norms: {acting[0]} is of an adapter {_NOT_MEASURED}")
        # A matrix that head and embedding share is the head's where the embedding has an adapter or a copy for itself.
        is_head_s = len(acting) < len(aliases) and acting[0].startswith(at_head)
        parameter = parameters[acting[0]]
        weight = _Weight(parameter, parameter.requires_grad or not is_peft)
        weight.block = "head" if is_head_s else owner[key]
        yield weight
