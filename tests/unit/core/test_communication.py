"""What goes between ranks: active parameters' gradients and weights, and nothing of what sleeps."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator

import deepspeed
import pytest
import torch
from cases import full
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.ds_config import read_ds_config
from lisa_dist.zero.parameters import parameter_numel

pytestmark = pytest.mark.usefixtures("cpu_ops")

REDUCING = ("all_reduce", "reduce", "reduce_scatter_tensor")
GATHERING = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")
FEW = 8  # norms, flags and digests are scalars; the smallest group here has 64 elements


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Count the elements that each kind of collective carries, input or output, whichever is the whole."""
    counts: Counter = Counter()
    backend = deepspeed.comm.comm.cdb  # what DeepSpeed sends everything through
    originals = {name: getattr(backend, name) for name in (*REDUCING, *GATHERING)}

    def counting(name, original):
        def call(*args, **kwargs):
            sizes = []
            for value in (*args, *kwargs.values()):
                tensors = value if isinstance(value, list) else [value]
                sizes.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)))
            if max(sizes) > FEW:
                counts["reduced" if name in REDUCING else "gathered"] += max(sizes)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(backend, name, counting(name, original))
    try:
        yield counts
    finally:
        for name in originals:
            delattr(backend, name)  # the class's own again


def count_a_step(ds_config: str, num_layers: int, settings: dict | None = None) -> dict:
    config = lisa_dist.LisaConfig(**{"lisa_interval_steps": 1} | (settings or {}))
    engine, lisa = lisa_dist.initialize(tiny_llama(num_layers=num_layers), ds_config, config, lr=1e-3)
    for (tokens,) in token_batches(3, rows=4):
        lisa.on_step_begin()
        rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        with counted() as counts:
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
    groups = [sum(parameter_numel(p) for p in group["params"]) for group in lisa.param_groups()]
    engine.destroy()
    return {"active": sum(groups), **counts}


@pytest.mark.parametrize("ds_config", [full("zero1"), "zero2"])
def test_stages_1_and_2_send_the_active_parameters_once_each_way(ds_config):
    small, large = (run_ranks(count_a_step, 2, ds_config, num_layers)[0] for num_layers in (4, 12))
    assert small == large, "more sleeping layers, no more traffic"
    assert small["reduced"] == small["active"]
    assert small["gathered"] == small["active"]


def test_stage_3_reduces_gradients_of_active_parameters_only():
    small, large = (run_ranks(count_a_step, 2, "zero3", num_layers)[0] for num_layers in (4, 12))
    assert small["reduced"] == large["reduced"]
    assert small["gathered"] < large["gathered"], "stage 3 gathers every layer's weights to compute with them"


def test_stage_3_does_not_gather_for_gradients_that_nobody_wants(tmp_path):
    """With the embedding frozen, layers below the lowest active one are gathered in the forward pass alone."""
    num_layers = 6
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps([0] * (num_layers - 1) + [1]))
    settings = {"lisa_sampler": "weighted", "lisa_weights_file": str(weights), "lisa_activated_layers": 1}
    frozen = settings | {"lisa_always_on": "head,rest", "lisa_frozen": "embed"}
    # A coordinator that keeps nothing for its next use: what the backward pass wants is gathered once more.
    config = read_ds_config("zero3")
    config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    trains, sleeps = (run_ranks(count_a_step, 2, config, num_layers, one)[0] for one in (settings, frozen))
    matrices = sum(one.numel() for one in tiny_llama().model.layers[0].parameters() if one.ndim > 1)
    embedding = tiny_llama().model.embed_tokens.weight.numel()
    assert trains["gathered"] - sleeps["gathered"] == (num_layers - 1) * matrices + embedding
    assert trains["reduced"] - sleeps["reduced"] == embedding
