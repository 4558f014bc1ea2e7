"""Refusals: commands that end with a line and exit status 2, and calls that raise; their texts are compared.

In words of a command {folder} has a tiny model, rows and a checkpoint in mid-period.
"""

import shutil
from pathlib import Path

import case_runs
from golden_cases import CASES, CUT
from models import save_tiny_llama, tiny_llama

import lisa_dist

TRAIN = ["train", "--model_name_or_path", "{folder}/model", "--dataset_name", "{folder}/rows.jsonl"]
TRAIN += ["--output_dir", "{folder}/refused", "--report_to", "none", "--max_length", "32", "--max_steps", "2"]

COMMANDS = [
    [*TRAIN, "--lisa_activated_layer", "2"],
    [*TRAIN, "--lisa_activated_layers", "7"],
    [*TRAIN, "--lisa_sampler", "random"],
    [*TRAIN, "--lisa_always_on", "embed", "--lisa_frozen", "embed"],
    [*TRAIN, "--deepspeed", "zero4"],
    [*TRAIN, "--deepspeed", "zero3_nvme"],
    [*TRAIN, "--deepspeed", "zero2_offload", "--optim", "adamw_8bit"],
    [*TRAIN, "--optim", "adafactor"],
    [*TRAIN, "--lisa_master", "bf16_sr"],
    [*TRAIN, "--global_batch_size", "12", "--per_device_train_batch_size", "8"],
    [*TRAIN, "--checkpointed_layers", "9"],
    [*TRAIN, "--dataset_columns", "answer"],
    [*TRAIN, "--dataset_name", "{folder}/absent.jsonl"],
    [*TRAIN, "--model_name_or_path", "{folder}/absent"],
    [*TRAIN, "--config", "{folder}/recipe.yaml"],
    [*TRAIN, "--resume_from_checkpoint", "true"],
    ["tran"],
    ["export", "{folder}/model", "{folder}/out"],
    ["export", "{folder}/damaged", "{folder}/out"],
    ["report", "{folder}/absent"],
    ["plan", "--model", "llama2-8b", "--gpus", "4", "--gpu_memory", "80GiB"],
    ["plan", "--model", "llama2-70b", "--gpus", "4", "--lisa_state_bits", "embed=7"],
    ["init", "--model", "llama2-7b", "--gpu_memory", "lots", "--recipe", "{folder}/new.yaml"],
    ["norms", "{folder}/model", "--out", "{folder}/norms"],
    ["eval", "{folder}/model", "--tasks", "mmlu,mmlu"],
]
FEW_COMMANDS = [COMMANDS[1], COMMANDS[17]]


def start(**changes):
    """The engine and the controller of the first case."""
    return case_runs.start(CASES[0] | changes)


def miss_a_switch(folder: Path) -> None:
    engine, lisa = start()
    lisa.on_step_begin()
    engine.global_steps += 3
    lisa.engine.module(input_ids=case_runs.batch_of(0, CASES[0])[0])


def ds_config(**values) -> dict:
    return {"zero_optimization": {"stage": 2}} | values


TIED_APART = {"lisa_always_on": "embed,rest", "lisa_frozen": "head"}
CALLS = {
    "no steps in a period": lambda folder: lisa_dist.LisaConfig(lisa_interval_steps=0),
    "stage 0": lambda folder: lisa_dist.initialize(tiny_llama(), ds_config(zero_optimization={"stage": 0})),
    "an optimizer": lambda folder: lisa_dist.initialize(tiny_llama(), ds_config(optimizer={"type": "AdamW"})),
    "a paged optimizer": lambda folder: lisa_dist.build_optimizer([], "paged_adamw_8bit"),
    "tied matrices apart": lambda folder: lisa_dist.LisaController(
        tiny_llama(tied=True), lisa_dist.LisaConfig(**TIED_APART)
    ),
    "a missed switch": miss_a_switch,
    "a damaged checkpoint": lambda folder: lisa_dist.load_checkpoint(start()[1], folder / "damaged"),
    "other settings in mid-period": lambda folder: lisa_dist.load_checkpoint(
        start(lisa={"lisa_activated_layers": 3})[1], folder / f"checkpoint-{CUT}"
    ),
    "a checkpoint in a file": lambda folder: lisa_dist.save_checkpoint(
        start()[1], folder / "rows.jsonl" / "checkpoint-0"
    ),
}
FEW_CALLS = ["a missed switch"]


def prepare(folder: Path) -> None:
    """Write what the refusals need."""
    save_tiny_llama(folder / "model")
    rows = [f'{{"question": "{number} + 1?", "answer": "{number + 1}"}}\n' for number in range(16)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "recipe.yaml").write_text("learning_rat: 1.0e-5\n")
    saved = folder / f"checkpoint-{CUT}"
    case_runs.run(CASES[0], str(folder))
    shutil.copytree(saved, folder / "damaged")
    weights = min((folder / "damaged").glob("model*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.write_bytes(content)


def refused_call(name: str, folder: Path) -> list[str]:
    """Which kind of error a call raises, and its text."""
    try:
        CALLS[name](folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other revision must raise it too
        kind = next(kind for kind in (ValueError, RuntimeError, Exception) if isinstance(error, kind))
        return [kind.__name__, str(error)]
    return ["nothing raised", ""]
