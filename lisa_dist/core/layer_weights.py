"""Weights of the layers that samplers go by: a list of the user's, a table of norms, or learned while they train.

The paper's motivation gives p_l = w_l(LoRA) / w_l(full): "norms.csv#lora.weight_norm/full.weight_norm".

The sampler "adaptive" learns them: when a layer's period ends it is looked at by the norm of its gradients. Such norms,
averaged over visits and made probabilities by a softmax that is mixed with the uniform, are what GRASS and MISA go by.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

from lisa_dist.errors import UserError
from lisa_dist.optim.moments import mean_squared_norm
from lisa_dist.optim.states import PartitionKey
from lisa_dist.zero.partitions import ZeroPartitions

DECAY = 0.5  # the share that the past keeps at each visit
FLOOR = 0.2  # the part of the probability that is spread evenly


def load_layer_weights(source: str, num_layers: int, num_active: int) -> list[float]:
    """Read the weights of the layers, a JSON list or columns of a table of norms, and check them against the model.

    A table is a CSV of `lisa-dist norms`; "norms.csv#A/B" is its column A over its column B, "norms.csv#A" the column
    A. Raises UserError, naming the file and the rule.
    """
    flag = f"--lisa_weights_file {source}"
    path, columns = split_columns(source)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: is no text in UTF-8.") from error
    weights = _weights_of_list(flag, text) if columns is None else _weights_of_table(flag, text, columns)
    if len(weights) != num_layers:
        raise UserError(f"{flag}: holds {len(weights)} weights, but the model has {num_layers} decoder layers.")
    for layer, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"{flag}: the weight of layer {layer} is {weight}; weights are finite and not negative.")
    positive = sum(weight > 0 for weight in weights)
    if positive < num_active:
        raise UserError(
            f"{flag}: only {positive} weights are positive, but --lisa_activated_layers {num_active} are sampled."
        )
    return [float(weight) for weight in weights]


def split_columns(source: str) -> tuple[str, str | None]:
    """The file of `--lisa_weights_file`, and what it says of columns; None for a list, which has none."""
    path, suffix, columns = source.partition(".csv#")
    return (f"{path}.csv", columns) if suffix else (source, "" if source.endswith(".csv") else None)


def _weights_of_list(flag: str, text: str) -> list[float]:
    try:
        weights = json.loads(text, parse_int=float)
    except ValueError as error:
        raise UserError(f"{flag}: is not JSON ({error}).") from error
    if not isinstance(weights, list) or not all(type(weight) is float for weight in weights):
        raise UserError(f"{flag}: must hold a JSON list of numbers, such as [1, 0.5, 2].")
    return weights


def _weights_of_table(flag: str, text: str, columns: str) -> list[float]:
    """The rows of layers in order: a column, or one over another."""
    header, *lines = list(csv.reader(io.StringIO(text))) or [[]]
    rows = {line[0]: dict(zip(header, line, strict=False)) for line in lines if line}
    count = sum(name.startswith("layers.") for name in rows)
    layers = [rows.get(f"layers.{number}", {}) for number in range(count)]
    if header[:1] != ["block"] or not layers:
        raise UserError(f"{flag}: holds no norms of layers; it is the norms.csv that lisa-dist norms writes.")
    if {} in layers:
        raise UserError(f"{flag}: has no row layers.{layers.index({})}, but has later ones.")
    wanted = [name.strip() for name in columns.split("/")]
    if len(wanted) > 2 or not all(name in header[1:] for name in wanted):
        raise UserError(
            f"{flag}: give a column, or one over another, behind the #, as norms.csv#A/B; it has "
            f"{', '.join(header[1:])}."
        )
    try:
        numbers = [[float(row[name]) for name in wanted] for row in layers]
    except (KeyError, ValueError) as error:
        raise UserError(f"{flag}: {error} is no number of a layer.") from error
    if any(divisor == 0 for _, *divisors in numbers for divisor in divisors):
        raise UserError(f"{flag}: {wanted[1]} of a layer is 0, and nothing can be divided by it.")
    return [number / (divisors[0] if divisors else 1.0) for number, *divisors in numbers]


class LayerImportance:
    """Averages of what was observed of each layer, and the sampling weights that follow from them.

    A layer's average is exponential over its visits. Averages are divided by their mean over the layers seen, so that
    they have no unit; a layer that was never seen counts as the highest that was, so that each is looked at soon.
    """

    def __init__(self, num_layers: int):
        self.averages: list[float | None] = [None] * num_layers

    def observe(self, seen: Mapping[int, float]) -> None:
        """Take in what the period's layers showed; a value that is not finite says nothing."""
        for layer, value in seen.items():
            if math.isfinite(value):
                past = self.averages[layer]
                self.averages[layer] = value if past is None else DECAY * past + (1 - DECAY) * value

    def weights(self) -> list[float]:
        """Weights of the layers, which add up to 1: a part of it evenly, the rest by a softmax."""
        count, known = len(self.averages), [value for value in self.averages if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        if mean <= 0:
            return [1 / count] * count
        scores = [(max(known) if value is None else value) / mean for value in self.averages]
        powers = [max(math.exp(score - max(scores)), 1e-6) for score in scores]  # so that there are layers enough
        return [FLOOR / count + (1 - FLOOR) * power / sum(powers) for power in powers]


def observe_layers(
    importance: LayerImportance,
    layers: Sequence[int],
    partitions: ZeroPartitions,
    layer_of: Callable[[PartitionKey], int | None],
) -> None:
    """Have `importance` observe the layers whose period ends: the same numbers on all ranks, which all call it.

    By the root mean square of each layer's gradient norm, clipped, since its moments began; NaN before that. 8 bytes a
    layer are summed, and broadcast.
    """
    get_accelerator().synchronize()
    pieces, beta2 = partitions.pieces(), partitions.optimizer.param_groups[0]["betas"][1]
    squares = torch.zeros(len(layers), dtype=torch.float64, device=partitions.engine.device)
    for key, state in partitions.states().items():
        layer = layer_of(key)
        if layer in layers:
            squares[layers.index(layer)] += mean_squared_norm(state, pieces[key], beta2)
    dist.all_reduce(squares)
    norms = squares.sqrt()
    dist.broadcast(norms, src=0)
    importance.observe(dict(zip(layers, norms.tolist(), strict=True)))
