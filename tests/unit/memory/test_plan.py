"""What is asked, the models that are known by name, and how a plan is shown."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny_llama

import lisa_dist
from lisa_dist.commands.plan import main
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import PlanArguments, command_for, load_model_config
from lisa_dist.memory.planner import make_plans
from lisa_dist.model_names import name_or_folder, shipped_model_configs
from lisa_dist.run_folder import PLANNED_PARTS
from lisa_dist.text import parse_bytes


@pytest.fixture
def tiny_config(tmp_path) -> str:
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_every_shipped_model_has_the_parameters_it_is_known_for():
    known = {
        "gemma2-9b": 9.24, "gemma3-1b": 1.00, "gemma3-4b": 3.88, "gemma3-12b": 11.77, "gemma3-27b": 27.01,
        "glm-4-9b": 9.40, "glm-4.5-air": 106.85, "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.83, "llama2-13b": 13.02,
        "llama2-70b": 68.98, "llama2-7b": 6.74, "llama3.1-405b": 405.85, "llama3.1-70b": 70.55, "llama3.1-8b": 8.03,
        "llama3.2-1b": 1.24, "llama3.2-3b": 3.21, "llama3.3-70b": 70.55, "mistral-7b": 7.24,
        "mistral-small-24b": 23.57, "phi-4": 14.66, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "qwen2.5-7b": 7.62,
        "qwen3-0.6b": 0.60, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77,
        "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.09, "smollm3-3b": 3.08,
    }  # fmt: skip
    assert shipped_model_configs() == sorted(known)
    for name, billions in known.items():
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(load_model_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize(
    ("given", "shipped"),
    [
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2-7b"),
        ("meta-llama/Llama-2-7b", "llama2-7b"),
        ("qwen/qwen2.5-72b-instruct", "qwen2.5-72b"),
        ("google/gemma-2-9b-it", "gemma2-9b"),
    ],
)
def test_models_of_the_hub_whose_config_is_shipped_need_no_hub(given, shipped):
    assert load_model_config(given).to_dict() == load_model_config(shipped).to_dict()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("llama3-8b", r"no shipped name; did you mean llama3\.1-8b\?"),
        ("Llama2_7b", r"no shipped name; did you mean llama2-7b\?"),
        ("meta-llama/Llama-3.1-9B", r"can be reached on the hub .*Did you mean meta-llama/Llama-3\.1-8B\?"),
        ("no/such-model", r"can be reached on the hub \(\w+\)\. Give the path"),
    ],
)
def test_the_nearest_shipped_model_is_named(given, said):
    with pytest.raises(ValueError, match=rf"--model {given}: no such folder.*{said}"):
        load_model_config(given)


def test_a_folder_of_a_shipped_name_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_or_folder("llama3.1-8b") == "meta-llama/Llama-3.1-8B"
    (tmp_path / "llama3.1-8b").mkdir()
    assert name_or_folder("llama3.1-8b") == "llama3.1-8b"


def test_the_command_line(tiny_config, tmp_path, capsys):
    of_32_bits = ["--lisa_preset", "none", "--lisa_state", "keep"]
    main(["--model", tiny_config, "--gpus", "2", "--json", str(tmp_path / "plans.json"), *of_32_bits])
    said = capsys.readouterr().out
    for words in ("weights", "states, always on", "zero3_offload", "fits", "lisa-dist train --gpus 2 "):
        assert words in said
    assert "--deepspeed zero1" in said, "the fastest that fits"
    assert "--lisa_state keep" in said
    plans = json.loads((tmp_path / "plans.json").read_text())["plans"]
    assert [plan["ds_config"] for plan in plans] == ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    for plan in plans:
        assert plan["gpu"]["peak"] > plan["gpu"]["static"]
        assert plan["host"]["kept states"] > 0


def test_the_plot_shows_parts_that_add_up_to_the_peak(tiny_config, tmp_path, capsys):
    path = tmp_path / "plans.png"
    main(["--model", tiny_config, "--plot", str(path), "--gpu_memory", "2GiB"])
    assert path.read_bytes().startswith(b"\x89PNG")
    for plan in make_plans(load_model_config(tiny_config), PlanArguments(tiny_config), lisa_dist.LisaConfig.plain()):
        parts = plan.gpu.at_peak()
        assert sum(parts[name] for _, fields in PLANNED_PARTS for name in fields) == plan.gpu.peak
    with pytest.raises(SystemExit, match="2"):
        main(["--model", tiny_config, "--plot", str(tmp_path / "plans.unknown"), "--gpu_memory", "2GiB"])
    assert "plans.unknown: cannot be written" in capsys.readouterr().out


def test_the_command_says_what_was_planned(tiny_config):
    def command(lisa=None, **changes):
        arguments = PlanArguments(tiny_config, deepspeed="zero2", **changes)
        config = lisa or lisa_dist.LisaConfig.plain()
        return command_for(make_plans(load_model_config(tiny_config), arguments, config)[0], arguments)

    folder = str(Path(tiny_config).parent)
    assert command() == (
        f"lisa-dist train --gpus 1 --model_name_or_path {folder} --dataset_name openai/gsm8k --dataset_config main "
        f"--output_dir runs/{Path(folder).name} --method lisa --deepspeed zero2 "
        "--per_device_train_batch_size 1 --max_length 1024 --optim adamw_torch_fused --bf16 True "
        "--loss logits --checkpointed_layers 0 --lisa_activated_layers 2"
    )
    assert "--bf16 True --loss chunked --checkpointed_layers" in command(loss="chunked")
    assert command(gpus=16).startswith(
        "deepspeed --hostfile hostfile --num_nodes 2 --num_gpus 8 --no_local_rank --module lisa_dist.cli train "
    )
    assert "--optim adamw_torch_fused --bf16 False" in command(precision="fp32")
    assert command(checkpointed_layers="4").endswith("--checkpointed_layers 4 --lisa_activated_layers 2")
    assert "--gradient_accumulation_steps 2 --checkpointed_layers 0" in command(gradient_accumulation_steps=2)
    assert command(method="full", checkpointed_layers="all").endswith("--checkpointed_layers all")
    frozen = lisa_dist.LisaConfig(lisa_always_on="", lisa_frozen="embed,head,rest")
    assert command(lisa=frozen).endswith("--lisa_activated_layers 2 --lisa_always_on '' --lisa_frozen embed,head,rest")
    assert "--method lora " in command(method="lora")
    assert command(method="lora", lora_r=8).endswith("--lora_r 8 --lora_dropout 0.0 --checkpointed_layers none")
    in_4_bits = {"method": "lora", "load_in_4bit": True, "use_bnb_nested_quant": True}
    assert " --load_in_4bit True --use_bnb_nested_quant True --checkpointed_layers " in command(**in_4_bits)
    with pytest.raises(UserError, match="--load_in_4bit with ZeRO-3"):
        make_plans(
            load_model_config(tiny_config),
            PlanArguments(tiny_config, deepspeed="zero3", **in_4_bits),
            lisa_dist.LisaConfig.plain(),
        )
    copies = command(method="lora", lora_modules_to_save=["embed_tokens,lm_head"])
    assert " --lora_dropout 0.0 --lora_modules_to_save embed_tokens,lm_head --checkpointed_layers " in copies


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--gpu_memory", "1MiB", "--host_memory", "1MiB", "--checkpointed_layers", "all", "--loss", "chunked"],
            "nothing fits beside the 0 of each that are kept for CUDA (--reserve). The closest: ",
        ),
        (
            ["--vllm_gpu_memory_utilization", "0.3"],
            "--vllm_gpu_memory_utilization 0.3 with --task sft: it is a part of",
        ),
        (["--gpu_memory", "much"], "--gpu_memory much: not a size, such as 24GiB or 80GB"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--gpus", "1000000000"], "--gpus 1000000000: plans are made for at most 1024 GPUs. Give fewer."),
        (["--seq_length", "99999999999"], "have 99999999999 tokens in a forward pass, and plans are made for at most"),
        (["--micro_batch_size", "1000000"], "--seq_length 1024 with --micro_batch_size 1000000: a GPU would have"),
        (["--method", "magic"], "--method magic: unknown; choose one of lisa, full, lora"),
        (["--precision", "fp8"], "--precision fp8: unknown"),
        (["--lisa_activated_layers", "7"], "--lisa_activated_layers 7: the model has 6 decoder layers"),
        (["--lisa_state_bits", "embed=8", "--deepspeed", "zero2_offload"], "--lisa_state_bits embed=8 with offload"),
        (["--checkpointed_layers", "7"], "--checkpointed_layers 7: the model has 6 decoder layers"),
        (["--checkpointed_layers", "some"], "--checkpointed_layers some: give none, all, auto or a number"),
        (["--checkpointed_layers", "3", "--method", "lora"], "--checkpointed_layers 3 with --method lora"),
        (["--optim", "lisa_adamw", "--method", "full"], "--optim lisa_adamw with --method full: it is for --method"),
        (["--lisa_offload", "embed", "--deepspeed", "zero3_offload"], "--lisa_offload embed with offload_param"),
        (["--method", "full", "--lisa_offload", "embed"], "--method full: flags that begin with --lisa_ are for"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: cannot be written"),
        (["--lisa_layers_attribute", "model.nope"], "--lisa_layers_attribute model.nope"),
        (["--lisa_sampler", "weighted", "--lisa_weights_file", "absent.json"], "absent.json"),
        (["--optim", "adamw_8bit", "--lisa_offload", "embed"], "--optim adamw_8bit with --lisa_offload embed"),
        (["--deepspeed", "zero3_nvme"], "--deepspeed zero3_offload"),
        (["--deepspeed", "zero9"], "--deepspeed zero9: neither a file nor a shipped config"),
    ],
)
def test_what_cannot_be_planned_is_refused(tiny_config, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", tiny_config, "--reserve", "0", *flags])
    assert said in capsys.readouterr().out


def test_a_file_that_is_no_config_is_refused(tmp_path):
    path = Path(tmp_path / "config.json")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no model's config\.json"):
        load_model_config(str(path))


def test_sizes():
    assert parse_bytes("--gpu_memory", "24GiB") == 24 * 2**30
    assert parse_bytes("--gpu_memory", "80 GB") == 80 * 10**9
    assert parse_bytes("--gpu_memory", "1.5g") == 1.5 * 10**9
    with pytest.raises(ValueError, match="--gpu_memory 24: of bytes that is next to nothing; give a unit, as in 24GiB"):
        parse_bytes("--gpu_memory", "24")
