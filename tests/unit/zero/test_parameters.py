"""What a rank holds of a parameter."""

from types import SimpleNamespace

import pytest
import torch

from lisa_dist.zero.parameters import local_shard


def sharded(part: torch.Tensor, status: str = "AVAILABLE") -> torch.nn.Parameter:
    """A parameter of six elements as ZeRO-3 holds it, four on each rank."""
    parameter = torch.nn.Parameter(torch.empty(0))
    part.status, part.ds_numel = SimpleNamespace(name=status), 4
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = part, 6, None
    return parameter


def test_a_whole_parameter_begins_at_its_first_element():
    begin, shard = local_shard(torch.nn.Parameter(torch.arange(6.0).view(2, 3)))
    assert (begin, shard.tolist()) == (0, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(("rank", "begin", "length"), [(0, 0, 4), (1, 4, 2), (2, 8, 0)])
def test_a_shard_is_without_its_padding(monkeypatch, rank, begin, length):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    found, shard = local_shard(sharded(torch.arange(4.0)))
    assert (found, shard.tolist()) == (begin, list(range(length)))


@pytest.mark.parametrize("part", [(torch.empty(0), "NOT_AVAILABLE"), (torch.zeros(4, dtype=torch.int8), "AVAILABLE")])
def test_weights_that_are_elsewhere_or_quantized_cannot_be_looked_at(part):
    with pytest.raises(ValueError, match="offload_param"):
        local_shard(sharded(*part))
