"""What a rank of the golden comparison trains, and what it notes of every step.

It runs unchanged on two revisions: of lisa_dist it uses public names and attributes alone.
"""

import gc
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from golden_cases import CUT, INTERVAL, STEPS
from models import VOCABULARY, tiny_llama, tiny_tokenizer
from safetensors import safe_open
from torch import distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

import lisa_dist

ROWS, LENGTH = 4, 16  # of a micro-batch on all ranks, and tokens of a row
LR, DECAY = 1e-3, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(case: dict, save_to: str, resume_from: str | None = None) -> dict:
    """Train a case and save it in mid-period, or go on from that checkpoint; what this rank saw of every step.

    A resume begins from other weights than the run did, so that what is not restored is seen.
    """
    train = train_with_trainer if case["trainer"] else train_in_loop
    steps = train(case, Path(save_to), resume_from and Path(resume_from) / f"checkpoint-{CUT}")
    gc.collect()
    dist.barrier()  # rank 0 has written its last file
    return {"steps": steps, "checkpoint": {} if resume_from else describe_checkpoint(Path(save_to))}


def train_in_loop(case: dict, save_to: Path, resume_from: Path | None) -> list[dict]:
    engine, lisa = start(case, seed=0 if resume_from is None else 1, output_dir=save_to)
    if resume_from is not None:
        state = json.loads((resume_from / "lisa_state.json").read_text())
        # Settings that only one of the releases has are as by default.
        state["lisa"]["config"] = lisa_dist.LisaConfig(lisa_activated_layers=2).to_dict() | state["lisa"]["config"]
        lisa_dist.load_checkpoint(lisa, resume_from, state)
    steps = []
    while engine.global_steps < STEPS:
        losses = []
        for rows in batch_of(engine.global_steps, case):
            lisa.on_step_begin()
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item().hex())
        steps.append(describe_step(lisa, losses))
        if resume_from is None and engine.global_steps == CUT:
            lisa_dist.save_checkpoint(lisa, save_to / f"checkpoint-{CUT}")
    lisa.close()
    engine.destroy()
    return steps


def train_with_trainer(case: dict, save_to: Path, resume_from: Path | None) -> list[dict]:
    trainer = build_trainer(case, save_to, seed=0 if resume_from is None else 1)
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    finally:
        unset_hf_deepspeed_config()  # else transformers would build the next model under ZeRO-3
    return trainer.steps


class NotingTrainer(lisa_dist.LisaTrainer):
    """LisaTrainer, which notes of every step what `describe_step` has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.losses = [], []
        notes = transformers.TrainerCallback()
        notes.on_step_end = self.note
        self.add_callback(notes)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item().hex())
        return loss

    def note(self, *args, **kwargs):
        self.steps.append(describe_step(self.lisa, self.losses))
        self.losses = []


# The parts of a run


def start(case: dict, seed: int = 0, output_dir: Path | None = None):
    """The engine and the controller of a case."""
    model = tiny_llama(seed, tied=case["tied"]).to(DTYPES[case["dtype"]])
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {
        "micro_batch_size": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": case["accumulation"],
        "max_grad_norm": case["clip"],
    }
    ds_config = lisa_dist.load_ds_config(case["ds_config"], model=model, **batch)
    ds_config["zero_optimization"] |= case["zero"]
    config = lisa_dist.LisaConfig(**{"lisa_interval_steps": INTERVAL} | case["lisa"])
    rates = {"lr": LR, "weight_decay": DECAY, "optim": case["optim"]}
    return lisa_dist.initialize(model, ds_config, config, output_dir=output_dir and str(output_dir), **rates, **batch)


def build_trainer(case: dict, output_dir: Path, seed: int) -> NotingTrainer:
    """The trainer of a case, under a cosine schedule."""
    shipped = Path(lisa_dist.__file__).parent / "ds_configs" / f"{case['ds_config']}.json"
    arguments = {"output_dir": str(output_dir), "deepspeed": str(shipped), "use_cpu": True, "max_steps": STEPS}
    arguments |= {"bf16": case["dtype"] == "bf16", "per_device_train_batch_size": ROWS // dist.get_world_size()}
    arguments |= {"gradient_accumulation_steps": case["accumulation"], "gradient_checkpointing": case["checkpointing"]}
    arguments |= {"max_grad_norm": case["clip"], "learning_rate": LR, "lr_scheduler_type": "cosine"}
    arguments |= {"weight_decay": DECAY, "max_length": LENGTH, "logging_steps": 1, "save_steps": CUT}
    arguments |= {"report_to": "none", "disable_tqdm": True}
    rows = [{"input_ids": row} for step in range(STEPS) for row in tokens_of(step, case).flatten(0, 1).tolist()]
    return NotingTrainer(
        model=tiny_llama(seed, tied=case["tied"]),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        lisa_config=lisa_dist.LisaConfig(**{"lisa_interval_steps": INTERVAL} | case["lisa"]),
        optim=case["optim"],
    )


def tokens_of(step: int, case: dict) -> torch.Tensor:
    """Token ids of one step, of shape (micro-batches, rows of all ranks, tokens)."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (case["accumulation"], ROWS, LENGTH), generator=generator)


def batch_of(step: int, case: dict) -> list[torch.Tensor]:
    """This rank's micro-batches of one step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return [rows.chunk(ranks)[rank] for rows in tokens_of(step, case)]


# What is compared


def describe_step(lisa: lisa_dist.LisaController, losses: list[str]) -> dict:
    """Sampled blocks, losses of micro-batches in hexadecimal, SHA-256 of what this rank holds."""
    weights = ((name, getattr(value, "ds_tensor", value)) for name, value in lisa.engine.module.named_parameters())
    saved = sorted(lisa.saved_states()[0].items())
    states = (
        (f"{key} {name}", value)
        for key, state in saved
        for name, value in sorted({"master": state.master, **state.optimizer_state}.items())
    )
    return {
        "sampled blocks": [lisa.period, *lisa.active_layers, *lisa.active_blocks],
        "loss": losses,
        "weights": hash_tensors(weights),
        "states": hash_tensors(states),
    }


def hash_tensors(values: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for name, value in values:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            value = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()


def describe_checkpoint(output_dir: Path) -> dict:
    """Names of a run's files; of its checkpoint state and sums of tensors, no times, versions or bytes of memory."""
    saved = output_dir / f"checkpoint-{CUT}"
    state = json.loads((saved / "lisa_state.json").read_text())
    for name in ("saved_at", "checksum", "versions", "files"):
        del state[name]
    for name in ("seconds", "live_bytes", "bytes_released"):
        del state["lisa"]["record"][name]
    settings = state["lisa"].pop("config")
    others = (path for path in output_dir.rglob("*") if not path.name.startswith("model"))  # weights are below
    described = {"names of files": sorted(str(path.relative_to(output_dir)) for path in others)}
    described |= {f"field {name} in lisa_state.json": value for name, value in state.pop("lisa").items()}
    described |= {f"{name} in lisa_state.json": value for name, value in state.items()}
    described |= {f"setting {name} in lisa_state.json": value for name, value in settings.items()}
    described |= {path.name: hash_file(path) for path in sorted(saved.glob("lisa_*.safetensors"))}
    weights = [safe_open(path, "pt") for path in saved.glob("model*.safetensors")]  # in one file, or in one for a block
    named = sorted(((name, file) for file in weights for name in file.keys()), key=lambda pair: pair[0])  # noqa: SIM118
    return described | {"weights": hash_tensors((name, file.get_tensor(name)) for name, file in named)}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's tensors by name, whatever order its partitions are in, by which some of them are named."""
    with safe_open(path, "pt") as file:
        partitions = json.loads((file.metadata() or {}).get("partitions", "[]"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    names = {str(index): str(partition["names"]) for index, partition in enumerate(partitions)}
    renamed = {}
    for name, tensor in tensors.items():
        owner, _, what = name.partition(":")
        renamed[f"{names.get(owner, owner)}:{what}"] = tensor
    listed = sorted(json.dumps(partition) for partition in partitions)
    return hash_tensors([*sorted(renamed.items()), ("partitions", listed)])
