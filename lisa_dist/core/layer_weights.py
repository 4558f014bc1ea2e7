"""Weights of the layers that samplers go by: a list of the user's, or a table of norms.

The paper's motivation gives p_l = w_l(LoRA) / w_l(full): "norms.csv#lora.weight_norm/full.weight_norm".
"""

import csv
import io
import json
import math
from pathlib import Path

from lisa_dist.errors import UserError


def load_layer_weights(source: str, num_layers: int, num_active: int) -> list[float]:
    """Read the weights of the layers, a JSON list or columns of a table of norms, and check them against the model.

    A table is a CSV of `lisa-dist norms`; "norms.csv#A/B" is its column A over its column B, "norms.csv#A" the column
    A. Raises ValueError, naming the file and the rule, when it is missing, empty, not of numbers, of another length,
    negative, not finite, or has fewer positive weights than layers must be sampled.
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
