"""What must always hold, on two ranks, for every ZeRO stage, with and without offload, with weight decay.

1 sleeping weights are bit-identical; 2 every step moves every active block; 3 ranks hold the same weights; 4 states are
those of the active blocks, cut W ways; 5 losses equal the reference; 6 live bytes are flat; 7 the schedule does not
depend on what is trained; 8 gamma = all layers is full training.
"""

import functools
import gc
import math

import deepspeed
import pytest
import torch
from cells import STAGES, full, stages
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks, without_collection
from reference import train_reference
from torch import distributed as dist
from transformers.pytorch_utils import Conv1D

import lisa_dist
from lisa_dist.core.live_bytes import live_storages, live_tensor_bytes
from lisa_dist.memory.trace import AllocationTracker
from lisa_dist.zero import gradients, overrides

PLAIN = ("zero1", "zero2", "zero3")
STEPS, INTERVAL, LR, DECAY = 10, 3, 1e-3, 0.1  # three periods, and a step of the fourth

pytestmark = pytest.mark.usefixtures("cpu_ops")


def assert_same_on_all_ranks(weights: dict[str, torch.Tensor]) -> None:
    """Sent as one tensor: a broadcast of each takes longer than the step."""
    mine = torch.cat([value.flatten() for value in weights.values()])
    theirs = mine.clone()
    dist.broadcast(theirs, src=0)
    sizes = [value.numel() for value in weights.values()]
    for name, one, two in zip(weights, mine.split(sizes), theirs.split(sizes), strict=True):
        assert torch.equal(one, two), f"{name} differs from rank 0's"


def expected_elements(lisa, stage: int, world_size: int) -> int:
    """Elements of master weights on one rank, from the shapes alone."""
    blocks = [lisa.blocks.outer(name) for name in (*lisa.config.always_on, *lisa.active_blocks)]
    blocks += [lisa.blocks.layers[layer] for layer in lisa.active_layers]
    if stage == 3:  # each parameter is cut by itself
        parameters = [parameter for block in blocks for parameter in block.parameters.values()]
        return sum(math.ceil(parameter.ds_numel / world_size) for parameter in parameters)
    alignment = 2 * world_size  # each group, matrices or vectors of a block, is cut as one flat buffer
    sizes = [
        sum(parameter.numel() for parameter in block.parameters.values() if (parameter.ndim > 1) == matrices)
        for block in blocks
        for matrices in (True, False)
    ]
    return sum(math.ceil(size / alignment) * alignment // world_size for size in sizes)


def train_and_check(ds_config: str, build, dtype: torch.dtype, options: dict) -> dict:
    """Train into the fourth period and check invariants 1 to 4 after every step."""
    settings = {"lisa_interval_steps": INTERVAL, "lisa_debug": True} | options.get("lisa", {})
    accumulation = options.get("accumulation", 1)
    model = build().to(dtype)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine, lisa = lisa_dist.initialize(
        model,
        ds_config,
        lisa_dist.LisaConfig(**settings),
        lr=LR,
        weight_decay=DECAY,
        optim=options.get("optim", "adamw_torch"),
        gradient_accumulation_steps=accumulation,
    )
    stage, world_size = engine.zero_optimization_stage(), dist.get_world_size()
    losses, sets, masters = [], [], {}
    weights = full_weights(engine)
    for micro_batches in token_batches(STEPS, rows=4, micro_batches=accumulation):
        losses.append(train_step(engine, lisa, micro_batches))
        sets.append((*lisa.active_layers, *lisa.active_blocks))
        before, weights = weights, full_weights(engine)
        asleep = {name for layer, block in enumerate(lisa.blocks.layers) for name in block.parameters
                  if layer not in lisa.active_layers}  # fmt: skip
        outer = [*lisa.config.frozen, *(set(lisa.config.sampled) - set(lisa.active_blocks))]
        asleep |= {name for block in outer for name in lisa.blocks.outer(block).parameters}
        for block in lisa.blocks:
            moved = [name for name in block.parameters if not torch.equal(before[name], weights[name])]
            if set(block.parameters) <= asleep:
                assert not moved, f"asleep, but moved at step {len(losses) - 1}: {moved}"
            else:
                still = set(block.parameters) - set(moved)
                # In bf16 a weight of 1 takes some steps to move by its last bit; its master moves all the same.
                assert not still or dtype == torch.bfloat16, f"active, but not moved: {still}"
        assert_same_on_all_ranks(weights)
        states = lisa.partition_states()
        assert not asleep & {name for key in states for name in key}
        assert sum(state.numel for state in states.values()) == expected_elements(lisa, stage, world_size)
        for key, state in states.items():
            assert len(state.optimizer_state) >= 2, f"no moments for {key}"
            # Without masters a group of a few norms moves only where the draws have it.
            moves = state.numel > 1000 or not state.is_weights
            assert key not in masters or not moves or not torch.equal(masters[key], state.master), f"not moved: {key}"
        masters = {key: state.master.detach().clone() for key, state in states.items()}
    lisa.close()
    engine.destroy()
    hosts = [record.host_bytes for record in lisa.records]
    return {"losses": losses, "layers_of_period": sets[::INTERVAL], "visits": lisa.visit_counts, "host_bytes": hosts}


def reference_losses(build, layers_path: str, blocks_of_period, options: dict) -> list[float]:
    """`blocks_of_period` are layers by number and drawn outer blocks by name."""
    model = build()
    always_on = options.get("lisa", {}).get("lisa_always_on", "embed,head,rest").split(",")
    body = model.get_submodule(layers_path.rpartition(".")[0])
    norm = body.get_submodule("ln_f" if "transformer" in layers_path else "norm")
    outer = {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings(), "rest": norm}
    asleep = []
    for blocks in blocks_of_period:
        awake = {id(value) for name in (*always_on, *blocks) if name in outer for value in outer[name].parameters()}
        asleep.append([value for module in outer.values() for value in module.parameters() if id(value) not in awake])
    layers_of_period = [[block for block in blocks if isinstance(block, int)] for blocks in blocks_of_period]
    batches = token_batches(STEPS, rows=4, micro_batches=options.get("accumulation", 1))
    scales = options.get("scales", {})
    scale_of = {id(value): scales.get(name, 1.0) for name, module in outer.items() for value in module.parameters()}
    layers = list(model.get_submodule(layers_path))
    if options.get("lisa", {}).get("lisa_unit") == "module":
        linear = [one for layer in layers for one in layer.modules() if is_linear(one)]
        layers = [torch.nn.ParameterList([one.weight]) for one in linear]
    return train_reference(
        model,
        layers,
        layers_of_period,
        INTERVAL,
        batches,
        lr=LR,
        weight_decay=DECAY,
        asleep_of_period=asleep,
        states=options.get("lisa", {}).get("lisa_state", "reset"),
        lr_scale=lambda parameter: scale_of.get(id(parameter), options.get("scales", {}).get("layers", 1.0)),
        factored=[
            value
            for name, module in (*outer.items(), ("embed", getattr(body, "wpe", None)))
            if f"{name}=factored" in options.get("lisa", {}).get("lisa_state_bits", "") and module is not None
            for value in module.parameters()
        ],
    )


def check_against_reference(ds_config: str, build, layers_path: str, options: dict, world_size: int = 2) -> dict:
    outcome = run_ranks(train_and_check, world_size, ds_config, build, torch.float32, options)[0]
    reference = reference_losses(build, layers_path, outcome["layers_of_period"], options)
    within = 1e-5 if world_size == 2 else 2e-5  # of four ranks' sums the order makes 1.4e-5, by the processor
    assert outcome["losses"] == pytest.approx(reference, abs=within)
    assert len(set(outcome["layers_of_period"])) > 1 or options["lisa"]["lisa_activated_layers"] == 0, "needs a switch"
    return outcome


@pytest.mark.parametrize("ds_config", STAGES)
def test_losses_equal_the_reference(ds_config):
    check_against_reference(ds_config, tiny_llama, "model.layers", {})


@pytest.mark.parametrize(
    ("ds_config", "settings"),
    [
        ("zero2", {"lisa_sampler": "reshuffle", "lisa_always_on": "head,rest", "lisa_frozen": "embed"}),
        ("zero3", {"lisa_sampler": "balanced"}),
        full("zero1", {"lisa_sampler": "weighted"}),
        full("zero2", {"lisa_sampler": "adaptive"}),
    ],
)
def test_whichever_layers_a_sampler_draws(ds_config, settings, tmp_path):
    if settings["lisa_sampler"] in ("weighted", "balanced"):
        (tmp_path / "weights.json").write_text("[1, 4, 9, 16, 25, 36]", encoding="utf-8")
        settings = settings | {"lisa_weights_file": str(tmp_path / "weights.json")}
    check_against_reference(ds_config, tiny_llama, "model.layers", {"lisa": settings})


@pytest.mark.parametrize(
    ("ds_config", "build", "layers_path", "settings"),
    [
        ("zero2", tiny_llama, "model.layers", {"lisa_state": "keep"}),
        ("zero3", tiny_llama, "model.layers", {"lisa_sampler": "adaptive"}),
        full("zero1", tiny_gpt2, "transformer.h", {"lisa_sampler": "adaptive", "lisa_budget": "25%"}),
        full("zero2_offload", tiny_llama, "model.layers", {"lisa_offload": "layers"}),
        full("zero3_offload", tiny_llama, "model.layers", {"lisa_sampler": "adaptive"}),
    ],
)
def test_modules_are_sampled_by_themselves(ds_config, build, layers_path, settings):
    """As many as the budget is enough for; norms and biases, which are of no module, train in every step."""
    settings = {"lisa_unit": "module", "lisa_budget": "8%"} | settings
    outcome = check_against_reference(ds_config, build, layers_path, {"lisa": settings})
    assert len(outcome["visits"]) == sum(is_linear(one) for one in build().get_submodule(layers_path).modules())
    assert len({len(modules) for modules in outcome["layers_of_period"]}) > 1, "the test needs periods of two sizes"


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


@pytest.mark.parametrize(
    ("ds_config", "settings"),
    [("zero3", {}), full("zero2", {"lisa_always_on": "head,rest", "lisa_frozen": "embed"})],
)
def test_what_is_always_on_trains_alone(ds_config, settings):
    """Whatever is said of layers that are never drawn."""
    settings = settings | {"lisa_state": "keep", "lisa_sampler": "adaptive"}
    options = {"lisa": settings | {"lisa_activated_layers": 0}}
    outcome = check_against_reference(ds_config, tiny_llama, "model.layers", options)
    assert outcome["visits"] == [0] * 6


@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_one_layer_at_a_time_and_nothing_beside_it(ds_config):
    """BAdam's schedule: the backward pass ends at the one layer that trains."""
    settings = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_activated_layers": 1}
    options = {"lisa": settings | {"lisa_sampler": "reshuffle"}, "checkpointing": ds_config == "zero3"}
    outcome = check_against_reference(ds_config, tiny_llama, "model.layers", options)
    assert sorted(outcome["visits"]) == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ds_config", "options"),
    [
        ("zero2", {}),
        ("zero3", {}),
        full("zero1", {"optim": "lisa_adamw", "accumulation": 2}),
        full("zero2_offload", {}),
        full("zero2", {"lisa": {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.4,head=0.4"}}),
    ],
)
def test_each_block_has_its_own_rate(ds_config, options):
    """The rest's, which no scale names, is the schedule's."""
    scales = {"embed": 0.5, "head": 0.25, "layers": 2.0}
    given = ",".join(f"{name}={scale}" for name, scale in scales.items())
    options = options | {"scales": scales, "lisa": {"lisa_lr_scale": given} | options.get("lisa", {})}
    check_against_reference(ds_config, tiny_llama, "model.layers", options)


LISA_ADAMW = {"optim": "lisa_adamw"}


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "options",
    [
        LISA_ADAMW,
        LISA_ADAMW | {"accumulation": 2, "checkpointing": True, "lisa": {"lisa_state": "keep"}},
        full(LISA_ADAMW | {"lisa": {"lisa_offload": "embed,layers"}}),
    ],
    ids=["plain", "keep", "host"],
)
def test_lisa_adamw_equals_the_reference(ds_config, options):
    check_against_reference(ds_config, tiny_llama, "model.layers", options)


BOTH_FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
FACTORED = LISA_ADAMW | {"lisa": BOTH_FACTORED}
SAMPLED_OUTER = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.3,head=0.4", "lisa_seed": 2}
SAMPLED_OUTER |= {"lisa_activated_layers": 1}


@pytest.mark.parametrize(
    ("ds_config", "world_size", "options"),
    [
        full("zero1", 1, FACTORED),
        ("zero2", 2, FACTORED | {"accumulation": 2}),
        ("zero2", 4, LISA_ADAMW | {"lisa": {"lisa_state_bits": "head=factored,layers=32"}}),
        full("zero3", 4, FACTORED),
        ("zero3", 2, LISA_ADAMW | {"lisa": BOTH_FACTORED | SAMPLED_OUTER}),
    ],
)
def test_factored_moments_equal_the_reference(ds_config, world_size, options):
    """Rows are cut between ranks; sampled embeddings come and go."""
    build = functools.partial(tiny_llama, vocab_size=131)
    check_against_reference(ds_config, build, "model.layers", options, world_size)


@pytest.mark.parametrize(("ds_config", "world_size"), [("zero2", 2), full("zero3", 4)])
def test_factored_moments_of_a_tied_matrix(ds_config, world_size):
    """GPT-2's positions are a second matrix of the block."""
    check_against_reference(ds_config, tiny_gpt2, "transformer.h", FACTORED, world_size)


@pytest.mark.parametrize(
    ("ds_config", "master"), [("zero2", "bf16_sr"), full("zero3", "bf16_sr"), full("zero3", "fp32")]
)
def test_factored_moments_in_bf16(ds_config, master):
    options = LISA_ADAMW | {"lisa": BOTH_FACTORED | {"lisa_master": master}}
    outcome = run_ranks(train_and_check, 2, ds_config, tiny_llama, torch.bfloat16, options)[0]
    reference = reference_losses(tiny_llama, "model.layers", outcome["layers_of_period"], options)
    assert outcome["losses"] == pytest.approx(reference, abs=0.02)


@functools.cache
def bf16_losses() -> list[float]:
    return run_ranks(train_and_check, 2, "zero2", tiny_llama, torch.bfloat16, {})[0]["losses"]


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "settings",
    [
        full({}),
        {"lisa_master": "bf16_sr"},
        {"lisa_master": "bf16_sr", "lisa_state_bits": "embed=8,head=8,layers=8", "lisa_state": "keep"},
    ],
    ids=["fp32", "bf16_sr", "bf16_sr, 8 bits"],
)
def test_lisa_adamw_in_bf16(ds_config, settings):
    """As near to fp32 as bf16 is; what sleeps is bit-identical and ranks agree, as in every run here."""
    options = LISA_ADAMW | {"lisa": settings}
    losses = run_ranks(train_and_check, 2, ds_config, tiny_llama, torch.bfloat16, options)[0]["losses"]
    assert losses == pytest.approx(bf16_losses(), abs=0.01)


@pytest.mark.parametrize("ds_config", [full("zero1"), "zero2", full("zero2_offload"), full("zero3_offload")])
def test_accumulation_and_checkpointing(ds_config):
    check_against_reference(ds_config, tiny_llama, "model.layers", {"accumulation": 2, "checkpointing": True})


@pytest.mark.parametrize("ds_config", stages("zero1", "zero3", among=("zero1", "zero2_offload", "zero3")))
def test_tied_embeddings_and_reset_all(ds_config):
    check_against_reference(ds_config, tiny_gpt2, "transformer.h", {"lisa": {"lisa_state": "reset_all"}})


@pytest.mark.parametrize("ds_config", stages("zero2", "zero3", among=("zero2", "zero2_offload", "zero3")))
def test_kept_states_come_back_when_a_layer_wakes(ds_config):
    """A layer goes on with the moments and the step count that it fell asleep with."""
    settings = {"lisa_state": "keep", "lisa_activated_layers": 3, "lisa_seed": 1}
    outcome = check_against_reference(ds_config, tiny_llama, "model.layers", {"lisa": settings})
    sets = [set(layers) for layers in outcome["layers_of_period"]]
    assert any(sets[late] & sets[early] - sets[late - 1] for early in range(2) for late in range(early + 2, 4))
    # Three layers of six at most sleep with states: 12 bytes an element, and a count for each group.
    layer = sum(parameter.numel() for parameter in tiny_llama().model.layers[0].parameters())
    seen = [len(set().union(*sets[: period + 1]) - sets[period]) for period in range(4)]
    for host_bytes, asleep in zip(outcome["host_bytes"], seen, strict=True):
        assert 12 * layer * asleep / 2 <= host_bytes <= 12 * layer * asleep / 2 + 100 * asleep


@pytest.mark.parametrize("ds_config", [full("zero2"), "zero3"])
def test_frozen_embedding_with_checkpointing(ds_config):
    settings = {"lisa_frozen": "embed", "lisa_always_on": "head,rest", "lisa_sampler": "reshuffle"}
    check_against_reference(ds_config, tiny_llama, "model.layers", {"checkpointing": True, "lisa": settings})


@pytest.mark.parametrize(
    ("ds_config", "checkpointing"),
    [
        full("zero2", True),
        ("zero3", True),
        ("zero2_offload", False),
        full("zero3_offload", False),
    ],
)
def test_embed_and_head_drawn_as_layers_are(ds_config, checkpointing):
    """Periods that train a layer, or the embedding, or the head, each alone: groups stay, and some are empty."""
    settings = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.3,head=0.4", "lisa_seed": 2}
    settings |= {"lisa_activated_layers": 1}
    options = {"checkpointing": checkpointing, "lisa": settings}
    outcome = check_against_reference(ds_config, tiny_llama, "model.layers", options)
    assert {"embed", "head"} < {block for blocks in outcome["layers_of_period"] for block in blocks}


@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_a_tied_embedding_drawn_as_one_block(ds_config):
    settings = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.5", "lisa_state": "reset_all"}
    outcome = check_against_reference(ds_config, tiny_tied_llama, "model.layers", {"lisa": settings})
    assert "embed" in {block for blocks in outcome["layers_of_period"] for block in blocks}


def tiny_tied_llama():
    return tiny_llama(tied=True)


@pytest.mark.parametrize(
    ("ds_config", "settings"),
    [
        ("zero2", {"lisa_offload": "embed,head"}),
        ("zero3", {"lisa_offload": "head,layers", "lisa_state": "keep"}),
        full("zero2_offload", {"lisa_offload": "embed", "lisa_state_bits": "layers=8"}),
    ],
)
def test_blocks_with_their_states_on_the_host(ds_config, settings):
    """They step as the others do, and nothing that DeepSpeed made on the device stays alive but their own masters."""
    outcomes = {
        offload: run_ranks(train_with_offload, 2, ds_config.removesuffix("_offload" if not offload else "-"), chosen)[0]
        for offload, chosen in ((True, settings), (False, settings | {"lisa_offload": ""}))
    }
    assert outcomes[True]["losses"] == outcomes[False]["losses"]
    # Without offload fp32 weights are their own masters.
    masters = outcomes[True]["masters_on_host"] if outcomes[True]["dtype"] == torch.float32 else 0
    for counted, within in (("live_bytes", 256), ("state_bytes", 0)):
        without = [nbytes + masters for nbytes in outcomes[False][counted]]
        assert outcomes[True][counted] == pytest.approx(without, abs=within), counted
    named = set(settings["lisa_offload"].split(","))
    assert outcomes[True]["on_host"] == {name for name in named if name != "layers"} | (
        {"slot0", "slot1"} if "layers" in named else set()
    )


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", ["zero2", "zero3", "zero2_offload"])
def test_a_norm_taken_in_chunks_is_the_norm(ds_config):
    accumulation = 2 if "offload" in ds_config else 1
    whole, chunks = (run_ranks(norms_of_steps, 2, ds_config, size, accumulation)[0] for size in (1 << 30, 300))
    if "offload" not in ds_config:
        plain = run_ranks(norms_of_steps, 2, ds_config, 1 << 30, accumulation, True)[0]
        assert whole["norms"] == plain["norms"], "DeepSpeed's own, to the bit, with one collective"
        assert whole["calls"] < plain["calls"]
    assert chunks["norms"] == pytest.approx(whole["norms"], rel=1e-6)
    assert chunks["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert chunks["most"] <= 300 < whole["most"]


def norms_of_steps(ds_config: str, chunk: int, accumulation: int, plain: bool = False) -> dict:
    """Norms, losses and collectives of some steps; `plain`: the norms are DeepSpeed's own."""
    defaults = gradients.NORM_CHUNK, gradients.CPU_NORM_CHUNK
    gradients.NORM_CHUNK = gradients.CPU_NORM_CHUNK = chunk
    with overrides.without(*(overrides.GRADIENT_NAMES if plain else ())):
        found = watch_norms(ds_config, accumulation)
    gradients.NORM_CHUNK, gradients.CPU_NORM_CHUNK = defaults
    return found


def watch_norms(ds_config: str, accumulation: int) -> dict:
    # Drawn blocks leave groups empty, of which rank 0 holds a placeholder and rank 1 nothing.
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_always_on="rest")
    settings = {"max_grad_norm": 0.1, "gradient_accumulation_steps": accumulation}
    engine, lisa = lisa_dist.initialize(tiny_llama(), ds_config, config, lr=LR, **settings)
    losses, norms, most, calls, all_reduce = [], [], 0, 0, dist.all_reduce
    vector_norm, tensor_norm = torch.linalg.vector_norm, torch.Tensor.norm

    def watch(norm):
        def watched(tensor, *args, **kwargs):
            nonlocal most
            most = max(most, tensor.numel() if tensor.dtype == torch.float64 else 0)
            return norm(tensor, *args, **kwargs)

        return watched

    def count(*args, **kwargs):
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    torch.linalg.vector_norm, torch.Tensor.norm, dist.all_reduce = watch(vector_norm), watch(tensor_norm), count
    for micro_batches in token_batches(2 * INTERVAL + 1, rows=4, micro_batches=accumulation):
        losses.append(train_step(engine, lisa, micro_batches))
        norms.append(float(engine.get_global_grad_norm()))
    torch.linalg.vector_norm, torch.Tensor.norm, dist.all_reduce = vector_norm, tensor_norm, all_reduce
    engine.destroy()
    return {"losses": losses, "norms": norms, "most": most, "calls": calls}


@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_norms_under_model_parallelism_count_the_parts_of_other_ranks(ds_config):
    plain, own = (run_ranks(norms_of_parts, 2, ds_config, plain) for plain in (True, False))
    assert own == plain, "there DeepSpeed takes its own"
    assert own[0] == own[1], "each rank has gradients of its own rows, and both know the norm of all"


class TwoParts:
    """An mpu as Megatron has it: two ranks with a part of the model each."""

    def __init__(self):
        self._alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self):
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self):
        return self._alone


def norms_of_parts(ds_config: str, plain: bool) -> list[float]:
    with overrides.without(*(overrides.GRADIENT_NAMES if plain else ())):
        return norms_under_model_parallelism(ds_config)


def norms_under_model_parallelism(ds_config: str) -> list[float]:
    model = tiny_llama()
    for parameter in model.model.layers.parameters():
        parameter.model_parallel = parameter.ndim > 1  # so Megatron marks what is one rank's part
    lisa = lisa_dist.LisaController(model, lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL))
    optimizer = lisa_dist.build_optimizer(lisa.param_groups(), lr=LR)
    config = lisa_dist.load_ds_config(ds_config, model=model)
    parts = TwoParts()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=parts)
    lisa.attach(engine)
    norms = []
    for micro_batches in token_batches(INTERVAL + 2, rows=4):
        train_step(engine, lisa, micro_batches)
        norms.append(float(engine.get_global_grad_norm()))
    lisa.close()
    engine.destroy()
    dist.destroy_process_group(parts.get_data_parallel_group())
    deepspeed.utils.groups.mpu = None  # which DeepSpeed would keep for the engines of other tests
    return norms


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@without_collection()
def train_with_offload(ds_config: str, settings: dict) -> dict:
    gc.collect()
    of_others = live_tensor_bytes()  # what other tests in this process have left
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, **settings)
    # On CPU, what is kept of fp32 weights is a view of them.
    dtype = torch.bfloat16 if config.lisa_state == "keep" else torch.float32
    model, optim = tiny_llama().to(dtype), "adamw_torch"
    engine, lisa = lisa_dist.initialize(
        model, ds_config, config, lr=LR, weight_decay=DECAY, max_grad_norm=0.1, optim=optim
    )
    losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(STEPS, rows=4)]
    lisa.close()
    weights = {storage_of(lisa.partitions.local_weights(value)) for value in engine.module.parameters()}
    hosted = [group.get("lisa_host", False) for group in engine.optimizer.param_groups]
    masters_on_host = 0
    for key, is_hosted in zip(lisa.partitions.keys(), hosted, strict=True):
        if key and is_hosted:  # on CPU the host is the device, but a copy it must be
            master = lisa.partition_states()[key].master
            assert storage_of(master) not in weights
            masters_on_host += master.nbytes
    replaced = vars(engine.optimizer).keys() & {"_get_preflattened_grad_partition", "_prepare_fp32_grad_for_sub_group"}
    assert any(hosted) == bool(settings["lisa_offload"]) == bool(replaced)
    on_host = {group["lisa_group"].split("/")[0] for group in engine.optimizer.param_groups if group.get("lisa_host")}
    engine.destroy()
    return {
        "losses": losses,
        "live_bytes": [record.live_bytes - of_others for record in lisa.records],
        "state_bytes": [record.state_bytes_per_rank for record in lisa.records],
        "on_host": on_host,
        "masters_on_host": masters_on_host,
        "dtype": dtype,
    }


@pytest.mark.full
def test_four_ranks_and_one_give_the_same_losses_as_two():
    two = check_against_reference("zero3", tiny_llama, "model.layers", {})
    for world_size in (4, 1):
        other = check_against_reference("zero3", tiny_llama, "model.layers", {}, world_size)
        assert other["losses"] == pytest.approx(two["losses"], abs=1e-5)
        assert other["layers_of_period"] == two["layers_of_period"]


@pytest.mark.parametrize("ds_config", ["zero1", "zero2_offload", "zero3"])
def test_bf16_sleeps_moves_and_agrees(ds_config):
    """Invariants 1 to 4 in bf16, and losses near the fp32 reference's."""
    outcome = run_ranks(train_and_check, 2, ds_config, tiny_llama, torch.bfloat16, {})[0]
    reference = reference_losses(tiny_llama, "model.layers", outcome["layers_of_period"], {})
    assert outcome["losses"] == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_8bit_states_take_effect(ds_config):
    outcome = run_ranks(train_and_check_8bit, 2, ds_config)[0]
    reference = reference_losses(tiny_llama, "model.layers", outcome["layers_of_period"], {})
    assert outcome["losses"] == pytest.approx(reference, abs=5e-3)
    assert outcome["losses"] != pytest.approx(reference, abs=1e-7), "as exact as 32 bits: was it 8-bit at all?"
    assert outcome["dtypes"] == {torch.uint8}


def train_and_check_8bit(ds_config: str) -> dict:
    engine, lisa = lisa_dist.initialize(
        tiny_llama(),
        ds_config,
        lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL),
        lr=LR,
        weight_decay=DECAY,
        optim="adamw_8bit",
    )
    losses, sets = [], []
    for micro_batches in token_batches(STEPS, rows=4):
        losses.append(train_step(engine, lisa, micro_batches))
        sets.append(lisa.active_layers)
    # Partitions of less than 4096 elements stay at 32 bits.
    large = [state for state in lisa.partition_states().values() if state.numel >= 4096]
    dtypes = {state.optimizer_state["state1"].dtype for state in large}
    engine.destroy()
    return {"losses": losses, "layers_of_period": sets[::INTERVAL], "dtypes": dtypes}


@pytest.mark.parametrize("ds_config", ["zero2", full("zero3")])
def test_bits_of_the_moments_by_block(ds_config):
    outcome = run_ranks(train_and_check_bits, 2, ds_config)[0]
    reference = reference_losses(tiny_llama, "model.layers", outcome["layers_of_period"], {})
    assert outcome["losses"] == pytest.approx(reference, abs=5e-3)
    dtypes = outcome["dtypes"]
    assert dtypes.pop("model.layers") == dtypes.pop("lm_head") == {torch.float32}
    assert dtypes == {"model.embed_tokens": {torch.uint8}}


def train_and_check_bits(ds_config: str) -> dict:
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_state_bits="embed=8, head=32")
    engine, lisa = lisa_dist.initialize(tiny_llama(), ds_config, config, lr=LR, weight_decay=DECAY)
    losses, sets = [], []
    for micro_batches in token_batches(STEPS, rows=4):
        losses.append(train_step(engine, lisa, micro_batches))
        sets.append(lisa.active_layers)
    dtypes: dict[str, set] = {}
    for key, state in lisa.partition_states().items():
        if state.numel >= 4096:  # smaller ones stay at 32 bits
            block = next(name for name in ("model.embed_tokens", "lm_head", "model.layers") if key[0].startswith(name))
            dtypes.setdefault(block, set()).add(state.optimizer_state["state1"].dtype)
    engine.destroy()
    return {"losses": losses, "layers_of_period": sets[::INTERVAL], "dtypes": dtypes}


@without_collection()
def live_bytes_over_switches(ds_config: str, dtype: torch.dtype) -> dict:
    """Fifty switches, one step each, and what the run's own records say of each."""
    engine, lisa = lisa_dist.initialize(
        tiny_llama().to(dtype), ds_config, lisa_dist.LisaConfig(lisa_interval_steps=1), lr=LR, weight_decay=DECAY
    )
    for micro_batches in token_batches(51, rows=4):
        train_step(engine, lisa, micro_batches)
    lisa.close()
    engine.destroy()
    return {
        "live": [record.live_bytes for record in lisa.records],
        "states": [record.state_bytes_per_rank for record in lisa.records],
        "changes": sum(a.layers != b.layers for a, b in zip(lisa.records, lisa.records[1:], strict=False)),
    }


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [("zero2", torch.float32), ("zero3", torch.bfloat16)],
)
def test_live_bytes_are_flat_over_fifty_switches(ds_config, dtype):
    for outcome in run_ranks(live_bytes_over_switches, 2, ds_config, dtype):
        assert len(outcome["live"]) == 51
        assert outcome["changes"] > 40
        assert len(set(outcome["states"])) == 1
        # A scalar of a collective may still be held by gloo's thread when we look; nothing else comes or goes.
        assert max(outcome["live"]) - min(outcome["live"]) <= 64, outcome["live"]


@without_collection()
def peaks_of_switches(ds_config: str, dtype: torch.dtype) -> list[int]:
    """Bytes that each of three switches holds at its peak beyond the new masters; no layer stays active in them."""
    config = lisa_dist.LisaConfig(lisa_interval_steps=2, lisa_sampler="reshuffle")
    engine, lisa = lisa_dist.initialize(tiny_llama(num_layers=8).to(dtype), ds_config, config, lr=LR)
    peaks = []
    for step, micro_batches in enumerate(token_batches(7, rows=4)):
        switches = step > 0 and step % 2 == 0
        if switches:
            gc.collect()
            tracker = AllocationTracker()
            tracker.add(torch.empty(0, dtype=torch.uint8).set_(storage) for storage in live_storages())
            before = tracker.now
            tracker.begin_phase()
            with tracker:
                assert lisa.on_step_begin()
        train_step(engine, lisa, micro_batches)
        if switches:
            masters = sum(state.master.nbytes for state in lisa.partition_states().values())
            peaks.append(tracker.peak - before - masters)
    engine.destroy()
    return peaks


@pytest.mark.parametrize(
    ("ds_config", "dtype"), [full("zero1", torch.bfloat16), ("zero2", torch.float32), ("zero3", torch.bfloat16)]
)
def test_a_switch_holds_the_new_masters_beside_the_old_states_and_little_else(ds_config, dtype):
    """The states of layers that are frozen are gone by then, which are three times their masters."""
    for peaks in run_ranks(peaks_of_switches, 2, ds_config, dtype):
        # The least of them: gloo's thread may hold the buffer of a finished collective until it next runs.
        assert len(peaks) == 3
        assert min(peaks) <= 8192, peaks


def full_training(ds_config: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Train every parameter by DeepSpeed alone: its own engine and groups, no controller."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = tiny_llama().to(dtype)
    modules = [model.model.embed_tokens, model.lm_head, model.model.norm, *model.model.layers]
    groups = []
    for module in modules:
        matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in module.parameters() if parameter.ndim == 1]
        groups += [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adamw = DeepSpeedCPUAdam if "offload" in ds_config else torch.optim.AdamW
    optimizer = adamw([group for group in groups if group["params"]], lr=LR)
    config = lisa_dist.load_ds_config(ds_config, model=model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for micro_batches in token_batches(5, rows=4):
        train_step(engine, None, micro_batches)
    weights = full_weights(engine)
    engine.destroy()
    return weights


def lisa_with_all_layers(ds_config: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Train by LISA with gamma = all layers, and rebuild the partitions in every period all the same."""
    config = lisa_dist.LisaConfig(lisa_activated_layers=6, lisa_interval_steps=INTERVAL)
    engine, lisa = lisa_dist.initialize(tiny_llama().to(dtype), ds_config, config, lr=LR, weight_decay=DECAY)
    for step, micro_batches in enumerate(token_batches(5, rows=4)):
        if step > 0 and step % 2 == 0:
            # The same set goes on as it is; what a rebuild would do to it is what we want to see.
            params = [group["params"] for group in lisa.param_groups()]
            lisa.partitions.repartition(params, lisa.partition_states(), lisa.host_states.copies)
        train_step(engine, lisa, micro_batches)
    weights = full_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [*((name, torch.float32) for name in STAGES), full("zero3_offload", torch.bfloat16)],
)
def test_gamma_of_all_layers_is_full_training(ds_config, dtype):
    """Bit for bit, though every period rebuilds the partitions: what goes on goes on untouched."""
    full = run_ranks(full_training, 2, ds_config, dtype)[0]
    lisa = run_ranks(lisa_with_all_layers, 2, ds_config, dtype)[0]
    for name in full:
        assert torch.equal(full[name], lisa[name]), name
