"""LisaAdamW by itself, and in DeepSpeed on CPU ranks: the same bits wherever partitions are cut."""

import copy
import itertools
import json
import re

import bitsandbytes
import deepspeed
import pytest
import torch
from cases import full, stages
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from engines import full_weights, train_step
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.config import UserError
from lisa_dist.core.live_bytes import AllocationTracker
from lisa_dist.ds_config import read_ds_config
from lisa_dist.kernels.adamw import CHUNK, chunk_bytes
from lisa_dist.kernels.dynamic_code import table_bytes
from lisa_dist.optim import adamw
from lisa_dist.optim.adamw import LisaAdamW, PartitionStep, decode_moment, with_blocks
from lisa_dist.optim.states import Piece
from lisa_dist.zero.layout import pieces_of_group
from lisa_dist.zero.parameters import local_weights

EIGHT_BITS = {"lisa_state_bits": "embed=8,head=8,layers=8"}
STOCHASTIC = {"lisa_master": "bf16_sr"}
PLAIN = ("zero1", "zero2", "zero3")
FORMS = {"fp32": {}, "fp32, 8 bits": EIGHT_BITS, "bf16_sr": STOCHASTIC, "bf16_sr, 8 bits": STOCHASTIC | EIGHT_BITS}


def parameters_of(dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 50), (50,), (1,), (0,), (7, 11, 13)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_fp32_is_torchs_adamw():
    """To 1e-6 over 50 steps, with a group of its own settings, one without any, and a learning rate that changes."""

    def train(kind) -> list[torch.Tensor]:
        parameters = parameters_of()
        own = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
        optimizer = kind([{"params": parameters[:2], **own}, {"params": parameters[2:]}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
        for step in range(50):
            set_gradients(parameters, step)
            optimizer.step()
            schedule.step()
        return parameters

    for mine, theirs in zip(train(LisaAdamW), train(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_made_and_restored_in_a_few_bytes(dtype):
    """Beside what stays: the first step, and a resume with other bits, take no copy of a moment."""
    numel = 2 * CHUNK + 100
    parameter = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
    parameter.grad = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    pieces = [Piece("a", 0, numel, 0)]
    optimizer = LisaAdamW([parameter], state_bits=8, betas=(0.9, 0.99))
    table_bytes()  # makes the tables, once

    def peak(function) -> int:
        tracker = AllocationTracker()
        tracker.add([parameter, parameter.grad, *moments.values()])
        before = tracker.now
        with tracker:
            function()
        return tracker.peak - before

    def check_codes() -> None:
        """Each moment by the table of its own: the second one has no sign, and codes of square roots."""
        state = optimizer.state[parameter]
        for (piece, blocks), (name, moment) in itertools.product(with_blocks(pieces), moments.items()):
            found = decode_moment(name, state[name], state[f"{name}_scales"][blocks], piece.start)
            assert (found - moment).norm() < 0.03 * moment.norm(), name

    gradient = parameter.grad.float()
    moments = {"exp_avg": 0.1 * gradient, "exp_avg_sq": 0.01 * gradient**2}
    beside = chunk_bytes(numel, quantized=True, stochastic=dtype == torch.bfloat16) + 20_000
    first = peak(optimizer.step)
    kept = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
    assert kept < first <= kept + beside
    check_codes()
    optimizer.state.clear()
    fields = {"step": 4} | moments
    assert peak(lambda: optimizer.restore(optimizer.param_groups[0], parameter, pieces, fields)) <= kept + beside
    check_codes()


def test_a_closure_is_called_and_parameters_without_a_gradient_stay():
    parameters = parameters_of()
    optimizer = LisaAdamW(parameters)
    before = copy.deepcopy(parameters[0])
    parameters[1].grad = torch.ones_like(parameters[1])
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(parameters[0], before)
    assert list(optimizer.state) == [parameters[1]]


@pytest.mark.parametrize("state_bits", [32, 8, "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_goes_on_bit_for_bit(tmp_path, state_bits, dtype):
    parameters = parameters_of(dtype)[: 1 if state_bits == "factored" else None]
    optimizer = LisaAdamW(parameters, lr=1e-2, state_bits=state_bits)
    for step in range(6):
        if step == 3:
            resumed = copy.deepcopy(parameters)
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        set_gradients(parameters, step)
        optimizer.step()
    another = LisaAdamW(resumed, lr=1.0, state_bits=state_bits)
    another.load_state_dict(torch.load(tmp_path / "state.pt"))
    dtypes = {value.dtype for value in another.state[resumed[0]].values() if isinstance(value, torch.Tensor)}
    assert dtypes == ({torch.uint8, torch.float32} if state_bits == 8 else {torch.float32})
    for step in range(3, 6):
        set_gradients(resumed, step)
        another.step()
    for mine, theirs in zip(parameters, resumed, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_where_partitions_are_cut(dtype):
    """Two parameters in one partition; cut at blocks of 256, between the parameters and within them."""
    sizes, weights = [("first", 1024), ("second", 2048)], torch.randn(3072, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn(4, 3072, generator=torch.Generator().manual_seed(1)).to(dtype)

    def train(ranks: int) -> torch.Tensor:
        results = []
        for rank, part in enumerate(weights.chunk(ranks)):
            partition, pieces = torch.nn.Parameter(part.to(dtype, copy=True)), pieces_of_group(sizes, 2, rank, ranks)
            optimizer = LisaAdamW([partition], lr=1e-2, state_bits=8, seed=4)
            for draw, gradient in enumerate(gradients):
                mine = gradient.chunk(ranks)[rank]
                cut = [mine[piece.offset : piece.offset + piece.length] for piece in pieces]
                optimizer.prepare(partition, PartitionStep(pieces, cut, gradient_scale=torch.tensor([0.5]), draw=draw))
                optimizer.step()
            results.append(partition.detach())
        return torch.cat(results)

    whole = train(1)
    assert not torch.equal(whole, weights.to(dtype))
    for ranks in (2, 3, 4, 12):
        assert torch.equal(train(ranks), whole), ranks


def test_the_weight_beside_a_master_is_written():
    master = torch.nn.Parameter(torch.randn(300))
    weight = torch.zeros(300, dtype=torch.bfloat16)
    optimizer = LisaAdamW([master])
    optimizer.prepare(master, PartitionStep([Piece("a", 0, 300, 0)], [torch.randn(100), torch.randn(200)], weight))
    with pytest.raises(AssertionError, match="gradients are cut where parameters are"):
        optimizer.step()
    optimizer = LisaAdamW([master])
    optimizer.prepare(master, PartitionStep([Piece("a", 0, 300, 0)], [torch.randn(300)], weight))
    optimizer.step()
    assert torch.equal(weight, master.detach().to(torch.bfloat16))


# Bad input


def test_gradients_that_are_not_finite_change_nothing():
    for bad in (float("nan"), float("inf"), -float("inf")):
        parameters = parameters_of(torch.bfloat16)
        optimizer = LisaAdamW(parameters, state_bits=8)
        for step in range(2):
            set_gradients(parameters, step)
            optimizer.step()
        before = copy.deepcopy((parameters, optimizer.state_dict()))
        parameters[-1].grad[3] = bad
        with pytest.raises(ValueError, match="expected finite gradients, got NaN or infinity; nothing was changed"):
            optimizer.step()
        for mine, theirs in zip(parameters, before[0], strict=True):
            assert torch.equal(mine, theirs)
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1]["state"][number][name])), name


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected 8 or 32 bits of the moments, or 'factored', got 16"):
        LisaAdamW(parameters_of(), state_bits=16)
    with pytest.raises(ValueError, match="expected 8 or 32 bits of the moments, or 'factored', got 4"):
        LisaAdamW([{"params": parameters_of(), "lisa_state_bits": 4}])
    for name, value in {"lr": -1.0, "eps": -1e-8, "weight_decay": float("nan"), "betas": (0.9, 1.0)}.items():
        with pytest.raises(ValueError, match=f"expected {name} .*, got {re.escape(str(value))}"):
            LisaAdamW(parameters_of(), **{name: value})
    transposed = torch.nn.Parameter(torch.randn(3, 5).T)
    transposed.grad = torch.zeros(5, 3)
    with pytest.raises(
        ValueError, match=r"expected parameter 0\.0 and its gradient to be contiguous, got strides \(1, 5\)"
    ):
        LisaAdamW([transposed]).step()
    whole, half = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    for one in (whole, half):
        one.grad = torch.ones_like(one)
    optimizer = LisaAdamW([whole, half])
    with pytest.raises(ValueError, match=r"0\.1: expected it in torch\.float32 or torch\.bfloat16, got torch\.float16"):
        optimizer.step()
    assert not whole.any(), "what was checked before is not stepped either"
    assert not optimizer.state
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizer = LisaAdamW([parameter])
    parameter.grad = torch.ones(8)
    optimizer.step()
    parameter.data = torch.zeros(6)
    parameter.grad = torch.ones(6)
    with pytest.raises(ValueError, match="expected 6 elements of exp_avg, as the partition has, got 8"):
        optimizer.step()
    assert not parameter.any()
    assert optimizer.state[parameter]["step"] == 1


# In DeepSpeed


def start(ds_config: str | dict, form: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **settings):
    """No clipping: the norm's last bits would depend on the cuts."""
    config = lisa_dist.LisaConfig(**{"lisa_interval_steps": 3} | FORMS[form] | settings)
    model = tiny_llama(seed=seed).to(dtype)
    options = {"lr": 1e-3, "weight_decay": 0.1, "optim": "lisa_adamw", "max_grad_norm": 0.0}
    return lisa_dist.initialize(model, ds_config, config, **options)


def train(engine, lisa, steps: range) -> None:
    for step in steps:
        forward_and_backward(engine, lisa, step)
        engine.step()


def forward_and_backward(engine, lisa, step: int) -> None:
    lisa.on_step_begin()
    rows = token_batches(8, rows=2)[step, 0]
    engine.backward(engine(input_ids=rows, labels=rows).loss)  # on each rank the same rows


def train_or_resume(ds_config: str, form: str, folder: str, resumes: bool) -> dict[str, torch.Tensor]:
    """The weights of a run of 8 steps that is saved after 5, or is resumed from there."""
    engine, lisa = start(ds_config, form, seed=9 if resumes else 0)
    if resumes:
        load_checkpoint(lisa, f"{folder}/checkpoint-5")
    else:
        train(engine, lisa, range(5))
        save_checkpoint(lisa, f"{folder}/checkpoint-5")
    train(engine, lisa, range(5, 8))
    weights = full_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_any_number_of_ranks_and_a_resume_on_another_give_the_same_bits(tmp_path):
    """Where no cut is within a block of 256, as in models that people train."""

    def run(ds_config: str, ranks: int, folder: str, resumes: bool = False) -> dict[str, torch.Tensor]:
        return run_ranks(train_or_resume, ranks, ds_config, "bf16_sr, 8 bits", str(tmp_path / folder), resumes)[-1]

    whole = run("zero2", 2, "first")
    runs = {
        "one rank": run("zero1", 1, "other"),
        "stage 3": run("zero3", 2, "third"),
        "resumed by one": run("zero2", 1, "first", resumes=True),
        "resumed on stage 3 by four": run("zero3", 4, "first", resumes=True),
        "resumed from stage 3": run("zero2", 2, "third", resumes=True),
    }
    initial = dict(tiny_llama().to(torch.bfloat16).named_parameters())
    for name, value in whole.items():
        assert not name.startswith("lm_head") or not torch.equal(value, initial[name])
        for run, weights in runs.items():
            assert torch.equal(weights[name], value), (run, name)


def held_by(tensors) -> dict[int, int]:
    """The storages of tensors, each once: where it is, and its bytes."""
    storages = [value.untyped_storage() for value in tensors if isinstance(value, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def count_bytes(ds_config: str, form: str, dtype: torch.dtype) -> list[float]:
    """Bytes an element of this rank's partitions: weights, states beside them, and states as they are reported."""
    engine, lisa = start(ds_config, form, dtype=dtype)
    train(engine, lisa, range(1))
    states = lisa.partition_states().values()
    active = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    weights = held_by(local_weights(parameter) for parameter in active)
    parts = held_by(part for state in states for part in (state.master, *state.optimizer_state.values()))
    own = [size for place, size in parts.items() if place not in weights]
    totals = sum(weights.values()), sum(own), sum(state.nbytes for state in states)
    numel = sum(state.numel for state in states)
    engine.destroy()
    return [total / numel for total in totals]


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", stages("zero2", "zero3", among=PLAIN))
@pytest.mark.parametrize(
    ("form", "dtype", "expected"),
    [
        full("fp32", torch.float32, 8),
        ("fp32", torch.bfloat16, 12),
        full("fp32, 8 bits", torch.bfloat16, 6),
        full("bf16_sr", torch.bfloat16, 8),
        ("bf16_sr, 8 bits", torch.bfloat16, 2),
    ],
)
def test_an_active_parameter_takes_what_it_should(ds_config, form, dtype, expected):
    """On stages 1 and 2 both ranks have all weights. What gradients take, test_estimate.py has."""
    for weights, total, counted in run_ranks(count_bytes, 2, ds_config, form, dtype):
        assert weights == pytest.approx((1 if ds_config == "zero3" else 2) * dtype.itemsize, rel=0.01)
        # Scales are 8 bytes for 256 elements; norms, 1% of this model, keep 32 bits.
        assert total == pytest.approx(counted, abs=0.001)
        assert expected <= total <= expected + (0.2 if "8 bits" in form else 0.001)


class _Copies(TorchDispatchMode):
    """Elements of every copy that is made outside of our kernels, but for the norm's, which are in fp64."""

    def __init__(self):
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        copies = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        if function in copies and made.dtype != torch.float64 and not made.is_meta:
            self.numels.append(made.numel())
        return made


def largest_copy_of_a_step(ds_config: str, form: str) -> tuple[int, int]:
    engine, lisa = start(ds_config, form)
    train(engine, lisa, range(1))
    forward_and_backward(engine, lisa, 1)
    with _Copies() as copies, pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "adamw_step", lambda tensors, numbers: None)
        engine.step()
    largest = max(state.numel for state in lisa.partition_states().values())
    engine.destroy()
    return max(copies.numels, default=0), largest


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("form", ["fp32", "bf16_sr, 8 bits"])
@pytest.mark.parametrize("ds_config", stages("zero2", "zero3", among=PLAIN))
def test_nothing_is_copied_before_or_behind_the_one_pass(ds_config, form):
    """No gradient is flattened or cast, no master copied to weights."""
    copied, largest = run_ranks(largest_copy_of_a_step, 1, ds_config, form)[0]
    assert copied < largest / 100


def spoil_a_step(ds_config: str, form: str) -> None:
    engine, lisa = start(ds_config, form, lisa_nonfinite="skip")
    train(engine, lisa, range(4))
    before = copy.deepcopy(lisa.partition_states())
    hook = engine.module.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    train(engine, lisa, range(4, 5))
    hook.remove()
    for key, state in lisa.partition_states().items():
        assert torch.equal(state.master, before[key].master)
        for name, value in state.optimizer_state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[key].optimizer_state[name])), (key, name)
    train(engine, lisa, range(5, 6))
    key = next(iter(before))
    assert lisa.partition_states()[key].optimizer_state["step"] == before[key].optimizer_state["step"] + 1
    engine.destroy()


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", [full("zero2"), "zero3"])
def test_a_step_that_deepspeed_skips_leaves_the_state(ds_config):
    run_ranks(spoil_a_step, 2, ds_config, "bf16_sr, 8 bits")


def losses_in_fp16(ds_config: str, optim: str) -> tuple[list[float], float]:
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # DeepSpeed takes no CPU for able
    try:
        config = read_ds_config(ds_config) | {"fp16": {"enabled": True, "initial_scale_power": 8}}
        engine, lisa = lisa_dist.initialize(
            tiny_llama().half(), config, lisa_dist.LisaConfig(lisa_interval_steps=2), lr=1e-3, optim=optim
        )
    finally:
        del accelerator.is_fp16_supported
    losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(5, rows=2)]
    scale = lisa.partitions.counters()["loss_scaler"]["cur_scale"]
    engine.destroy()
    return losses, scale


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize("ds_config", stages("zero2", among=PLAIN))
def test_the_loss_scale_of_fp16_is_folded_in(ds_config):
    expected, scale = run_ranks(losses_in_fp16, 1, ds_config, "adamw_torch")[0]
    assert scale == 256
    assert run_ranks(losses_in_fp16, 1, ds_config, "lisa_adamw")[0] == (pytest.approx(expected, abs=1e-4), scale)


def attach_by_hand(ds_config: str, optim: str, settings: dict, changes: dict) -> str:
    """What is said where engine and optimizer do not fit the settings."""
    model = tiny_llama().to(torch.bfloat16)
    lisa = lisa_dist.LisaController(model, lisa_dist.LisaConfig.plain(**settings))
    optimizer = lisa_dist.build_optimizer(lisa.param_groups(), optim, lr=1e-3)
    config = lisa_dist.load_ds_config(ds_config, model=model)
    for name, value in changes.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with pytest.raises(UserError) as error:
        lisa.attach(engine)
    engine.destroy()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed's, for the whole process
    return str(error.value)


NO_MASTERS = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("zero2", "lisa_adamw", STOCHASTIC, {}), "--lisa_master bf16_sr: the engine was built with masters"),
        (("zero3", "adamw_torch", STOCHASTIC, NO_MASTERS), "--lisa_master bf16_sr: the engine was built with masters"),
        (("zero2", "lisa_adamw", {}, NO_MASTERS), "--lisa_master fp32: the engine keeps no masters in fp32"),
        (
            ("zero2_offload", "lisa_adamw", {}, {"zero_force_ds_cpu_optimizer": False}),
            "the engine offloads optimizer states (offload_optimizer) and steps LisaAdamW",
        ),
        (
            ("zero2", "lisa_adamw", {}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
            'the DeepSpeed config has torch_autocast with "dtype": "float16"',
        ),
    ],
    ids=["masters", "another optimizer", "no masters", "offload", "scaler"],
)
def test_an_engine_that_does_not_fit_is_refused(arguments, said):
    assert run_ranks(attach_by_hand, 1, *arguments)[0].startswith(said)


def masterless_by_config() -> torch.dtype:
    config = {"bf16": {"enabled": True}, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    engine, lisa = start(config, "bf16_sr", dtype=torch.float32)
    train(engine, lisa, range(1))
    dtype = next(iter(lisa.partition_states().values())).master.dtype
    engine.destroy()
    return dtype


@pytest.mark.usefixtures("cpu_ops")
def test_the_deepspeed_config_says_the_precision():
    assert run_ranks(masterless_by_config, 1) == [torch.bfloat16]


@pytest.mark.full
def test_8_bit_moments_are_as_good_as_those_of_bitsandbytes(data_dir):
    """After 80 steps of a real model: how far the weights are from those of 32-bit moments."""
    path = data_dir / "models" / "stories260k-hf"
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [json.loads(line) for line in (data_dir / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]]
    tokens = [tokenizer(row["question"] + row["answer"]).input_ids[:64] for row in rows]
    batches = torch.tensor([one for one in tokens if len(one) == 64][:160]).view(40, 4, 64)

    def train_real(kind, **settings) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        optimizer = kind(list(model.parameters()), lr=1e-3, weight_decay=0.1, **settings)
        for rows in (*batches, *batches):
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.set_num_threads(1)
    exact = train_real(torch.optim.AdamW)
    theirs = train_real(bitsandbytes.optim.AdamW8bit, min_8bit_size=1)
    assert 0 < (train_real(LisaAdamW, state_bits=8) - exact).norm() < (theirs - exact).norm()
