"""Recipes that `lisa-dist convert` has made run as they come out, but for a few steps and what a CPU cannot."""

import json

import pytest
from runs import run_well, save_tiny_run

from lisa_dist.commands.convert import main as convert

FEW_STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--output_dir", "out"]

AXOLOTL = """
base_model: model
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: messages
    message_property_mappings: {role: role, content: content}
    roles: {user: [user, human], assistant: [assistant, gpt]}
chat_template: tokenizer_default
val_set_size: 0.1
evals_per_epoch: 2
sequence_len: 64
lisa_n_layers: 2
lisa_step_interval: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
warmup_ratio: 0.1
flash_attention: true
deepspeed: deepspeed_configs/zero2.json
special_tokens: {pad_token: "<pad>"}
"""
QLORA = AXOLOTL.replace(
    "lisa_n_layers: 2\nlisa_step_interval: 2\n", "adapter: qlora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\n"
)
FACTORY = """
model_name_or_path: model
stage: sft
do_train: true
finetuning_type: full
use_badam: true
badam_mode: layer
badam_switch_mode: ascending
badam_switch_interval: 2
dataset: mine
dataset_dir: data
template: llama3
cutoff_len: 64
max_samples: 40
preprocessing_num_workers: 16
output_dir: saves
plot_loss: true
per_device_train_batch_size: 1
warmup_ratio: 0.1
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
SWIFT = """
CUDA_VISIBLE_DEVICES=0 \\
swift sft \\
    --model model \\
    --tuner_type full \\
    --lisa_activated_layers 2 \\
    --lisa_step_interval 2 \\
    --dataset 'rows.jsonl#40' \\
    --torch_dtype float32 \\
    --split_dataset_ratio 0.1 \\
    --save_total_limit 2 \\
    --save_only_model true \\
    --max_length 64 \\
    --warmup_ratio 0.05 \\
    --use_hf true \\
    2>&1 | tee log
"""
LMFLOW = """
model_name_or_path=model
deepspeed --master_port=11000 \\
  examples/finetune.py \\
    --model_name_or_path ${model_name_or_path} \\
    --dataset_path rows.jsonl \\
    --output_dir out --overwrite_output_dir \\
    --conversation_template llama3 \\
    --num_train_epochs 0.01 \\
    --disable_group_texts 1 \\
    --block_size 64 \\
    --deepspeed configs/ds_config_zero2_no_offload.json \\
    --use_lisa 1 \\
    --lisa_activated_layers 1 \\
    --lisa_interval_steps 2 \\
    --validation_split_percentage 0 \\
    --do_train \\
    --dataloader_num_workers 1
"""


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(
    ("name", "text"), [("a.yml", AXOLOTL), ("q.yml", QLORA), ("f.yaml", FACTORY), ("s.sh", SWIFT), ("l.sh", LMFLOW)]
)
def test_a_converted_recipe_runs(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(save_tiny_run(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    roles = {"question": "user", "answer": "assistant"}
    turns = [[{"role": roles[name], "content": text} for name, text in row.items()] for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    (tmp_path / "data").mkdir()
    mine = [{"q": row["question"], "a": row["answer"]} for row in rows]
    (tmp_path / "data" / "mine.json").write_text(json.dumps(mine))
    known = {"mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(known))
    (tmp_path / name).write_text(text)
    convert(name, "recipe.yaml")
    run_well(["--config", "recipe.yaml", *FEW_STEPS], tmp_path)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (tmp_path / "out" / "lisa_log.jsonl").exists() == (text != QLORA)
