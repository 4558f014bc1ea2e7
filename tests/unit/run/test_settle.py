"""`--lisa_preset`: what it sets where nothing else is given, and which one is the default."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_gpt_oss
from runs import flags_for, save_tiny_run
from safetensors.torch import save_file

from lisa_dist.config import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.flags import task_of
from lisa_dist.memory.plan import PlanArguments, load_model_config, preset_settings, with_accumulation
from lisa_dist.memory.planner import first_that_fits
from lisa_dist.run import settle as settling
from lisa_dist.run.arguments import RunConfig, model_config_of, parse_arguments, run_parser
from lisa_dist.run.check_run import check_config
from lisa_dist.run.settle import apply_preset, describe_preset, settle, settle_layers
from lisa_dist.run.trainer import load_model

SMALL = "embed=factored,head=factored,layers=8"
# Sampled layers, rank of adapters, optimizer, moments, masters.
ADAPTERS = (0, 32, "lisa_adamw", SMALL, "fp32")
PLAIN = (2, None, "adamw_torch_fused", "", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("presets"))


def settled(folder: Path, more: list[str], **changes) -> RunConfig:
    words = flags_for(folder, folder / "out", **changes)
    for flag in ("--lisa_preset", "--lisa_activated_layers", "--lisa_interval_steps"):
        if flag in words:
            del words[(at := words.index(flag)) : at + 2]
    words = [*words, *more]
    return apply_preset(parse_arguments(words), run_parser(task_of(words)).given(words))


def settings_of(config: RunConfig) -> tuple:
    lisa = config.lisa
    trained = lisa.lisa_activated_layers, lisa.lisa_adapters
    return (*trained, config.training.optim.value, lisa.lisa_state_bits, lisa.lisa_master)


@pytest.mark.parametrize(
    ("words", "preset", "settings"),
    [
        ("", "adapters", ADAPTERS),
        ("--bf16 true", "adapters", (*ADAPTERS[:4], "bf16_sr")),
        ("--lisa_adapters 4 --deepspeed zero3", "adapters", (0, 4, *ADAPTERS[2:])),
        ("--gpu_memory 1GiB --checkpointed_layers auto", "adapters", ADAPTERS),
        ("--max_length -1 --lisa_frozen_bits 8 --bf16 true", "adapters", (*ADAPTERS[:4], "bf16_sr")),
        # The optimizer and its states are given, or cannot be those of the preset.
        ("--optim adamw_torch", "adapters", (0, 32, "adamw_torch", "", "fp32")),
        ("--optim lisa_adamw --lisa_state_bits layers=8", "adapters", (0, 32, "lisa_adamw", "layers=8", "fp32")),
        ("--deepspeed zero2_offload", "adapters", (0, 32, *PLAIN[2:])),
        ("--lisa_offload embed", "adapters", (0, 32, *PLAIN[2:])),
        # A setting of the sampling asks for plain LISA.
        ("--lisa_activated_layers 2", "none", PLAIN),
        ("--lisa-activated-layers 3", "none", (3, *PLAIN[1:])),
        ("--lisa_activated_layers=3", "none", (3, *PLAIN[1:])),
        ("--lisa_interval_steps 5", "none", PLAIN),
        ("--lisa_state keep", "none", PLAIN),
        ("--lisa_unit module --lisa_budget 5%", "none", PLAIN),
        ("--lisa_activated_layers 2 --lisa_adapters 4", "none", (2, 4, *PLAIN[2:])),
        # Other methods have no preset.
        ("--method full", "none", PLAIN),
        ("--lisa_preset adapters --method lora", "none", PLAIN),
        # A preset that is given.
        ("--lisa_preset none", "none", PLAIN),
        ("--lisa_preset paper", "paper", PLAIN),
        ("--lisa_preset paper --optim adamw_torch", "paper", (2, None, "adamw_torch", "", "fp32")),
        ("--lisa_preset adapters --lisa_activated_layers 3", "adapters", (3, *ADAPTERS[1:])),
        ("--lisa_preset adapters --bf16 true --lisa_offload layers", "adapters", (0, 32, *PLAIN[2:])),
    ],
)
def test_what_a_run_is_trained_with(folder, words, preset, settings):
    config = settled(folder, words.split())
    assert config.lisa.lisa_preset == preset
    assert settings_of(config) == settings


def test_the_rate_by_default_is_that_of_what_trains(folder):
    def rate(words: str) -> float:
        given = flags_for(folder, folder / "out")
        for flag in ("--lisa_preset", "--lisa_activated_layers", "--lisa_interval_steps", "--learning_rate"):
            if flag in given:
                del given[(at := given.index(flag)) : at + 2]
        return parse_arguments([*given, *words.split()]).training.learning_rate

    assert rate("") == rate("--method lora") == 2e-4
    assert rate("--lisa_activated_layers 2") == rate("--method full") == rate("--lisa_preset paper") == 2e-5
    assert rate("--lisa_activated_layers 2 --lisa_adapters 4") == 2e-5, "that of the layers"


def test_adapters_are_beside_whole_layers(folder):
    with pytest.raises(UserError, match=r"^--lisa_adapters 32 with --lisa_unit module"):
        settled(folder, ["--lisa_preset", "adapters", "--lisa_unit", "module", "--lisa_budget", "5%"])


def test_a_recipe_s_values_are_given_too(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lisa_activated_layers: 3\nlisa_state: keep\n")
    assert settings_of(settled(folder, ["--config", str(recipe)])) == (3, *PLAIN[1:])
    recipe.write_text("lisa_preset: paper\nlisa_state: keep\n")
    config = settled(folder, ["--config", str(recipe), "--lisa_sampler", "reshuffle"])
    assert (config.lisa.lisa_state, config.lisa.lisa_sampler) == ("keep", "reshuffle")


def test_the_paper_s_states_start_afresh(folder):
    config = settled(folder, ["--lisa_preset", "paper"])
    assert config.lisa == LisaConfig(lisa_preset="paper", lisa_debug=True)
    said = describe_preset(config)
    assert said.startswith("paper: lisa_activated_layers 2, lisa_interval_steps 20, lisa_sampler uniform, ")
    assert said.endswith("lisa_state reset_all, optim adamw_torch_fused")


def test_answers_of_grpo_are_trained_by_adapters_too(folder, tmp_path):
    (tmp_path / "rewards.py").write_text("def reward(completions, **columns):\n    return [0.0] * len(completions)\n")
    words = ["--task", "grpo", "--reward_funcs", str(tmp_path / "rewards.py"), "--output_dir", str(tmp_path / "out")]
    words += ["--dataset_name", str(folder / "rows.jsonl"), "--model_name_or_path", str(folder / "model")]
    config = apply_preset(parse_arguments(words), run_parser("grpo").given(words))
    assert config.lisa.lisa_preset == "adapters"
    assert settings_of(config) == ADAPTERS


def test_an_unknown_one_is_refused(folder):
    with pytest.raises(UserError, match=r"^--lisa_preset best: unknown; choose one of adapters, paper, none\.$"):
        settled(folder, ["--lisa_preset", "best"])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--packing true",
        "--torch_compile true",
        "--lisa_always_on rest",
        "--lisa_always_on=",
        "--lisa_always_on rest,head --lisa_frozen embed",
        "--lisa_state keep",
        "--lisa_sampler adaptive --lisa_interval_steps 5",
        "--lisa_sampler weighted --lisa_weights_file WEIGHTS",
        "--task orpo --dataset_name PAIRS",
        "--task dpo --dataset_name PAIRS",
        "--task reward --dataset_name PAIRS",
        "--task kto --dataset_name PAIRS",
    ],
)
def test_layers_are_planned_whatever_else_is_given(folder, tmp_path, words):
    """From one on, and by a plan: none of these settings is what cannot be planned."""
    (tmp_path / "weights.json").write_text("[0, 1, 1, 0, 1, 0]")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n' * 16)
    paths = {"WEIGHTS": tmp_path / "weights.json", "PAIRS": tmp_path / "pairs.jsonl"}
    words = [str(paths.get(word, word)) for word in words.split()]
    config = settled(folder, [*words, "--lisa_activated_layers", "auto", "--gpu_memory", "1GiB"])
    check_config(config)
    found, why = settle_layers(config, model_config_of(config), None)
    assert 1 <= found.lisa.lisa_activated_layers <= 6
    assert re.match(r"auto: \d of 6, [\d.]+ \wiB planned; there are 1\.00 GiB", why)


def test_plan_init_and_python_have_the_default_of_a_run(folder):
    """The run has one rank, and the stage and the batch that they choose."""
    arguments = with_accumulation(PlanArguments(str(folder / "model"), micro_batch_size=2, seq_length=64), ())
    model_config = load_model_config(arguments.model)
    preset = preset_settings(arguments, LisaConfig(), ())
    planned = first_that_fits(model_config, arguments, LisaConfig(), preset)
    run = settled(folder, ["--deepspeed", planned.plan.ds_config, "--bf16", "true"])
    assert replace(run.lisa, lisa_debug=False) == planned.lisa_config == planned.plan.lisa_config
    assert run.training.optim.value == planned.arguments.optim == "lisa_adamw"
    small = {"lisa_state_bits": SMALL, "lisa_master": "bf16_sr"}
    assert planned.lisa_config == LisaConfig(**small) == LisaConfig(lisa_preset="adapters", **small)


def test_a_gpu_that_others_have_taken_is_told(folder):
    config = settled(folder, ["--lisa_activated_layers", "auto"])
    with pytest.raises(ValueError, match=r"auto: the GPU has less free than the 1.5 GiB, or 6%, .* \(nvidia-smi\)"):
        settle_layers(config, model_config_of(config), None, gpu_bytes=0)


@pytest.mark.parametrize(("hosts", "filled"), [([2, 2], 2), ([4], 1)])
def test_weights_are_shared_by_a_host_s_ranks_and_planned_so(folder, tmp_path, monkeypatch, hosts, filled):
    words = {"deepspeed": "zero3_hpz", "lisa_activated_layers": "auto", "gpu_memory": "1GiB"}
    config = parse_arguments(flags_for(folder, tmp_path / "out", **words))
    monkeypatch.setattr(settling, "ranks_of_hosts", lambda: hosts)
    monkeypatch.setattr(type(config.training), "world_size", sum(hosts))
    monkeypatch.setenv("LOCAL_SIZE", str(hosts[0]))
    settled = settle(config, None)
    assert settled.config.lisa.lisa_activated_layers == 6
    assert settled.config.training.hf_deepspeed_config.config["zero_optimization"]["zero_hpz_partition_size"] == filled


@pytest.mark.parametrize(
    ("given", "use_kernels"), [(None, False), ('{"use_kernels":true}', True), ('{"kernel_config":{}}', None)]
)
def test_modules_are_exchanged_for_kernels_of_the_hub_only_where_asked(folder, given, use_kernels):
    words = [] if given is None else ["--model_init_kwargs", given]
    settled = settle(parse_arguments([*flags_for(folder, folder / "out"), *words]), None)
    assert settled.config.training.model_init_kwargs.get("use_kernels") is use_kernels


def test_a_model_that_is_stored_in_mxfp4_is_loaded_in_16_bits(folder, tmp_path, monkeypatch):
    """As gpt-oss is on the hub: two numbers a byte, with an exponent for each 32."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values, generator = torch.cat([values, -values]), torch.Generator().manual_seed(0)
    model, stored, expected = tiny_gpt_oss().to(torch.bfloat16), {}, {}
    for name, value in model.state_dict().items():
        if value.ndim < 3:
            stored[name] = value.contiguous()
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        numbers = values[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
        whole = numbers * torch.exp2(exponents.float() - 127)[..., None]
        expected[name] = whole.flatten(-2).transpose(1, 2).to(torch.bfloat16)
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "model")
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    flags = flags_for(folder, tmp_path / "out", model_name_or_path=tmp_path / "model", bf16=True)
    config = parse_arguments(flags)
    check_config(config)
    loaded = load_model(settle(config, None).config)
    assert getattr(loaded.config, "quantization_config", None) is None
    for name, value in expected.items():
        assert torch.equal(loaded.get_parameter(name), value), name
    of_another_rank = settle(parse_arguments([*flags, "--lisa_frozen_bits", "4"]), None).config
    monkeypatch.setattr(type(config.training), "process_index", 1)
    empty = load_model(of_another_rank)
    assert [(name, value.shape, value.dtype) for name, value in empty.named_parameters()] == [
        (name, value.shape, value.dtype) for name, value in loaded.named_parameters()
    ]
    assert all(value.is_meta for value in empty.parameters())


@pytest.mark.parametrize(
    ("words", "task", "is_empty"),
    [
        ("--lisa_frozen_bits 4", "sft", True),
        ("--lisa_offload frozen", "sft", True),
        ("", "sft", False),
        ("--lisa_frozen_bits 4", "dpo", False),
    ],
)
def test_ranks_but_the_first_load_no_weights(folder, words, task, is_empty, monkeypatch):
    """Where they share originals, and no reference model is loaded in the same way."""
    config = settle(parse_arguments([*flags_for(folder, folder / "out", bf16=True), *words.split()]), None).config
    config.run.task = task
    monkeypatch.setattr(type(config.training), "process_index", 1)
    model = load_model(config)
    assert isinstance(model, str) is not is_empty
    if is_empty:
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
