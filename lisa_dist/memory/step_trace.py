"""What a traced step has allocated, and when: the result of `trace.py`, which `gradient_peak.py` follows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Arrival:
    """A gradient that arrives in a traced backward pass. Bytes of all allocations but the gradients before it."""

    parameter: torch.nn.Parameter
    peak_before: int  # the most since the gradient before it
    now: int  # when it arrives, itself included

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient."""
        return self.parameter.numel() * self.parameter.element_size()


@dataclass(frozen=True)
class StepTrace:
    """Bytes that a forward and backward pass allocates on top of weights and states."""

    activations: int  # at the end of the forward pass
    logits: int  # at the end of the forward pass: what has the vocabulary as its last dimension
    arrivals: tuple[Arrival, ...]
    peak_after: int  # the most after the last gradient
    now: int  # at the end of the backward pass, without gradients

    def to_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Plain values, for JSON; `names` of parameters by id."""
        arrivals = [(names[id(arrival.parameter)], arrival.peak_before, arrival.now) for arrival in self.arrivals]
        return vars(self) | {"arrivals": arrivals}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], parameters: Mapping[str, torch.nn.Parameter]) -> "StepTrace":
        """What `to_dict` gave, of the same model; `parameters` by name."""
        arrivals = [Arrival(parameters[name], peak_before, now) for name, peak_before, now in values["arrivals"]]
        return cls(**{**values, "arrivals": tuple(arrivals)})
