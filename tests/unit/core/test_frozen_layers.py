"""Frozen layers in 8 or 4 bits: what trains is what trains over frozen layers that were rounded by bitsandbytes."""

import types
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as codes
from cases import full
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_gpt_oss, tiny_llama, tiny_qwen3_moe, token_batches
from ranks import run_ranks
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import write_weights
from lisa_dist.core import frozen_forms
from lisa_dist.core.blocks import Block, find_blocks
from lisa_dist.core.frozen_forms import quantized_bytes
from lisa_dist.core.frozen_layers import FrozenLayers
from lisa_dist.run.cpu_bf16 import multiply_in_fp32
from lisa_dist.zero.parameters import whole_weights

STEPS, INTERVAL = 8, 3

pytestmark = pytest.mark.usefixtures("cpu_ops")


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix as bitsandbytes gives it back."""
    if bits == 8:
        return codes.dequantize_blockwise(*codes.quantize_blockwise(weight, blocksize=256))
    return codes.dequantize_4bit(*codes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))


def start(build, ds_config, settings, optim="adamw_torch", seed=0):
    settings = {"lisa_interval_steps": INTERVAL, "lisa_debug": True} | settings
    model = build(seed=seed).to(torch.bfloat16)
    if settings.pop("in_fp32", False):
        multiply_in_fp32(model)
    if settings.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lisa_dist.initialize(
        model, ds_config, lisa_dist.LisaConfig.plain(**settings), lr=1e-3, weight_decay=0.1, optim=optim
    )


def frozen_layers(model, bits: int = 4, active: tuple | None = None) -> FrozenLayers:
    """In a model as it is, begun where `active` is given."""
    frozen = FrozenLayers(model, find_blocks(model), bits, "host", torch.device("cpu"))
    if active is not None:
        frozen.begin(active)
    return frozen


def bf16_llama(seed: int = 0):
    return tiny_llama(seed=seed).to(torch.bfloat16)


def is_quantized(name: str, value: torch.Tensor) -> bool:
    """By its name and shape: matrices and experts are, the gates and biases of a mixture are not."""
    return value.ndim > 1 and not any(word in name for word in ("router", "gate.weight", "_bias"))


def originals(engine) -> dict[str, torch.Tensor]:
    """All weights in 16 bits, wherever they are."""
    return {name: whole_weights(value).clone() for name, value in engine.module.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def train_quantized(build, ds_config, bits, settings, optim) -> dict:
    engine, lisa = start(build, ds_config, settings | {"lisa_frozen_bits": bits}, optim)
    loaded = originals(engine)
    losses, sets = [], []
    for micro_batches in token_batches(STEPS, rows=4):
        losses.append(train_step(engine, lisa, micro_batches))
        sets.append(lisa.active_layers)
    after, never = originals(engine), set(range(len(lisa.blocks.layers))).difference(*sets)
    assert never, "needs a layer that is never active"
    for layer in never:
        for name in lisa.blocks.layers[layer].parameters:
            assert torch.equal(after[name], loaded[name]), f"{name} was never active"
    quantized = {name for name, value in engine.module.named_parameters() if value.numel() == 0}
    inactive = {name for layer, block in enumerate(lisa.blocks.layers) for name in block.parameters
                if layer not in lisa.active_layers}  # fmt: skip
    assert quantized == {name for name in inactive if is_quantized(name, after[name])}
    lisa.close()
    engine.destroy()
    return {"losses": losses, "weights": after, "sets": sets}


def train_rounded(build, ds_config, bits, settings, optim) -> dict:
    """The same with frozen layers of 16 bits whose matrices are rounded between two switches."""
    engine, lisa = start(build, ds_config, settings | {"lisa_debug": False}, optim)
    kept: dict[str, torch.Tensor] = {}

    def restore() -> None:
        for name, value in engine.module.named_parameters():
            if name in kept:
                value.data.copy_(kept[name])
        kept.clear()

    losses = []
    for step, micro_batches in enumerate(token_batches(STEPS, rows=4)):
        if step % INTERVAL == 0:
            restore()
            lisa.on_step_begin()
            for layer, block in enumerate(lisa.blocks.layers):
                for name, value in block.parameters.items():
                    if layer not in lisa.active_layers and is_quantized(name, value):
                        kept[name] = value.detach().clone()
                        value.data.copy_(rounded(value.data, bits))
        losses.append(train_step(engine, lisa, micro_batches))
    restore()
    weights = full_weights(engine)
    lisa.close()
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize(
    ("ds_config", "world_size", "bits", "options"),
    [
        ("zero2", 2, 4, {}),
        ("zero1", 1, 8, {"settings": {"lisa_state": "keep", "lisa_activated_layers": 1}}),
        full("zero2_offload", 2, 8, {}),
        full("zero2", 2, 8, {"settings": {"lisa_offload": "layers"}}),
        full("zero2", 4, 4, {"build": tiny_gpt2}),
        full("zero2", 2, 4, {"settings": {"lisa_unit": "module", "lisa_budget": "8%"}}),
        # Biases of frozen matrices train as part of `rest`.
        ("zero2", 1, 8, {"build": tiny_gpt2, "settings": {"lisa_unit": "module", "lisa_budget": "8%"}}),
        full("zero1", 2, 4, {"build": tiny_gpt2, "settings": {"lisa_unit": "module", "lisa_budget": "8%"}}),
        full("zero2", 2, 4, {"settings": {"in_fp32": True, "checkpointing": True}}),
        full("zero2", 1, 4, {"optim": "lisa_adamw", "settings": {"lisa_master": "bf16_sr"}}),
        ("zero2", 2, 8, {"settings": {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.4,head=0.4"}}),
        ("zero2", 2, 4, {"build": tiny_gpt_oss, "settings": {"checkpointing": True}}),
        full("zero1", 2, 8, {"build": tiny_gpt_oss}),
        full("zero1", 1, 8, {"build": tiny_qwen3_moe, "settings": {"checkpointing": True}}),
        full("zero2", 2, 4, {"build": tiny_qwen3_moe, "settings": {"lisa_unit": "module", "lisa_budget": "15%"}}),
    ],
)
def test_frozen_layers_compute_as_rounded_ones(ds_config, world_size, bits, options):
    build, settings = options.get("build", tiny_llama), options.get("settings", {})
    arguments = build, ds_config, bits, settings, options.get("optim", "adamw_torch")
    quantized = run_ranks(train_quantized, world_size, *arguments)
    plain = run_ranks(train_rounded, world_size, *arguments)[0]
    for outcome in quantized:
        assert outcome["losses"] == plain["losses"]
        assert_equal(outcome["weights"], plain["weights"])
    assert len(set(quantized[0]["sets"])) > 1, "needs a switch"


def live_bytes_over_switches(bits: int, switches: int) -> list[int]:
    """Where each step begins with a switch."""
    engine, lisa = start(tiny_llama, "zero2", {"lisa_interval_steps": 1, "lisa_frozen_bits": bits, "lisa_debug": False})
    live = []
    (micro_batches,) = token_batches(1, rows=1)
    for _ in range(switches):
        train_step(engine, lisa, micro_batches)
        live.append(lisa.live_bytes())
    engine.destroy()
    return live


def test_live_bytes_are_flat_over_switches_and_fall_with_the_bits():
    by_bits = {bits: run_ranks(live_bytes_over_switches, 1, bits, 20 if bits == 4 else 5)[0] for bits in (16, 8, 4)}
    for live in by_bits.values():
        assert max(live[1:]) - min(live[1:]) <= 4096
    shapes = [value.shape for value in tiny_llama().model.layers[0].parameters() if value.ndim == 2]
    for bits in (8, 4):  # four layers of six are frozen
        saved = 4 * (quantized_bytes(shapes, 16) - quantized_bytes(shapes, bits))
        # From a process's first quantization on there is the table of 8-bit codes.
        assert by_bits[16][-1] - by_bits[bits][-1] == pytest.approx(saved, abs=1024 + 512)


def run(folder: str, build, settings: dict, resumes: bool) -> dict:
    """All steps, and a checkpoint after the fifth; or what that gives to a run with these settings."""
    engine, lisa = start(build, "zero2", settings, seed=99 if resumes else 0)
    checkpoint, losses, saved = Path(folder) / "checkpoint-5", [], []
    if resumes:
        load_checkpoint(lisa, checkpoint)
        saved = [originals(engine), lisa.active_layers]
    for micro_batches in token_batches(STEPS, rows=4)[engine.global_steps :]:
        losses.append(train_step(engine, lisa, micro_batches))
        if engine.global_steps == 5:
            save_checkpoint(lisa, checkpoint)
            saved = [originals(engine), lisa.active_layers]
    if not resumes:
        write_weights(engine, lisa.blocks, Path(folder), writes=dist.get_rank() == 0)
    found = {"losses": losses, "saved": saved[0], "layers": saved[1], "weights": originals(engine)}
    engine.destroy()
    return found


def frozen_as(bits: int, on_host: bool = False) -> dict:
    return {"lisa_frozen_bits": bits, "lisa_offload": "frozen" if on_host else ""}


@pytest.mark.parametrize(
    ("saved", "world_size", "resumed", "build"),
    [
        (frozen_as(4), 2, frozen_as(4), tiny_llama),
        full(frozen_as(8), 2, frozen_as(8), tiny_llama),
        (frozen_as(4), 1, frozen_as(4), tiny_llama),
        full(frozen_as(4), 2, frozen_as(16), tiny_llama),
        full(frozen_as(4), 1, frozen_as(8), tiny_llama),
        (frozen_as(4, on_host=True), 2, frozen_as(4), tiny_qwen3_moe),
        full(frozen_as(8), 1, frozen_as(8), tiny_qwen3_moe),
        full(frozen_as(4), 2, frozen_as(4, on_host=True), tiny_gpt_oss),
        full(frozen_as(16, on_host=True), 2, frozen_as(16), tiny_llama),
        full(frozen_as(16, on_host=True), 4, frozen_as(16, on_host=True), tiny_gpt_oss),
    ],
)
def test_a_run_resumes_and_files_have_the_originals(tmp_path, saved, world_size, resumed, build):
    """On the same ranks the run goes on to the bit; what other sums, or other bits, make of its weights is near."""
    whole = run_ranks(run, 2, str(tmp_path), build, saved, False)
    for rank, found in enumerate(run_ranks(run, world_size, str(tmp_path), build, resumed, True)):
        assert found["layers"] == whole[rank % 2]["layers"]
        assert_equal(found["saved"], whole[0]["saved"])
        is_same = (saved["lisa_frozen_bits"], 2) == (resumed["lisa_frozen_bits"], world_size)
        assert (found["losses"] == whole[0]["losses"][5:]) is is_same
        assert found["losses"] == pytest.approx(whole[0]["losses"][5:], abs=0.03)
        if is_same:
            assert_equal(found["weights"], whole[0]["weights"])
    build().config.save_pretrained(tmp_path)
    saved_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(dict(saved_model.named_parameters()), whole[0]["weights"])


def test_exact_forward_passes_and_saves_are_those_of_the_model(tmp_path):
    model, plain = (bf16_llama().requires_grad_(False) for _ in range(2))
    frozen = frozen_layers(model, active=(1,))
    tokens = token_batches(1, rows=2)[0, 0]
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, plain(tokens).logits)
        with frozen.exact():
            assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert not torch.equal(model(tokens).logits, plain(tokens).logits)
    assert_equal(model.state_dict(), plain.state_dict())
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_equal(dict(saved.named_parameters()), dict(plain.named_parameters()))


def tiny_mamba():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 64}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).to(torch.bfloat16)


def test_a_matrix_that_is_read_elsewhere_stays_in_16_bits():
    """Mamba multiplies with one of its own, so that a quantized one would be of no elements."""
    model = tiny_mamba()
    frozen_layers(model.requires_grad_(False), active=())
    empty = [name for name, value in model.named_parameters() if not value.numel()]
    assert empty == [f"backbone.layers.{layer}.mixer.in_proj.weight" for layer in range(2)]
    assert model(token_batches(1, rows=1)[0, 0]).logits.isfinite().all()


def test_a_header_says_how_much_of_the_layers_is_held():
    llama, mamba = tiny_llama().to(torch.bfloat16), tiny_mamba()
    llama.model.layers[0].mlp.gate_proj.float()  # as the gate of a mixture's experts may be
    texts = [frozen_layers(one).describe() for one in (llama, mamba)]
    quantized = sum(
        value.nbytes for value in llama.model.layers.parameters() if value.ndim == 2 and value.itemsize == 2
    )
    share = quantized / sum(value.nbytes for value in llama.model.layers.parameters())
    assert texts[0].startswith(f"{share:.0%} of their bytes in 4 bits; originals")
    assert "warning" not in texts[0]
    assert texts[1].endswith("warning: the rest, which other code reads than its own module's, stays in 16 bits")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gradient_is_that_of_the_rounded_matrix(kind, monkeypatch):
    made, reference = (
        (torch.nn.Linear(64, 128) if kind == "linear" else Conv1D(128, 64)).to(torch.bfloat16) for _ in range(2)
    )
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([made.requires_grad_(False)])
    reference.load_state_dict(made.state_dict())
    reference.weight.data.copy_(rounded(reference.weight.data, 4))

    block = Block("layers.0", {f"layers.0.{name}": value for name, value in made.named_parameters()})
    blocks = types.SimpleNamespace(layers=[block])
    monkeypatch.delattr(codes, "get_4bit_type")  # a table for each matrix, whose copy to a GPU would be waited for
    frozen = FrozenLayers(model, blocks, 4, "host", torch.device("cpu"))
    frozen.begin([])
    assert sum(one.nbytes for one in frozen.quantized[0].tensors) == quantized_bytes([(64, 128)], 4)
    inputs = [torch.randn(3, 5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    outputs = [module(one.requires_grad_()) for module, one in zip((made, reference), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_a_store_is_pinned_when_the_weights_have_gone(monkeypatch):
    """Pinning takes all of its memory, for which a host may have no room beside the model."""
    model, left = bf16_llama(), []
    frozen = frozen_layers(model)
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    monkeypatch.setattr(frozen.store, "pin", lambda: left.append(sum(weight.numel() > 0 for weight in weights)))
    frozen.begin([0])
    assert left == [1], "the active layer's alone"


def hold_other_weights(bits: int) -> list:
    """Ranks whose models have other weights: all hold rank 0's, as DeepSpeed's broadcast has it."""
    frozen = frozen_layers(bf16_llama(seed=dist.get_rank()), bits, active=())
    made = frozen.quantized[0].whole().float().sum().item()
    dist.barrier()
    return [made, frozen.quantized[0].original.float().sum().item()]


def test_all_ranks_hold_the_weights_of_rank_0():
    one, two = run_ranks(hold_other_weights, 2, 8)
    assert one == two
    expected = bf16_llama().model.layers[0].self_attn.q_proj.weight
    assert one[1] == expected.float().sum().item()


def load_before_attach() -> dict:
    """A state of other layers than period 0's, given to a controller that has no engine yet."""
    lisa = lisa_dist.LisaController(bf16_llama(), lisa_dist.LisaConfig.plain(lisa_frozen_bits=4))
    state = lisa.state_dict() | {"active_layers": [layer for layer in range(6) if layer not in lisa.active_layers][:2]}
    lisa.load_state_dict(state)
    weights = [list(block.parameters.values()) for block in lisa.blocks.layers]
    quantized = [layer for layer, of_layer in enumerate(weights) if any(not weight.numel() for weight in of_layer)]
    return {"active": lisa.active_layers, "quantized": quantized}


def test_a_state_that_is_loaded_before_attach_moves_held_layers():
    outcome = run_ranks(load_before_attach, 1)[0]
    assert sorted([*outcome["active"], *outcome["quantized"]]) == list(range(6))


# Bad input


def test_a_model_that_is_held_can_be_trained_by_no_other():
    model = bf16_llama()
    frozen_layers(model, active=(0,))
    with pytest.raises(ValueError, match=r"are quantized by an earlier run .*: load the model anew"):
        lisa_dist.LisaController(model, lisa_dist.LisaConfig.plain())
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen layers are quantized by a LISA run: load it anew"):
        model(token_batches(1, rows=1)[0, 0])


def test_kernels_of_the_hub_are_switched_off():
    pytest.importorskip("kernels", reason="transformers needs it from 5.25 on")
    model = bf16_llama()
    model.set_use_kernels(True)
    frozen_layers(model, active=(0,))
    assert not model.use_kernels


def no_kernel(*args, **kwargs):
    raise RuntimeError("no kernel\nfor this device")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("fp32", "are in float32: what is frozen is 16 bits wide; give --bf16 true"),
        ("no matrices", "have no weights that could be"),
        ("no kernel", r"bitsandbytes cannot quantize on cpu here \(no kernel for this device\)"),
        (
            "fused experts",
            "with experts_implementation sonicmoe: its kernel reads the weights by itself; give one",
        ),
        ("too many", r"a tensor of experts has \d+ elements, and bitsandbytes counts to 4096; give fp8"),
    ],
)
def test_what_cannot_be_held_is_refused(monkeypatch, change, said):
    model = tiny_llama() if change == "fp32" else bf16_llama()
    if change == "fused experts":
        model = tiny_qwen3_moe().to(torch.bfloat16)
        model.config._experts_implementation_internal = "sonicmoe"
    if change == "too many":
        monkeypatch.setattr(frozen_forms, "_LARGEST", 4096)
    blocks = find_blocks(model)
    if change == "no matrices":
        for layer in blocks.layers:
            layer.parameters = {name: value for name, value in layer.parameters.items() if value.ndim == 1}
    if change == "no kernel":
        monkeypatch.setattr(torch.ops.bitsandbytes, "quantize_4bit", no_kernel)
    with pytest.raises(ValueError, match=said):
        FrozenLayers(model, blocks, 4, "host", torch.device("cpu"))


@pytest.mark.parametrize("form", [8, 4, "fp8"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 65), (1, 1, 3)])
def test_rows_may_be_no_multiple_of_a_block(shape, form):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    encoded = frozen_forms.quantize(value, form)
    assert sum(code.nbytes for code in encoded) == quantized_bytes([shape], form)
    found = frozen_forms.dequantize(encoded, form, value.shape, value.dtype)
    assert (found - value).norm() < (0.12 if form == 4 else 0.05) * value.norm()
    if form != "fp8":
        assert torch.equal(found, rounded(value, form))


def test_a_host_without_room_is_told_what_would_fit(tmp_path, monkeypatch):
    """Layers of 16 bits are copied from the host's memory alone. A model mapped from a file frees none of it."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=0))
    bf16_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    said = (
        r"cannot hold 0.4 MiB of layers there \(0.0 MiB of .* are free\); give --lisa_frozen_bits 4, which takes 0.1 M"
    )
    with pytest.raises(ValueError, match=said):
        FrozenLayers(model, find_blocks(model), 16, "host", torch.device("cpu"), streams=True)
    frozen_layers(bf16_llama())  # this one is in memory, which becomes free as the store is filled


def test_a_device_without_fp8_multiplies_in_16_bits(monkeypatch):
    monkeypatch.setattr("lisa_dist.core.frozen_layers.has_fp8", lambda device: False)
    model = bf16_llama()
    frozen = FrozenLayers(model, find_blocks(model), "fp8", "host", torch.device("cpu"))
    assert "in fp8, multiplied in 16 bits, which this device has no units for" in frozen.describe()
    frozen.begin(())
    assert frozen.quantized[0].fp8() == ()


def three_losses(build, first_has_all: bool) -> list:
    """Where the first rank alone has weights and buffers, or every rank its own."""

    def made(seed: int):
        model = build(seed=seed)
        return model.to("meta") if first_has_all and dist.get_rank() else model

    engine, lisa = start(made, "zero2", {"lisa_frozen_bits": 8})
    losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(3, rows=4)]
    engine.destroy()
    return losses


@pytest.mark.parametrize("build", [tiny_llama, full(tiny_gpt2), full(tiny_qwen3_moe)])
def test_the_first_rank_s_weights_are_enough(build):
    """GPT-2's embedding and head are one matrix."""
    assert run_ranks(three_losses, 2, build, True) == run_ranks(three_losses, 2, build, False)


@pytest.mark.parametrize(
    ("ds_config", "said"),
    [
        ("zero3", "--lisa_frozen_bits 4 on ZeRO stage 3: .* use --deepspeed zero2"),
        ("zero2", "with weights in fp32: .* give --bf16 true"),
    ],
)
def test_engines_that_cannot_hold_are_refused(ds_config, said):
    with pytest.raises(ValueError, match=said):
        lisa_dist.initialize(tiny_llama(), ds_config, lisa_dist.LisaConfig.plain(lisa_frozen_bits=4))
