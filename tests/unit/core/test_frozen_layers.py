"""Frozen layers in 8 or 4 bits: what trains is what trains over frozen layers that were rounded by bitsandbytes."""

import resource
import types
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as codes
from cells import full
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_llama, tiny_mixtral, token_batches
from ranks import run_ranks
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import write_weights
from lisa_dist.core.blocks import Block, find_blocks
from lisa_dist.core.frozen_layers import FrozenLayers, held_bytes
from lisa_dist.core.weight_store import WeightStore, available_memory, check_store
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
    settings = dict(settings)
    model = build(seed=seed).to(torch.bfloat16)
    if settings.pop("in_fp32", False):
        multiply_in_fp32(model)
    if settings.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lisa_dist.initialize(
        model, ds_config, lisa_dist.LisaConfig(**settings), lr=1e-3, weight_decay=0.1, optim=optim
    )


def originals(engine, lisa) -> dict[str, torch.Tensor]:
    """All weights in 16 bits, wherever they are."""
    return {name: whole_weights(value).clone() for name, value in engine.module.named_parameters()}


def train_held(build, ds_config, bits, settings, optim) -> dict:
    engine, lisa = start(build, ds_config, settings | {"lisa_frozen_bits": bits}, optim)
    loaded = originals(engine, lisa)
    losses, sets, live = [], [], []
    for micro_batches in token_batches(STEPS, rows=4):
        losses.append(train_step(engine, lisa, micro_batches))
        sets.append(lisa.active_layers)
        live.append(lisa.live_bytes())
    after, never = (
        originals(engine, lisa),
        set(range(len(lisa.blocks.layers))) - {layer for layers in sets for layer in layers},
    )
    assert never, "needs a layer that is never active"
    for layer in never:
        for name in lisa.blocks.layers[layer].parameters:
            assert torch.equal(after[name], loaded[name]), f"{name} was never active"
    held = {name for name, value in engine.module.named_parameters() if value.numel() == 0}
    inactive = {name for layer, block in enumerate(lisa.blocks.layers) for name in block.parameters
                if layer not in lisa.active_layers}  # fmt: skip
    assert held == {name for name in inactive if after[name].ndim == 2}
    lisa.close()
    engine.destroy()
    return {"losses": losses, "weights": after, "sets": sets, "live": live}


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
                    if layer not in lisa.active_layers and value.ndim == 2:
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
    ],
)
def test_frozen_layers_compute_as_rounded_ones(ds_config, world_size, bits, options):
    build, settings = options.get("build", tiny_llama), options.get("settings", {})
    arguments = build, ds_config, bits, settings, options.get("optim", "adamw_torch")
    held = run_ranks(train_held, world_size, *arguments)
    plain = run_ranks(train_rounded, world_size, *arguments)[0]
    for outcome in held:
        assert outcome["losses"] == plain["losses"]
        for name, value in plain["weights"].items():
            assert torch.equal(outcome["weights"][name], value), name
    assert len(set(held[0]["sets"])) > 1, "needs a switch"


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
    by_bits = {bits: run_ranks(live_bytes_over_switches, 1, bits, 100 if bits == 4 else 5)[0] for bits in (16, 8, 4)}
    for live in by_bits.values():
        assert max(live[1:]) - min(live[1:]) <= 4096
    numels = [value.numel() for value in tiny_llama().model.layers[0].parameters() if value.ndim == 2]
    for bits in (8, 4):  # four layers of six are frozen
        saved = 4 * (2 * sum(numels) - held_bytes(numels, bits))
        # From a process's first quantization on there is the table of 8-bit codes.
        assert by_bits[16][-1] - by_bits[bits][-1] == pytest.approx(saved, abs=1024 + 512)


def run_and_save(folder: str, bits: int) -> dict:
    engine, lisa = start(tiny_llama, "zero2", {"lisa_frozen_bits": bits})
    losses = []
    for step, micro_batches in enumerate(token_batches(STEPS, rows=4), 1):
        losses.append(train_step(engine, lisa, micro_batches))
        if step == 5:
            save_checkpoint(lisa, Path(folder) / "checkpoint-5")
    write_weights(engine, lisa.blocks, Path(folder), writes=dist.get_rank() == 0)
    weights = originals(engine, lisa)
    engine.destroy()
    return {"losses": losses, "weights": weights}


def resume(folder: str, bits: int) -> dict:
    engine, lisa = start(tiny_llama, "zero2", {"lisa_frozen_bits": bits}, seed=99)
    load_checkpoint(lisa, Path(folder) / "checkpoint-5")
    losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(STEPS, rows=4)[5:]]
    weights = originals(engine, lisa)
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("bits", [4, full(8)])
def test_a_resumed_run_is_the_run_and_files_have_the_originals(tmp_path, bits):
    whole = run_ranks(run_and_save, 2, str(tmp_path), bits)
    resumed = run_ranks(resume, 2, str(tmp_path), bits)
    for rank in (0, 1):
        assert resumed[rank]["losses"] == whole[rank]["losses"][5:]
        for name, value in whole[rank]["weights"].items():
            assert torch.equal(resumed[rank]["weights"][name], value), name
    tiny_llama().config.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in saved.named_parameters():
        assert torch.equal(value, whole[0]["weights"][name]), name


def load(folder: str, bits: int) -> dict:
    """What a checkpoint gives a run with these bits: the weights, and the losses of the steps after it."""
    engine, lisa = start(tiny_llama, "zero2", {"lisa_frozen_bits": bits}, seed=99)
    load_checkpoint(lisa, Path(folder) / "checkpoint-5")
    weights, layers = originals(engine, lisa), lisa.active_layers
    losses = [train_step(engine, lisa, micro_batches) for micro_batches in token_batches(STEPS, rows=4)[5:]]
    engine.destroy()
    return {"losses": losses, "weights": weights, "layers": layers}


@pytest.mark.parametrize(("world_size", "bits"), [(1, 4), full(2, 16), full(1, 8)])
def test_a_run_resumes_on_other_ranks_and_with_other_bits(tmp_path, world_size, bits):
    """The weights of the checkpoint to the bit; then what other sums, or other bits, make of them."""
    whole = run_ranks(run_and_save, 2, str(tmp_path), 4)[0]
    same, found = (run_ranks(load, ranks, str(tmp_path), of)[0] for ranks, of in ((2, 4), (world_size, bits)))
    assert same["losses"] == whole["losses"][5:]
    assert found["layers"] == same["layers"]
    for name, value in same["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    assert found["losses"] == pytest.approx(same["losses"], abs=0.03)
    assert (found["losses"] == same["losses"]) is False


def test_exact_forward_passes_and_saves_are_those_of_the_model(tmp_path):
    torch.manual_seed(0)
    model, plain = (tiny_llama().to(torch.bfloat16).requires_grad_(False) for _ in range(2))
    frozen = FrozenLayers(model, find_blocks(model), 4, "host", torch.device("cpu"))
    frozen.begin([1])
    tokens = token_batches(1, rows=2)[0, 0]
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, plain(tokens).logits)
        with frozen.exact():
            assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert not torch.equal(model(tokens).logits, plain(tokens).logits)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items()), "originals are saved"
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in saved.named_parameters():
        assert torch.equal(value, plain.get_parameter(name)), name


def test_a_matrix_that_is_read_elsewhere_stays_in_16_bits():
    """Mamba multiplies with one of its own, so that a held one would be of no elements."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).to(torch.bfloat16)
    frozen = FrozenLayers(model.requires_grad_(False), find_blocks(model), 4, "host", torch.device("cpu"))
    frozen.begin([])
    empty = [name for name, value in model.named_parameters() if not value.numel()]
    assert empty == [f"backbone.layers.{layer}.mixer.in_proj.weight" for layer in range(2)]
    assert model(token_batches(1, rows=1)[0, 0]).logits.isfinite().all()


def test_a_header_says_how_much_of_the_layers_is_held():
    llama, mixtral = (build().to(torch.bfloat16) for build in (tiny_llama, tiny_mixtral))
    llama.model.layers[0].mlp.gate_proj.float()  # as the gate of a mixture's experts may be
    texts = [FrozenLayers(one, find_blocks(one), 4, "host", torch.device("cpu")).describe() for one in (llama, mixtral)]
    held = sum(value.nbytes for value in llama.model.layers.parameters() if value.ndim == 2 and value.itemsize == 2)
    share = held / sum(value.nbytes for value in llama.model.layers.parameters())
    assert texts[0].startswith(f"{share:.0%} of their bytes in 4 bits; originals")
    assert "warning" not in texts[0]
    assert texts[1].endswith("warning: the rest stays in 16 bits, such as the experts of a mixture that are one tensor")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gradient_is_that_of_the_rounded_matrix(kind, monkeypatch):
    torch.manual_seed(0)
    made = torch.nn.Linear(64, 128) if kind == "linear" else Conv1D(128, 64)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([made.to(torch.bfloat16)])
    reference = torch.nn.Linear(64, 128) if kind == "linear" else Conv1D(128, 64)
    reference.to(torch.bfloat16).load_state_dict(made.state_dict())
    reference.weight.data.copy_(rounded(reference.weight.data, 4))
    made.requires_grad_(False)

    block = Block("layers.0", {f"layers.0.{name}": value for name, value in made.named_parameters()})
    blocks = types.SimpleNamespace(layers=[block])
    monkeypatch.delattr(codes, "get_4bit_type")  # a table for each matrix, whose copy to a GPU would be waited for
    frozen = FrozenLayers(model, blocks, 4, "host", torch.device("cpu"))
    frozen.begin([])
    assert sum(one.nbytes for one in frozen.held[0].tensors) == held_bytes([64 * 128], 4)
    inputs = [torch.randn(3, 5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    outputs = [module(one.requires_grad_()) for module, one in zip((made, reference), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


# The store


def share_a_store(place: str) -> list:
    like = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7)}
    store = WeightStore(like, place, torch.device("cpu"))
    store.write("a", torch.arange(15).view(3, 5))  # on the host's first rank alone
    store.write("b", torch.full((7,), dist.get_rank() + 1.0))
    dist.barrier()
    found = [store["a"].tolist(), store["b"].tolist(), store["a"].dtype]
    dist.barrier()
    return found


@pytest.mark.parametrize("where", ["host", "folder"])
def test_ranks_of_a_host_share_one_copy(tmp_path, where):
    found = run_ranks(share_a_store, 3, "host" if where == "host" else str(tmp_path))
    assert found == [[torch.arange(15.0).view(3, 5).tolist(), [1.0] * 7, torch.bfloat16]] * 3
    assert list(tmp_path.iterdir()) == [], "nothing stays behind"


def test_a_store_without_room_is_refused(small_disk, monkeypatch):
    folder, largest_file = small_disk
    like = {"a": torch.zeros(1 << 24, dtype=torch.bfloat16)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    with pytest.raises(ValueError, match=r"cannot hold 32.0 MiB of layers there \((No|File)"):
        WeightStore(like, str(folder), torch.device("cpu"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(ValueError, match="No such file or directory"):
        WeightStore(like, str(folder / "missing"), torch.device("cpu"))
    available = type("Memory", (), {"available": 1 << 20})
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    with pytest.raises(ValueError, match=r"--lisa_frozen_store host: .* \(1.0 MiB of its memory are free\)"):
        WeightStore(like, "host", torch.device("cpu"))
    WeightStore(like, "host", torch.device("cpu"), freed=1 << 25)


def test_what_a_container_has_read_of_files_is_free(tmp_path):
    """The kernel lets go of page cache where memory is wanted."""
    for name, text in {"max": "1000", "current": "900", "stat": "anon 250\ninactive_file 600\nfile 650"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert available_memory(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 1000


def test_a_store_is_pinned_when_the_weights_have_gone(monkeypatch):
    """Pinning takes all of its memory, for which a host may have no room beside the model."""
    model = tiny_llama().to(torch.bfloat16)
    frozen = FrozenLayers(model, find_blocks(model), 8, "host", torch.device("cpu"))
    left = []
    monkeypatch.setattr(
        frozen.store,
        "pin",
        lambda: left.append(sum(layer.mlp.up_proj.weight.numel() > 0 for layer in model.model.layers)),
    )
    frozen.begin([0])
    assert left == [1], "the active layer's alone"

    pinned = []
    register = lambda address, nbytes, flags: pinned.append(nbytes) or 0  # noqa: E731
    runtime = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: pinned.append(0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    store = WeightStore({"a": torch.zeros(3)}, "host", torch.device("cuda"))
    assert pinned == []
    store.pin()
    assert pinned == [store.nbytes]
    del store
    assert pinned[1:] == [0]


def hold_other_weights(bits: int) -> list:
    """Ranks whose models have other weights: all hold rank 0's, as DeepSpeed's broadcast has it."""
    model = tiny_llama(seed=dist.get_rank()).to(torch.bfloat16)
    frozen = FrozenLayers(model, find_blocks(model), bits, "host", torch.device("cpu"))
    frozen.begin([])
    made = frozen.held[0].whole().float().sum().item()
    dist.barrier()
    return [made, frozen.held[0].original.float().sum().item()]


def test_all_ranks_hold_the_weights_of_rank_0():
    one, two = run_ranks(hold_other_weights, 2, 8)
    assert one == two
    expected = tiny_llama(seed=0).to(torch.bfloat16).model.layers[0].self_attn.q_proj.weight
    assert one[1] == expected.float().sum().item()


def load_before_attach() -> dict:
    """A state of other layers than period 0's, given to a controller that has no engine yet."""
    model = tiny_llama().to(torch.bfloat16)
    config = lisa_dist.LisaConfig(lisa_frozen_bits=4, lisa_interval_steps=INTERVAL)
    lisa = lisa_dist.LisaController(model, config)
    state = lisa.state_dict() | {"active_layers": [layer for layer in range(6) if layer not in lisa.active_layers][:2]}
    lisa.load_state_dict(state)
    held = [
        layer
        for layer, block in enumerate(lisa.blocks.layers)
        if any(not one.numel() for one in block.parameters.values())
    ]
    return {"active": lisa.active_layers, "held": held}


def test_a_state_that_is_loaded_before_attach_moves_held_layers():
    outcome = run_ranks(load_before_attach, 1)[0]
    assert sorted([*outcome["active"], *outcome["held"]]) == list(range(6))


# Bad input


def test_a_model_that_is_held_can_be_trained_by_no_other():
    model = tiny_llama().to(torch.bfloat16)
    FrozenLayers(model, find_blocks(model), 4, "host", torch.device("cpu")).begin([0])
    with pytest.raises(ValueError, match=r"are held in fewer bits by an earlier run .*: load the model anew"):
        lisa_dist.LisaController(model, lisa_dist.LisaConfig())
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen layers are held in fewer bits by a LISA run: load it anew"):
        model(token_batches(1, rows=1)[0, 0])


def test_a_store_on_another_hosts_disk_is_refused(tmp_path, monkeypatch):
    check_store(str(tmp_path))
    mount = types.SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")
    monkeypatch.setattr(
        "psutil.disk_partitions", lambda all: [types.SimpleNamespace(mountpoint="/", fstype="ext4"), mount]
    )
    with pytest.raises(ValueError, match=r"--lisa_frozen_store .*: is on another host's disk \(nfs4\)"):
        check_store(str(tmp_path))
    with pytest.raises(ValueError, match="is no folder; give another"):
        check_store(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float32}, "are in float32: what is frozen is 16 bits wide; give --bf16 true"),
        ({"blocks": "none"}, "hold no linear weights"),
    ],
)
def test_models_that_cannot_be_held_are_refused(change, said):
    model = tiny_llama().to(change.get("dtype", torch.bfloat16))
    blocks = find_blocks(model)
    if "blocks" in change:
        for layer in blocks.layers:
            layer.parameters = {name: value for name, value in layer.parameters.items() if value.ndim == 1}
    with pytest.raises(ValueError, match=said):
        FrozenLayers(model, blocks, 4, "host", torch.device("cpu"))


def test_a_bitsandbytes_that_cannot_run_is_refused(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(torch.ops.bitsandbytes, "quantize_4bit", fails)
    model = tiny_llama().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bitsandbytes cannot quantize on cpu here \(no kernel for this device\)"):
        FrozenLayers(model, find_blocks(model), 4, "host", torch.device("cpu"))


@pytest.mark.parametrize(
    ("ds_config", "settings", "said"),
    [
        ("zero3", {}, "--lisa_frozen_bits 4 on ZeRO stage 3: .* use --deepspeed zero2"),
        ("zero2", {}, "with weights in fp32: .* give --bf16 true"),
    ],
)
def test_engines_that_cannot_hold_are_refused(ds_config, settings, said):
    config = lisa_dist.LisaConfig(lisa_frozen_bits=4, **settings)
    with pytest.raises(ValueError, match=said):
        lisa_dist.initialize(tiny_llama(), ds_config, config)
