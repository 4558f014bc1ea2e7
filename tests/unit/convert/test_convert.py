"""`lisa-dist convert`: recipes of what other tools are started with, and a word on every key that is nothing here."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lisa_dist.commands.convert import known_flags, main
from lisa_dist.commands.verbs import parser_of
from lisa_dist.convert.reading import TOOLS, read, tool_of
from lisa_dist.convert.recipe import convert, format_recipe
from lisa_dist.convert.rules import DEFAULTS, RULES
from lisa_dist.tasks import SFT, TASKS

AXOLOTL = """
base_model: meta-llama/Llama-3.1-8B
load_in_4bit: false
datasets:
  - {path: rows.jsonl, type: chat_template, field_messages: dialog}
  - {path: json, data_files: [one.jsonl, two.jsonl], field_messages: dialog, split: train}
sequence_len: 4096
sample_packing: true
val_set_size: 0.05
evals_per_epoch: 4
saves_per_epoch: 1
num_epochs: 2
micro_batch_size: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
warmup_ratio: 0.1
learning_rate: 2e-5
bf16: auto
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_params.json
lisa_n_layers: 4
lisa_step_interval: 10
lisa_layers_attribute: model.layers
liger_rope: true
flash_attention: true
wandb_project: mine
wandb_entity:
special_tokens: {pad_token: x, eos_token: y}
unheard_of: 3
"""
FACTORY = """
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: full
use_badam: true
badam_switch_mode: descending
badam_switch_interval: 50
dataset: one,two
max_samples: 100
template: llama3
cutoff_len: 1024
val_size: 0.1
disable_gradient_checkpointing: true
deepspeed: examples/deepspeed/ds_z2_config.json
warmup_ratio: 0.1
"""
SWIFT = """#!/bin/bash
nproc=2
model=Qwen/Qwen2-7B-Instruct  # of the hub
NPROC_PER_NODE=$nproc \\
swift sft \\
    --model ${model} \\
    --train_type full \\
    --lisa_activated_layers 2 \\
    --dataset 'org/data:sub#1000' other.jsonl \\
    --learning_rate 1e-5 \\
    --gradient_accumulation_steps $(expr 16 / $nproc) \\
    --truncation_strategy delete \\
    --loss_scale last_round \\
    --deepspeed default-zero2 \\
    2>&1 | tee --append log
"""
LMFLOW = """
lisa_activated_layers=1
block_size=256
while [[ $# -ge 1 ]]; do
  case ${key} in
    --block_size)
      block_size="$2"
      ;;
  esac
done
python examples/finetune.py --model_name_or_path org/model --dataset_path data/rows --output_dir out \\
  --overwrite_output_dir --block_size ${block_size} --disable_group_texts 0 --optim paged_adamw_32bit --bf16 \\
  --use_lisa 1 --lisa_activated_layers ${lisa_activated_layers} --lisa_interval_steps=20 --validation_split_percentage 5
"""
GIVEN = {"a.yaml": AXOLOTL, "f.yml": FACTORY, "s.sh": SWIFT, "l.sh": LMFLOW}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in GIVEN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def recipe_of(name: str, tool: str | None = None) -> dict:
    return yaml.safe_load(format_recipe(convert(name, tool, known_flags), name))


def test_axolotl(files):
    recipe = recipe_of("a.yaml")
    assert recipe == {
        "model_name_or_path": "meta-llama/Llama-3.1-8B",
        "dataset_name": ["rows.jsonl", "one.jsonl", "two.jsonl"],
        "dataset_columns": ["messages=dialog"],
        "max_length": 4096,
        "packing": True,
        "eval_rows": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 0.125,
        "save_strategy": "epoch",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "learning_rate": "2e-5",  # a text of YAML 1.1, which the flag reads
        "deepspeed": "zero3_offload",
        "lisa_activated_layers": 4,
        "lisa_interval_steps": 10,
        "use_liger_kernel": True,
        "report_to": "wandb",
        "env": {"WANDB_PROJECT": "mine"},
        "pad_token": "x",
        "eos_token": "y",
        # What their defaults are.
        "method": "lisa",
        "gradient_checkpointing": False,
        "long_examples": "drop",
        "save_total_limit": 4,
    }
    found = convert("a.yaml", None, known_flags)
    assert found.remarks.keys() == {"unheard_of", "optimizer"}
    assert "adamw_8bit, whose states are not paged" in found.remarks["optimizer"]
    assert found.gone.keys() == {"lisa_layers_attribute", "flash_attention"}


def test_llama_factory(files):
    recipe = recipe_of("f.yml")
    assert recipe["method"] == "lisa"
    assert (recipe["lisa_activated_layers"], recipe["lisa_interval_steps"]) == (1, 50)
    assert (recipe["lisa_always_on"], recipe["lisa_frozen"]) == ("", "embed,head,rest")
    assert recipe["dataset_name"] == ["one#100", "two#100"]
    assert recipe["gradient_checkpointing"] is False
    assert (recipe["deepspeed"], recipe["warmup_steps"], recipe["learning_rate"]) == ("zero2", 0.1, 5e-5)
    assert recipe["lisa_sampler"] == "reshuffle", "the nearest"
    assert convert("f.yml", None, known_flags).remarks.keys() == {"badam_switch_mode", "template", "dataset"}
    (files / "f.yml").write_text("stage: pt\nfinetuning_type: full\ndataset: a\n", encoding="utf-8")
    recipe = recipe_of("f.yml")
    assert (recipe["method"], recipe["packing"], recipe["dataset_format"]) == ("full", True, "text")


def test_swift(files):
    recipe = recipe_of("s.sh")
    assert recipe["model_name_or_path"] == "Qwen/Qwen2-7B-Instruct"
    assert recipe["dataset_name"] == ["org/data#1000", "other.jsonl"]
    assert (recipe["dataset_config"], recipe["long_examples"], recipe["deepspeed"]) == ("sub", "drop", "zero2")
    assert (recipe["method"], recipe["lisa_activated_layers"], recipe["learning_rate"]) == ("lisa", 2, 1e-5)
    assert recipe["adam_beta2"] == 0.95
    assert "append" not in recipe
    remarks = convert("s.sh", None, known_flags).remarks
    assert remarks.keys() == {"gradient_accumulation_steps", "loss_scale", "NPROC_PER_NODE", "use_hf"}
    assert remarks["NPROC_PER_NODE"].startswith("2: the number of GPUs: lisa-dist train recipe.yaml --gpus")
    assert "the shell" in remarks["gradient_accumulation_steps"]
    (files / "s.sh").write_text("swift sft --model m --tuner_type lora --dataset d --lora_rank 4\n", encoding="utf-8")
    recipe = recipe_of("s.sh")
    assert (recipe["method"], recipe["lora_r"], recipe["global_batch_size"]) == ("lora", 4, 16)
    assert recipe["learning_rate"] == 1e-4


def test_lmflow(files):
    recipe = recipe_of("l.sh")
    assert (recipe["method"], recipe["lisa_activated_layers"], recipe["lisa_interval_steps"]) == ("lisa", 1, 20)
    assert (recipe["max_length"], recipe["packing"], recipe["optim"]) == (256, True, "lisa_adamw")
    assert "lisa_adamw, whose states are not paged" in convert("l.sh", None, known_flags).remarks["optim"]
    assert (recipe["dataset_name"], recipe["eval_rows"], recipe["bf16"]) == (["data/rows"], 0.05, True)
    (files / "l.sh").write_text(LMFLOW.replace("--use_lisa 1", "--use_lisa 0"), encoding="utf-8")
    found = convert("l.sh", None, known_flags)
    assert (found.flags | found.defaults)["method"] == "full"
    assert {"lisa_activated_layers", "lisa_interval_steps"} <= found.gone.keys()


def test_lora_of_each_tool(files):
    (files / "f.yml").write_text("stage: sft\nmodel_name_or_path: m\ndataset: a\nlora_rank: 64\n", encoding="utf-8")
    recipe = recipe_of("f.yml")
    assert (recipe["method"], recipe["lora_r"], recipe["lora_alpha"], recipe["learning_rate"]) == (
        "lora",
        64,
        128,
        5e-5,
    )
    (files / "l.sh").write_text(
        "python examples/finetune.py --use_lora 1 --use_lisa 0 --dataset_path d\n", encoding="utf-8"
    )
    recipe = recipe_of("l.sh")
    assert (recipe["method"], recipe["lora_r"]) == ("lora", 8)


def test_two_commands_of_a_script_stay_two(files):
    text = (
        "swift sft --model m --tuner_type full --dataset hf::org/data --warmup_ratio 0 \\\n\nswift infer --adapters x\n"
    )
    (files / "s.sh").write_text(text, encoding="utf-8")
    recipe = recipe_of("s.sh")
    assert (recipe["warmup_steps"], recipe["dataset_name"]) == (0, ["org/data"])
    assert "adapters" not in convert("s.sh", None, known_flags).remarks


def test_badam_has_its_defaults_written_out(files):
    (files / "f.yml").write_text("finetuning_type: full\nuse_badam: true\ndataset: a\n", encoding="utf-8")
    recipe = recipe_of("f.yml")
    assert (recipe["method"], recipe["lisa_interval_steps"], recipe["lisa_sampler"]) == ("lisa", 50, "reshuffle")
    assert recipe["weight_decay"] == 0.01


def test_badam_decays_as_it_does_there_and_fixed_layers_are_told_of(files):
    """A sampler that is not asked for is not filled in."""
    text = "finetuning_type: full\nuse_badam: true\ndataset: a\nweight_decay: 0.2\nbadam_start_block: 3\n"
    (files / "f.yml").write_text(text + "badam_switch_mode: fixed\n", encoding="utf-8")
    found = convert("f.yml", None, known_flags)
    assert "1 for layer 3, 0 for others" in found.remarks["badam_switch_mode"]
    assert "BAdam's decay there is 0.01" in found.remarks["weight_decay"]
    assert found.remarks.keys() == {"badam_switch_mode", "weight_decay", "dataset"}
    recipe = recipe_of("f.yml")
    assert recipe["weight_decay"] == 0.01
    assert "lisa_sampler" not in recipe
    (files / "f.yml").write_text(text + "badam_switch_mode: random\n", encoding="utf-8")
    found = convert("f.yml", None, known_flags)
    assert found.flags["lisa_sampler"] == "reshuffle"
    assert "another layer for each lisa_seed" in found.remarks["badam_start_block"]


DPO_OF_FACTORY = """
model_name_or_path: org/model
stage: dpo
finetuning_type: lora
lora_rank: 8
pref_beta: 0.2
pref_loss: ipo
pref_ftx: 0.5
dataset: dpo_en_demo
cutoff_len: 2048
"""
GRPO_OF_AXOLOTL = """
base_model: org/model
rl: grpo
trl: {beta: 0.01, num_generations: 4, max_completion_length: 64, reward_funcs: [rewards.lengths]}
datasets: [{path: rows.jsonl, type: chat_template}]
sequence_len: 512
micro_batch_size: 4
"""
FROM_FACTORY = {"pref_ftx": "loss_weights", "dataset": "dpo_en_demo: in no dataset_info.json at hand"}
KTO_OF_SWIFT = """
swift rlhf --rlhf_type kto --model org/model --train_type full --dataset rows.jsonl --beta 0.3 --desirable_weight 2 \\
  --max_length 256 --truncation_strategy delete
"""


@pytest.mark.parametrize(
    ("name", "text", "task", "flags", "remarks"),
    [
        (
            "f.yaml",
            DPO_OF_FACTORY,
            "dpo",
            {"beta": 0.2, "loss_type": ["ipo"], "method": "lora", "max_length": 2048},
            FROM_FACTORY,
        ),
        ("f.yaml", DPO_OF_FACTORY.replace("ipo", "orpo"), "orpo", {"beta": 0.2}, FROM_FACTORY),
        ("f.yaml", DPO_OF_FACTORY.replace("dpo\n", "rm\n", 1), "reward", {"lora_r": 8}, FROM_FACTORY),
        ("f.yaml", "stage: ppo\nmodel_name_or_path: m\n", None, {}, {"stage": "there is no such task here"}),
        (
            "a.yaml",
            GRPO_OF_AXOLOTL,
            "grpo",
            {"beta": 0.01, "num_generations": 4, "max_completion_length": 64},
            {"reward_funcs": "a file with a function of completions"},
        ),
        ("a.yaml", "base_model: m\nrl: ipo\nrl_beta: 0.2\n", "dpo", {"beta": 0.2, "loss_type": ["ipo"]}, {}),
        ("a.yaml", "base_model: m\nreward_model: true\nmicro_batch_size: 2\n", "reward", {}, {}),
        (
            "s.sh",
            KTO_OF_SWIFT,
            "kto",
            {"beta": 0.3, "desirable_weight": 2, "max_length": 256},
            {"use_hf": "Hugging Face's here"},
        ),
        (
            "s.sh",
            "swift rlhf --rlhf_type grpo --model m --tuner_type full --use_hf true --reward_funcs accuracy\n",
            "grpo",
            {"beta": 0.04, "temperature": 0.9, "max_completion_length": 512, "global_batch_size": 16},
            {"reward_funcs": "of trl.rewards"},
        ),
    ],
)
def test_training_by_preferences_and_rewards(tmp_path, monkeypatch, name, text, task, flags, remarks):
    """The task, and its own flags; those that are of examples alone are left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = convert(name, None, known_flags)
    assert found.flags.get("task") == task
    assert flags.items() <= (found.flags | found.defaults).items()
    assert found.remarks.keys() == remarks.keys()
    for key, said in remarks.items():
        assert said in found.remarks[key]
    (tmp_path / "recipe.yaml").write_text(format_recipe(found, name), encoding="utf-8")
    parser_of("train", task or SFT).check(["--config", "recipe.yaml"])
    if task == "kto":
        assert found.gone["long_examples"] == "for --task sft, it was drop; this is kto"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[{path: a, type: alpaca}, {path: b, type: completion}]", "differ in format"),
        ("[{path: a, type: {field_instruction: q}}]", "name the columns of rows"),
    ],
)
def test_datasets_that_are_not_alike_are_told_of(files, entries, said):
    (files / "a.yaml").write_text(f"base_model: m\ndatasets: {entries}\nevals_per_epoch: 0\n", encoding="utf-8")
    found = convert("a.yaml", None, known_flags)
    assert said in found.remarks["datasets"]
    assert "dataset_name" not in found.flags


def converted(text: str, name: str = "a.yaml"):
    """What becomes of a configuration, and its flags with the defaults."""
    Path(name).write_text(text, encoding="utf-8")
    found = convert(name, None, known_flags)
    return found, found.flags | found.defaults


def test_what_a_dataset_of_axolotl_says_as_it_is_here_is_no_remark(files):
    as_here = """
base_model: m
datasets:
  - path: a
    type: chat_template
    message_property_mappings: {role: role, content: content}
    roles: {user: [user, human], assistant: [gpt]}
    roles_to_train: [assistant]
"""
    found, flags = converted(as_here)
    assert (flags["dataset_name"], found.remarks) == (["a"], {})
    found, flags = converted(as_here.replace("role: role", "role: from") + "    shards: 10\n")
    assert flags["dataset_name"] == ["a"]
    assert "nothing here is like message_property_mappings of a, shards of a" in found.remarks["datasets"]


@pytest.mark.parametrize("evaluates", ["evals_per_epoch: 4", "eval_steps: 10"])
def test_axolotl_does_not_evaluate_what_is_not_there(files, evaluates):
    text = f"base_model: m\ndatasets: [{{path: rows.jsonl, type: alpaca}}]\n{evaluates}\ntorch_compile: auto\n"
    _, without = converted(f"{text}val_set_size: 0.0\n")
    assert without.get("eval_strategy", "no") == "no"
    assert "torch_compile" not in without
    _, having = converted(f"{text}val_set_size: 0.1\n")
    assert having["eval_strategy"] == "steps"


def test_words_of_a_script_are_those_of_a_shell(tmp_path):
    path = tmp_path / "x.sh"
    path.write_text(
        "# don't\nMORE=\"--lr 1e-4 --note 'a b'\"\n"
        'swift sft --model Q --dataset rows#500 --system "You are\nhelpful # and kind." $MORE # of a run\n'
    )
    found = read(str(path))
    assert found == {
        "swift": None, "sft": None, "model": "Q", "dataset": "rows#500", "system": "You are\nhelpful # and kind.",
        "lr": 1e-4, "note": "a b",
    }  # fmt: skip


def test_adapters_of_axolotl(files):
    for adapter in ("lora", "qlora"):
        found, flags = converted(f"base_model: m\nadapter: {adapter}\nlora_r: 32\nlearning_rate: 2.0e-4\n")
        assert (flags["method"], flags["lora_r"]) == ("lora", 32)
        assert ("adapter" in found.remarks) == (adapter == "qlora")


def test_axolotl_saves_and_pushes_as_it_does_there(files):
    found, flags = converted(
        "base_model: m\nhub_model_id: me/it\nplugins: [lisa_dist.integrations.axolotl.LisaPlugin]\n"
    )
    assert (flags["save_strategy"], flags["push_to_hub"], flags["hub_private_repo"]) == ("epoch", True, True)
    assert found.remarks == {}
    found, flags = converted("base_model: m\nsave_steps: 5\nevals_per_epoch: 2\ntest_datasets: [{path: b}]\n")
    assert (flags["save_strategy"], flags["save_steps"]) == ("steps", 5)
    assert (flags["eval_strategy"], flags["eval_steps"]) == ("steps", 0.5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("deepspeed_configs/zero3_bf16_cpuoffload_all.json", "zero3_offload"),
        ("examples/deepspeed/ds_z2_offload_config.json", "zero2_offload"),
        ("examples/deepspeed/ds_z0_config.json", "zero1"),
        ("configs/ds_config_zero3.json", "zero3_offload"),
        ("configs/ds_config_zero2_no_offload.json", "zero2"),
        ("zero3_offload", "zero3_offload"),
        ("default-zero3", "zero3"),
        ("my/zero3.json", None),
        ("configs/zero3_nvme.json", None),
        ("examples/deepspeed/ds_z3_fp8_config.json", None),
    ],
)
def test_only_configurations_of_the_tools_have_a_short_name(files, given, expected):
    found, flags = converted(f"base_model: m\ndeepspeed: {given}\n")
    assert flags["deepspeed"] == (expected or given)
    assert ("deepspeed" in found.remarks) == (expected is None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 0\n", {"warmup_steps": 0.1}),
        ("warmup_steps: 5\nwarmup_ratio: 0.1\n", {"warmup_steps": 5}),
        ("evaluation_strategy: steps\ndo_eval: true\n", {"eval_strategy": "steps"}),
        ("do_eval: true\n", {"eval_strategy": "epoch"}),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler: cosine\n",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ("optimizer: adafactor\nadapter: lora\n", {"optim": "adafactor"}),
        ("lora_target_modules: q_proj, v_proj\n", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("lora_modules_to_save: [lm_head]\nadapter: lora\n", {"lora_modules_to_save": ["lm_head"]}),
        ("save_only_model: true\nsave_safetensors: true\nfsdp: []\n", {}),
    ],
)
def test_keys_of_the_trainer(files, text, expected):
    found, flags = converted(f"base_model: m\n{text}")
    assert expected.items() <= flags.items()
    assert found.remarks == {}
    assert "save_only_model" not in flags


def test_datasets_of_llama_factory_are_the_files_behind_their_names(files):
    """Where dataset_info.json is at hand."""
    (files / "data").mkdir()
    (files / "data" / "dataset_info.json").write_text(
        json.dumps(
            {
                "mine": {"file_name": "x.json", "columns": {"prompt": "q", "query": "input", "response": "a"}},
                "theirs": {"hf_hub_url": "org/rows", "columns": {"prompt": "q", "response": "a"}, "split": "train"},
            }
        ),
        encoding="utf-8",
    )
    text = "finetuning_type: full\ndataset: {}\nmax_samples: 7\n"
    found, flags = converted(text.format("mine"))
    assert (flags["dataset_name"], flags["dataset_columns"]) == (["data/x.json#7"], ["instruction=q", "output=a"])
    assert found.remarks == {}
    found, flags = converted(text.format("theirs"))
    assert (flags["dataset_name"], flags["dataset_split"]) == (["org/rows#7"], "train")
    found, flags = converted(text.format("other"))
    assert "other: in no dataset_info.json at hand" in found.remarks["dataset"]
    assert flags["dataset_name"] == ["other#7"]
    found, flags = converted(text.format("mine") + "eval_dataset: theirs\n")
    assert (flags["eval_dataset_name"], found.remarks) == (["org/rows#7"], {})


def test_batches_of_swift_make_sixteen_examples_or_as_many_as_they_can(files):
    for rows, expected in ((4, {"global_batch_size": 16}), (3, {"gradient_accumulation_steps": 6})):
        text = f"swift sft --model m --dataset d.jsonl --per_device_train_batch_size {rows} --use_hf true\n"
        found, flags = converted(text, "s.sh")
        assert expected.items() <= flags.items()
        assert len({"global_batch_size", "gradient_accumulation_steps"} & flags.keys()) == 1
        assert found.remarks == {}


def test_flags_of_a_launcher_are_no_flags_of_a_run(files):
    text = (
        "deepspeed --master_port=11000 examples/finetune.py --use_lisa 1 --dataset_path d --do_eval --bf16 > log 2>&1\n"
    )
    found, flags = converted(text, "l.sh")
    assert found.remarks.keys() == {"dataset_path"}
    assert "jq -c" in found.remarks["dataset_path"]
    assert (flags["lisa_activated_layers"], flags["lisa_interval_steps"], flags["bf16"]) == (2, 20, True)


@pytest.mark.parametrize("name", GIVEN)
def test_a_run_takes_the_recipe(files, name):
    (files / "recipe.yaml").write_text(format_recipe(convert(name, None, known_flags), name), encoding="utf-8")
    parser_of("train").check(["--config", "recipe.yaml"])


@pytest.mark.parametrize("tool", TOOLS)
def test_every_rule_leads_to_a_flag(tool):
    known = {"env"}.union(*map(known_flags, TASKS))
    named = {rule for rule in RULES[tool].values() if isinstance(rule, str) and rule.isidentifier()}
    assert named | DEFAULTS[tool].keys() <= known


def test_the_keys_tell_whose_they_are():
    for keys, tool in (({"base_model"}, "axolotl"), ({"stage"}, "llamafactory"), ({"model"}, "ms-swift")):
        assert tool_of(dict.fromkeys(keys)) == tool
    assert tool_of({"model_name_or_path": "x", "learning_rate": 1}) is None


@pytest.mark.parametrize(
    ("name", "text", "words", "said"),
    [
        (
            "x.yaml",
            "learning_rate: 1\n",
            (),
            r"x\.yaml: it cannot be told whose keys these are; give --tool, one of axolotl",
        ),
        ("x.yaml", "[1]\n", (), r"x\.yaml: must hold keys and values"),
        ("x.yaml", "a: [\n", (), r"x\.yaml: is not YAML"),
        ("x.sh", "echo hello\n", (), r"x\.sh: holds no command with flags"),
        ("x.sh", "echo --x 1\n", ("--tool", "soup"), "--tool: invalid choice: 'soup'"),
        ("x.sh", 'a=(--model Q)\nswift sft "${a[@]}"\n', (), r"x\.sh: a is an array of bash; write its words out"),
        ("y.yaml", None, (), r"y\.yaml: no such file"),
        ("x.yaml", "base_model: m\n", ("there",), "there: is there already"),
        ("x.yaml", "base_model: m\n", ("no/such.yaml",), r"no/such\.yaml: cannot be written"),
    ],
)
def test_what_cannot_be_converted(tmp_path, monkeypatch, capsys, name, text, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(name, *words)
    assert ended.value.code == 2
    assert re.match(rf"lisa-dist convert: .*{said}", capsys.readouterr().out)


def test_values_of_another_kind_are_told_of(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "base_model: m\ndatasets: rows.jsonl\nval_set_size: 9\nevals_per_epoch: often\nlr_scheduler: rex\n",
        encoding="utf-8",
    )
    assert convert(str(path), None, known_flags).remarks.keys() == {"datasets", "evals_per_epoch", "lr_scheduler"}


def test_the_recipe_is_written_and_the_remarks_are_on_the_screen(files, capsys):
    main("a.yaml", "recipe.yaml")
    said = capsys.readouterr()
    assert said.out == "wrote recipe.yaml; start it: lisa-dist train recipe.yaml\n"
    assert "unheard_of: 3: nothing here is like it" in said.err
    main("s.sh", "of_swift.yaml")
    assert capsys.readouterr().out.endswith("; start it: lisa-dist train of_swift.yaml --gpus 2\n")
    Path("f.yaml").write_text("model_name_or_path: m\nstage: sft\ndataset: unheard_of\n", encoding="utf-8")
    main("f.yaml", "of_factory.yaml")
    assert capsys.readouterr().out == "wrote of_factory.yaml; its data are yet to be given\n"
    main("a.yaml")
    assert capsys.readouterr().out == (files / "recipe.yaml").read_text(encoding="utf-8")


def test_other_special_tokens_are_for_the_tokenizer(tmp_path):
    (tmp_path / "a.yaml").write_text("base_model: m\nspecial_tokens: {pad_token: x, bos_token: y}\n")
    found = convert(str(tmp_path / "a.yaml"), None, known_flags)
    assert "save them in the model's tokenizer" in found.remarks["special_tokens"]
    assert "pad_token" not in found.flags
