"""`lisa-dist convert`: recipes of what other tools are started with, and a word on every key that is nothing here."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lisa_dist.commands.convert import known_flags, main
from lisa_dist.commands.verbs import parser_of
from lisa_dist.convert.reading import TOOLS, read
from lisa_dist.convert.recipe import COMMON, RULES, Converted, convert, format_recipe
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


def converted(name: str, text: str | None = None) -> tuple[Converted, dict]:
    """What becomes of a configuration, and the recipe: its flags and the defaults there."""
    if text is not None:
        Path(name).write_text(text, encoding="utf-8")
    found = convert(name, None, known_flags)
    recipe = yaml.safe_load(format_recipe(found, name))
    assert list(recipe) == [*found.flags, *found.defaults]
    return found, recipe


def test_axolotl(files):
    found, recipe = converted("a.yaml")
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
    assert found.remarks.keys() == {"unheard_of", "optimizer"}
    assert "adamw_8bit, whose states are not paged" in found.remarks["optimizer"]
    assert found.gone.keys() == {"lisa_layers_attribute", "flash_attention"}


def test_llama_factory(files):
    found, recipe = converted("f.yml")
    expected = {
        "method": "lisa", "lisa_activated_layers": 1, "lisa_interval_steps": 50, "lisa_always_on": "",
        "lisa_frozen": "embed,head,rest", "dataset_name": ["one#100", "two#100"], "gradient_checkpointing": False,
        "deepspeed": "zero2", "warmup_steps": 0.1, "learning_rate": 5e-5, "weight_decay": 0.01,
        "lisa_sampler": "reshuffle",
    }  # fmt: skip
    assert expected.items() <= recipe.items()
    assert found.remarks.keys() == {"badam_switch_mode", "template", "dataset"}


def test_swift(files):
    found, recipe = converted("s.sh")
    expected = {
        "model_name_or_path": "Qwen/Qwen2-7B-Instruct", "dataset_name": ["org/data#1000", "other.jsonl"],
        "dataset_config": "sub", "long_examples": "drop", "deepspeed": "zero2", "method": "lisa",
        "lisa_activated_layers": 2, "learning_rate": 1e-5, "adam_beta2": 0.95,
    }  # fmt: skip
    assert expected.items() <= recipe.items()
    assert "append" not in recipe
    assert found.remarks.keys() == {"gradient_accumulation_steps", "loss_scale", "NPROC_PER_NODE", "use_hf"}
    assert found.remarks["NPROC_PER_NODE"].startswith("2: the number of GPUs: lisa-dist train recipe.yaml --gpus")
    assert "the shell" in found.remarks["gradient_accumulation_steps"]


def test_lmflow(files):
    found, recipe = converted("l.sh")
    expected = {
        "method": "lisa", "lisa_activated_layers": 1, "lisa_interval_steps": 20, "max_length": 256, "packing": True,
        "optim": "lisa_adamw", "dataset_name": ["data/rows"], "eval_rows": 0.05, "bf16": True,
    }  # fmt: skip
    assert expected.items() <= recipe.items()
    assert "lisa_adamw, whose states are not paged" in found.remarks["optim"]
    found, recipe = converted("l.sh", LMFLOW.replace("--use_lisa 1", "--use_lisa 0"))
    assert recipe["method"] == "full"
    assert {"lisa_activated_layers", "lisa_interval_steps"} <= found.gone.keys()


def badam(rest: str) -> str:
    return (
        f"finetuning_type: full\nuse_badam: true\nweight_decay: 0.2\nbadam_start_block: 3\nbadam_switch_mode: {rest}\n"
    )


def swift(words: str) -> str:
    return f"swift sft --model m --use_hf true {words}\n"


ABSENT = "in no dataset_info.json at hand"
OF_YAML = [  # of Axolotl, but for those that begin with a key of LLaMA-Factory or of ms-swift
    ("adapter: lora\nlora_r: 32\nlearning_rate: 2.0e-4", {"method": "lora", "lora_r": 32}, {}),
    ("adapter: qlora", {"method": "lora"}, {"adapter": "LoRA of weights in 16 bits"}),
    (
        "hub_model_id: me/it\nplugins: [lisa_dist.integrations.axolotl.LisaPlugin]",
        {"save_strategy": "epoch", "push_to_hub": True, "hub_private_repo": True},
        {},
    ),
    (
        "save_steps: 5\nevals_per_epoch: 2\ntest_datasets: [{path: b}]",
        {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 0.5},
        {},
    ),
    ("eval_steps: 10\nval_set_size: 0.1", {"eval_strategy": "steps"}, {}),
    ("eval_steps: 10\nval_set_size: 0.0", {"eval_strategy": None}, {}),  # nothing is held out
    ("evals_per_epoch: 4\ntorch_compile: auto", {"eval_strategy": None, "torch_compile": None}, {}),
    ("warmup_ratio: 0.1\nwarmup_steps: 0", {"warmup_steps": 0.1}, {}),
    ("warmup_steps: 5\nwarmup_ratio: 0.1", {"warmup_steps": 5}, {}),
    ("evaluation_strategy: steps\ndo_eval: true", {"eval_strategy": "steps"}, {}),
    ("do_eval: true", {"eval_strategy": "epoch"}, {}),
    (
        "cosine_min_lr_ratio: 0.1\nlr_scheduler: cosine",
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {},
    ),
    ("optimizer: adafactor\nadapter: lora", {"optim": "adafactor"}, {}),
    ("lora_target_modules: q_proj, v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}, {}),
    ("lora_modules_to_save: [lm_head]\nadapter: lora", {"lora_modules_to_save": ["lm_head"]}, {}),
    ("save_only_model: true\nsave_safetensors: true\nfsdp: []", {"save_only_model": None}, {}),
    (
        "special_tokens: {pad_token: x, bos_token: y}",
        {"pad_token": None},
        {"special_tokens": "save them in the model's tokenizer"},
    ),
    (
        "datasets: [{path: a, type: alpaca}, {path: b, type: completion}]",
        {"dataset_name": None},
        {"datasets": "differ in format"},
    ),
    ("datasets: [{path: a, type: {x: q}}]", {"dataset_name": None}, {"datasets": "name the columns of rows"}),
    (
        "datasets: rows.jsonl\nval_set_size: 9\nevals_per_epoch: often\nlr_scheduler: rex",
        {},
        {"datasets": "no value", "evals_per_epoch": "no value", "lr_scheduler": "the nearest is cosine"},
    ),
    (
        "stage: pt\nfinetuning_type: full\ndataset: a",
        {"method": "full", "packing": True, "dataset_format": "text"},
        {"dataset": ABSENT},
    ),
    (
        "stage: sft\ndataset: a\nlora_rank: 64",
        {"method": "lora", "lora_r": 64, "lora_alpha": 128, "learning_rate": 5e-5},
        {"dataset": ABSENT},
    ),
    (
        badam("fixed"),
        {"weight_decay": 0.01, "lisa_sampler": None},  # a sampler that is not asked for is not filled in
        {"badam_switch_mode": "1 for layer 3, 0 for others", "weight_decay": "BAdam's decay there is 0.01"},
    ),
    (
        badam("random"),
        {"lisa_sampler": "reshuffle"},
        {"badam_start_block": "another layer for each lisa_seed", "weight_decay": "BAdam's decay there is 0.01"},
    ),
    (
        "model: m\nuse_hf: true\nper_device_train_batch_size: 4",
        {"global_batch_size": 16, "gradient_accumulation_steps": None},
        {},
    ),
]
OF_SCRIPTS = [
    (swift("--tuner_type lora --lora_rank 4"), {"lora_r": 4, "global_batch_size": 16, "learning_rate": 1e-4}, {}),
    (
        swift("--tuner_type full --dataset hf::org/data --warmup_ratio 0 \\\n") + "swift infer --adapters x\n",
        {"warmup_steps": 0, "dataset_name": ["org/data"]},
        {},
    ),
    (
        swift("--per_device_train_batch_size 3"),
        {"global_batch_size": None, "gradient_accumulation_steps": 6},
        {},
    ),
    (
        "python examples/finetune.py --use_lora 1 --use_lisa 0 --dataset_path d\n",
        {"method": "lora", "lora_r": 8},
        {"dataset_path": "jq -c"},
    ),
    (
        "deepspeed --master_port=1 examples/finetune.py --use_lisa 1 --dataset_path d --do_eval --bf16 > log 2>&1\n",
        {"lisa_activated_layers": 2, "lisa_interval_steps": 20, "bf16": True},
        {"dataset_path": "jq -c"},
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "expected", "remarks"),
    [*(("x.yaml", *case) for case in OF_YAML), *(("x.sh", *case) for case in OF_SCRIPTS)],
)
def test_keys_become_flags_and_remarks(files, name, text, expected, remarks):
    """A flag of None is not in the recipe."""
    is_axolotls = name == "x.yaml" and not text.startswith(("stage", "finetuning_type", "model:"))
    found, recipe = converted(name, f"base_model: m\n{text}\n" if is_axolotls else text)
    assert {flag: recipe.get(flag) for flag in expected} == expected
    assert found.remarks.keys() == remarks.keys()
    assert all(said in found.remarks[key] for key, said in remarks.items())


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
FROM_FACTORY = {"pref_ftx": "loss_weights", "dataset": f"dpo_en_demo: {ABSENT}"}
KTO_OF_SWIFT = """
swift rlhf --rlhf_type kto --model org/model --train_type full --dataset rows.jsonl --beta 0.3 --desirable_weight 2 \\
  --max_length 256 --truncation_strategy delete
"""
GRPO_OF_SWIFT = "swift rlhf --rlhf_type grpo --model m --tuner_type full --use_hf true --reward_funcs accuracy\n"
OF_TASKS = [
    ("dpo", DPO_OF_FACTORY, {"beta": 0.2, "loss_type": ["ipo"], "method": "lora", "max_length": 2048}, FROM_FACTORY),
    ("orpo", DPO_OF_FACTORY.replace("ipo", "orpo"), {"beta": 0.2}, FROM_FACTORY),
    ("reward", DPO_OF_FACTORY.replace("dpo\n", "rm\n", 1), {"lora_r": 8}, FROM_FACTORY),
    (SFT, "stage: ppo\nmodel_name_or_path: m\n", {}, {"stage": "there is no such task here"}),
    (
        "grpo",
        GRPO_OF_AXOLOTL,
        {"beta": 0.01, "num_generations": 4, "max_completion_length": 64},
        {"reward_funcs": "a file with a function of completions"},
    ),
    ("dpo", "base_model: m\nrl: ipo\nrl_beta: 0.2\n", {"beta": 0.2, "loss_type": ["ipo"]}, {}),
    ("reward", "base_model: m\nreward_model: true\nmicro_batch_size: 2\n", {}, {}),
    (
        "kto",
        KTO_OF_SWIFT,
        {"beta": 0.3, "desirable_weight": 2, "max_length": 256, "long_examples": None},
        {"use_hf": "Hugging Face's here"},
    ),
    (
        "grpo",
        GRPO_OF_SWIFT,
        {"beta": 0.04, "temperature": 0.9, "max_completion_length": 512, "global_batch_size": 16},
        {"reward_funcs": "of trl.rewards"},
    ),
]


@pytest.mark.parametrize(("task", "text", "expected", "remarks"), OF_TASKS)
def test_training_by_preferences_and_rewards(files, task, text, expected, remarks):
    """The task, and its own flags; those that are of examples alone are left out."""
    found, recipe = converted("x.sh" if "swift" in text else "x.yaml", text)
    assert recipe.get("task", SFT) == task
    assert {flag: recipe.get(flag) for flag in expected} == expected
    assert found.remarks.keys() == remarks.keys()
    assert all(said in found.remarks[key] for key, said in remarks.items())
    Path("recipe.yaml").write_text(format_recipe(found, "x"), encoding="utf-8")
    parser_of("train", task).check(["--config", "recipe.yaml"])
    if task == "kto":
        assert found.gone["long_examples"] == "for --task sft, it was drop; this is kto"


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
    found, flags = converted("a.yaml", as_here)
    assert (flags["dataset_name"], found.remarks) == (["a"], {})
    found, flags = converted("a.yaml", as_here.replace("role: role", "role: from") + "    shards: 10\n")
    assert flags["dataset_name"] == ["a"]
    assert "nothing here is like message_property_mappings of a, shards of a" in found.remarks["datasets"]


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
    found, flags = converted("a.yaml", f"base_model: m\ndeepspeed: {given}\n")
    assert flags["deepspeed"] == (expected or given)
    assert ("deepspeed" in found.remarks) == (expected is None)


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
    here = {"dataset_name": ["data/x.json#7"], "dataset_columns": ["instruction=q", "output=a"]}
    absent = {"dataset": f"other: other: {ABSENT}; give files, or the hub's names"}
    for name, expected, remarks in (
        ("mine", here, {}),
        ("theirs", {"dataset_name": ["org/rows#7"], "dataset_split": "train"}, {}),
        ("other", {"dataset_name": ["other#7"]}, absent),
        ("mine\neval_dataset: theirs", here | {"eval_dataset_name": ["org/rows#7"]}, {}),
    ):
        found, flags = converted("x.yaml", f"finetuning_type: full\ndataset: {name}\nmax_samples: 7\n")
        assert expected.items() <= flags.items()
        assert found.remarks == remarks


@pytest.mark.parametrize("name", GIVEN)
def test_a_run_takes_the_recipe(files, name):
    Path("recipe.yaml").write_text(format_recipe(converted(name)[0], name), encoding="utf-8")
    parser_of("train").check(["--config", "recipe.yaml"])


@pytest.mark.parametrize("tool", TOOLS)
def test_every_rule_leads_to_a_flag(tool):
    known = {"env"}.union(*map(known_flags, TASKS))
    rules = (COMMON | RULES[tool].rules).values()
    named = {rule for rule in rules if isinstance(rule, str) and rule.isidentifier()}
    assert named | RULES[tool].defaults.keys() | set().union(*RULES[tool].more_defaults.values()) <= known


@pytest.mark.parametrize(
    ("name", "text", "words", "said"),
    [
        ("x.yaml", "learning_rate: 1\n", (), r"x\.yaml: it cannot be told whose keys these are; give --tool, one of"),
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
