"""Ranks that share rows, in a model and in a loop of one's own: the losses, gradients and weights of whole rows."""

import itertools

import pytest
import torch
from engines import full_weights
from models import SIZES, tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3NextConfig,
)

import lisa_dist
from lisa_dist.core import sequence_parallel
from lisa_dist.core.sequence_parallel import (
    NO_LABEL,
    SequenceParallel,
    UlyssesAttention,
    check_sequence_parallel,
    shard,
)
from lisa_dist.errors import UserError

TOKENS, PROMPT, DOCUMENT = 32, 9, 13  # of a row; of these the first have no label, and make a document of their own
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
SHAPE = SIZES | {"vocab_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": False}
SHAPE_OF_GEMMA = SHAPE | {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]}
KINDS = {
    "heads of keys in groups": LlamaConfig(**SHAPE),
    "fewer heads of keys than ranks": LlamaConfig(**SHAPE | {"num_key_value_heads": 1}),
    "a window": MistralConfig(sliding_window=8, **SHAPE),
    "a window in some layers": Gemma3TextConfig(sliding_window=8, **SHAPE_OF_GEMMA),
}


def batch_of(packed: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 128, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :PROMPT] = NO_LABEL
    positions = torch.cat([torch.arange(DOCUMENT), torch.arange(TOKENS - DOCUMENT)]).expand(2, TOKENS)
    return {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if packed else {})


def compare_with_whole_rows(size: int) -> dict[str, tuple[float, float, bool]]:
    """By model and batch: differences of losses, of gradients in parts, and whether rows are whole elsewhere."""
    found = {}
    for (name, config), packed in itertools.product(KINDS.items(), (False, True)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        batch, losses, gradients = batch_of(packed), [], []
        for sequence in (None, SequenceParallel(size, "cpu")):
            if sequence is not None:
                sequence.attend(model)
            model.zero_grad()
            loss = model(**(batch if sequence is None else sequence.shard(batch)), use_cache=False).loss
            loss.backward()
            for tensor in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(tensor.detach())
            losses.append(loss.item() / dist.get_world_size())
            gradients.append([parameter.grad / dist.get_world_size() for parameter in model.parameters()])
        off = max(((one - two).abs().max() / two.abs().max()).item() for one, two in zip(*gradients, strict=True))
        with torch.no_grad():
            whole = model.eval()(**batch, use_cache=False).loss.item()
            sequence.close()
            closed = model.train()(**batch, use_cache=False).loss.item()
        rows_are_whole = [whole, closed] == pytest.approx([losses[0]] * 2, abs=1e-6)
        found[f"{name}, packed {packed}"] = (abs(losses[0] - losses[1]), off, rows_are_whole)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_computes_by_parts_what_it_computes_by_rows(size):
    for found in run_ranks(compare_with_whole_rows, 4, size):
        wrong = {name: one for name, one in found.items() if one[0] > 2e-6 or one[1] > 2e-6 or not one[2]}
        assert len(found) == 2 * len(KINDS)
        assert wrong == {}


def own_loop(stage: str, size: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms and weights of six steps in three periods, of two rows each, of which a rank or a pair has one."""
    config = lisa_dist.LisaConfig(lisa_activated_layers=2, lisa_interval_steps=2)
    engine, lisa = lisa_dist.initialize(
        tiny_llama(), stage, config, lr=1e-4, optim="lisa_adamw", max_grad_norm=0.5, sequence_parallel=size
    )
    losses, norms, sequence = [], [], lisa.sequence
    for (ids,) in token_batches(6, rows=2):
        lisa.on_step_begin()
        rows = ids.chunk(2)[sequence.data_rank if sequence else dist.get_rank()]
        batch = {"input_ids": rows, "labels": rows}
        loss = engine(**(sequence.shard(batch) if sequence else batch)).loss
        engine.backward(loss)
        engine.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    assert lisa.rows_per_step == 2
    weights = full_weights(engine)
    lisa.close()
    engine.destroy()
    return losses, norms, weights


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_loop_of_ones_own_trains_as_with_whole_rows(stage):
    losses, norms, weights = run_ranks(own_loop, 2, stage, 1)[0]
    shared_losses, shared_norms, shared_weights = run_ranks(own_loop, 4, stage, 2)[0]
    assert shared_losses == pytest.approx(losses, abs=2e-6)
    assert shared_norms == pytest.approx(norms, rel=1e-5)
    assert max((shared_weights[name] - one).abs().max().item() for name, one in weights.items()) < 1e-4
    assert not all(torch.equal(one, tiny_llama().state_dict()[name]) for name, one in weights.items())


def refused_for_what_it_mixes(name: str) -> str:
    """The error of a model with a layer that looks at the token before, or at windows that attention is not told of."""
    model = tiny_llama()
    if name == "tokens":
        model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + output.roll(1, 1))
    else:
        model.config.layer_types = ["sliding_attention"] * 6
    with pytest.raises(UserError) as raised:
        lisa_dist.initialize(model, "zero3", sequence_parallel=2)
    return str(raised.value)


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("name", ["tokens", "windows"])
def test_a_model_that_mixes_tokens_elsewhere_is_refused(name):
    for said in run_ranks(refused_for_what_it_mixes, 2, name):
        assert "more than the attention of transformers looks at other tokens" in said


@pytest.mark.parametrize(
    ("size", "ranks", "config", "how", "said"),
    [
        (3, 4, LlamaConfig(), {}, "groups of 3 ranks do not make 4"),
        (8, 8, LlamaConfig(hidden_size=96, num_attention_heads=12), {}, "12 heads, 12 of keys"),
        (6, 6, LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4), {}, "12 heads, 4 of keys"),
        (2, 2, Qwen3NextConfig(), {}, "type linear_attention"),
        (2, 2, Gemma3Config(), {}, "reads more than text"),
        (16, 8, LlamaConfig(), {}, "groups of 16 ranks do not make 8"),
        (2, 2, LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), {}, "of type dynamic depend on"),
        (2, 2, Phi3Config(rope_parameters=LONG_ROPE), {}, "of type longrope depend on the length of a row"),
        (2, 2, MixtralConfig(output_router_logits=True), {}, "give --router_aux_loss_coef 0"),
        (2, 2, LlamaConfig(), {"packed_tokens": 32768}, "install flash-attn, or give --packing false"),
        (2, 2, LlamaConfig(), {"attention": "eager"}, "attention eager has a mask"),
        (2, 2, LlamaConfig(), {"attention": "flex_attention"}, "attention flex_attention has a mask"),
        (2, 2, LlamaConfig(), {"task": "dpo"}, "--task dpo: TRL's trainer makes its batches of whole rows"),
    ],
)
def test_what_cannot_share_rows_is_refused(size, ranks, config, how, said):
    with pytest.raises(UserError, match=said):
        check_sequence_parallel(size, ranks, config, **how)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": torch.ones(1, 7)}, "rows of 7 tokens; pad them to a multiple of 2"),
        ({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 1]])}, "padding comes before"),
    ],
)
def test_rows_that_have_no_equal_parts_are_refused(batch, said):
    with pytest.raises(UserError, match=said):
        shard(batch, 2, 0)


def test_positions_are_where_the_rows_are():
    part = shard({"input_ids": torch.ones(1, 4, dtype=torch.long, device="meta")}, 2, 1)
    assert part["position_ids"].device.type == "meta"
    assert shard({"input_ids": torch.ones(1, 4)}, 2, 1)["position_ids"].tolist() == [[2, 3]]


def two_passes(size: int) -> float:
    """The difference, in parts, of gradients of two batches that run forward before either runs backward."""
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = batch_of(packed=True), batch_of(packed=False)
    second["position_ids"] = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).expand(2, TOKENS)
    gradients = []
    for sequence in (None, SequenceParallel(size, "cpu")):
        if sequence is not None:
            sequence.attend(model)
        model.zero_grad()
        batches = (first, second) if sequence is None else map(sequence.shard, (first, second))
        sum(model(**batch, use_cache=False).loss for batch in batches).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    sequence.close()
    return max(((one - two).abs().max() / two.abs().max()).item() for one, two in zip(*gradients, strict=True))


def test_a_layer_that_is_computed_again_has_the_positions_of_its_own_pass():
    assert max(run_ranks(two_passes, 2, 2)) < 2e-6


def test_models_share_rows_each_for_itself():
    one, other, alone = tiny_llama(), tiny_llama(), tiny_llama()
    attentions = UlyssesAttention(2), UlyssesAttention(2)
    for model, attention in zip((one, other), attentions, strict=True):
        attention.attend(model)
    with pytest.raises(UserError, match="a whole row in training; give it what shard"):
        one.train()(**batch_of(packed=False))
    attentions[0].close()
    of = sequence_parallel._attention_of
    assert [of.get(model.model.layers[0].self_attn) for model in (one, other, alone)] == [None, attentions[1], None]
    attentions[1].close()
    assert of.get(other.model.layers[0].self_attn) is None
