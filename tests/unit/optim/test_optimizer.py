"""Parameter groups and the optimizer over them."""

import contextlib

import pytest
import torch
from models import tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, GptOssConfig, Trainer

from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import Block, find_blocks
from lisa_dist.core.controller import LisaController
from lisa_dist.core.selection import build_param_groups, check_same_kinds, decays
from lisa_dist.optim.adamw import LisaAdamW
from lisa_dist.optim.build import build_optimizer, check_optim

BF16_SR, FACTORED = {"lisa_master": "bf16_sr"}, {"lisa_state_bits": "embed=factored"}


def groups_of(model, layers, weight_decay=0.1):
    blocks = find_blocks(model)
    outer = [block for block in (blocks.embed, blocks.head, blocks.rest) if block.parameters]
    return build_param_groups(outer, [blocks.layers[layer] for layer in layers], weight_decay)


def test_groups_keep_their_number_and_order():
    model = tiny_llama()
    first, second = groups_of(model, [0, 1]), groups_of(model, [2, 5])
    names = [group["lisa_group"] for group in first]
    assert names == [
        "embed/decay",
        "head/decay",
        "rest/no_decay",
        "slot0/decay",
        "slot0/no_decay",
        "slot1/decay",
        "slot1/no_decay",
    ]
    assert names == [group["lisa_group"] for group in second]
    assert [group["weight_decay"] for group in first] == [0.1, 0.1, 0.0, 0.1, 0.0, 0.1, 0.0]


def test_norms_and_biases_do_not_decay():
    blocks = find_blocks(model := tiny_gpt2())
    for settled in (False, True):
        if settled:
            blocks.decay_by(model, None)
        for block in blocks:
            for name in block.parameters:
                assert decays(block, name) == (not name.endswith("bias") and ".ln_" not in name), name
    assert not decays(Block("layers.0", {"up_bias": torch.nn.Parameter(torch.zeros(4, 8))}), "up_bias")


def test_what_decays_is_what_decays_in_the_trainer():
    """Also vectors that are neither norms nor biases, such as attention sinks."""
    config = GptOssConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_local_experts=2,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    lisa = LisaController(model, LisaConfig(lisa_activated_layers=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = lisa.param_groups(0.1)
    decaying = {names[id(one)] for group in groups if group["weight_decay"] for one in group["params"]}
    assert decaying == set(Trainer.get_decay_parameter_names(None, model))
    assert "model.layers.0.self_attn.sinks" in decaying
    assert not any(name.endswith("bias") for name in decaying)
    lisa = LisaController(tiny_llama(), LisaConfig.plain(), decaying=lambda model: ["lm_head.weight"])
    assert [group["lisa_group"] for group in lisa.param_groups(0.1) if group["weight_decay"]] == ["head/decay"]


def test_partitioned_parameters_are_judged_by_their_real_shape():
    matrix = torch.nn.Parameter(torch.zeros(0))
    matrix.ds_shape = torch.Size([4, 8])
    assert decays(Block("layers.0", {"weight": matrix}), "weight")


def test_layers_of_different_kinds_are_refused():
    matrix, norm = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    layers = [Block("layers.0", {"w": matrix, "n": norm}), Block("layers.1", {"w": matrix})]
    with pytest.raises(ValueError, match=r"layers\.1 has parameters of the kinds"):
        check_same_kinds(layers)


@pytest.mark.parametrize(
    ("optim", "offload"),
    [(optim, False) for optim in ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "lisa_adamw")]
    + [("adamw_torch", True)],
)
@pytest.mark.usefixtures("cpu_ops")
def test_the_optimizer_asked_for_is_built(optim, offload):
    import bitsandbytes
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW, "adamw_bnb_8bit": bitsandbytes.optim.AdamW}
    kinds |= {"lisa_adamw": LisaAdamW}
    settings = {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = build_optimizer(groups_of(tiny_llama(), [0, 1]), optim, offload=offload, seed=5, **settings)
    assert isinstance(optimizer, DeepSpeedCPUAdam if offload else kinds.get(optim, torch.optim.AdamW))
    assert {name: optimizer.defaults[name] for name in settings} == settings
    assert not offload or optimizer.adam_w_mode
    assert "8bit" not in optim or optimizer.args.optim_bits == 8
    assert optim != "lisa_adamw" or optimizer.seed == 5


@pytest.mark.parametrize(
    ("optim", "offload", "settings", "said"),
    [
        ("adafactor", False, {}, "--optim adafactor: LISA runs AdamW"),
        ("galore_adamw", False, {}, "choose one of adamw_torch"),
        ("paged_adamw_8bit", False, {}, "--optim paged_adamw_8bit: LISA runs AdamW"),
        ("adamw_8bit", True, {}, "--optim adamw_8bit with offload_optimizer"),
        ("adamw_torch", False, BF16_SR, "--lisa_master bf16_sr with --optim adamw_torch: only --optim lisa_adamw"),
        ("lisa_adamw", False, BF16_SR | {"precision": "fp32"}, "with weights in fp32: it rounds to bf16"),
        ("lisa_adamw", False, BF16_SR | {"precision": "fp16"}, "with weights in fp16: it rounds to bf16"),
        ("lisa_adamw", True, BF16_SR, "--lisa_master bf16_sr with offload_optimizer"),
        ("adamw_torch", False, FACTORED, "embed=factored with --optim adamw_torch: only --optim lisa_adamw has"),
        ("lisa_adamw", True, FACTORED, "embed=factored with offload_optimizer: DeepSpeed steps"),
        (
            "adamw_8bit",
            False,
            {"lisa_offload": "head"},
            "--optim adamw_8bit with --lisa_offload head: states on the host have 32 bits; give --lisa_state_bits "
            "head=32",
        ),
        ("adamw_8bit", False, {"lisa_offload": "head", "lisa_state_bits": "head=32"}, None),
        ("lisa_adamw", False, {"lisa_offload": "head"}, None),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(optim, offload, settings, said):
    precision = settings.get("precision", "bf16")
    config = LisaConfig.plain(**{name: value for name, value in settings.items() if name != "precision"})
    with pytest.raises(ValueError, match="--") if said else contextlib.nullcontext() as error:
        check_optim(optim, offload, config, precision)
    assert said is None or said in str(error.value)
    if settings == FACTORED:
        groups = [{"params": [], "lisa_group": "embed/decay", "lisa_state_bits": "factored"}, {"params": []}]
        with pytest.raises(ValueError, match="--lisa_state_bits") as error:
            build_optimizer(groups, optim, offload=offload)
        assert said in str(error.value)


def test_kernels_that_cannot_run_are_refused_at_the_start(monkeypatch):
    monkeypatch.setenv("LISA_DIST_KERNELS", "cuda")
    for check in (lambda: check_optim("lisa_adamw", False), lambda: build_optimizer([{"params": []}], "lisa_adamw")):
        with pytest.raises(ValueError, match="LISA_DIST_KERNELS=cuda: unknown"):
            check()
    check_optim("adamw_torch", False)
    check_optim("lisa_adamw", True)  # DeepSpeed's AdamW on the host takes its place


def test_norms_and_biases_keep_32_bits():
    blocks = find_blocks(tiny_llama())
    given = {"embed": "factored", "layers": 8}
    groups = build_param_groups([blocks.embed, blocks.rest], [blocks.layers[0]], 0.1, given)
    bits = {group["lisa_group"]: group.get("lisa_state_bits") for group in groups}
    assert bits == {"embed/decay": "factored", "rest/no_decay": None, "slot0/decay": 8, "slot0/no_decay": None}
    optimizer = build_optimizer(groups, "lisa_adamw")
    assert [group["lisa_state_bits"] for group in optimizer.param_groups] == ["factored", 32, 8, 32]


def test_bitsandbytes_steps_without_a_wait_for_each_tensor(monkeypatch):
    import bitsandbytes

    stepped = []
    for is_ours in (False, True):
        groups = groups_of(tiny_llama(num_layers=1), [0])
        parameters = [parameter for group in groups for parameter in group["params"]]
        if is_ours:
            monkeypatch.delattr("bitsandbytes.optim.optimizer.sync_gpu")
            optimizer = build_optimizer(groups, "adamw_bnb_8bit", lr=1e-2)
        else:
            optimizer = bitsandbytes.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), optim_bits=8)
        for _ in range(2):
            for parameter in parameters[1:]:  # the first has no gradient
                parameter.grad = torch.sin(parameter.detach() * 1e3)
            optimizer.step()
        stepped.append(parameters)
    assert all(map(torch.equal, *stepped))
