"""Files and folders that the arguments of a run name, checked before anything is loaded or written."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lisa_dist.checkpoint.resume import has_only_weights
from lisa_dist.core.layer_weights import split_columns
from lisa_dist.core.weight_store import check_store
from lisa_dist.distributed.collectives import raise_shared
from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError, check_folder, read_json, read_text
from lisa_dist.run.arguments import RunConfig
from lisa_dist.run_folder import (
    RUN_NAME,
    STATE_NAME,
    TRAINER_STATE_NAME,
    check_overwrites,
    check_state,
    read_object,
)
from lisa_dist.shapes import misfit
from lisa_dist.train.resume import check_saved_by_trainer

_TOKENIZERS = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "*.model", "*.tiktoken", "tekken.json")


def check_files(config: RunConfig) -> None:
    """Raise UserError for a folder or a file that cannot be what its flag says; checkpoints are `check_resume`'s."""
    if not config.training.output_dir:
        raise UserError("--output_dir is empty: give a folder.")
    check_folder("--output_dir", Path(str(config.training.output_dir)))
    loads_by: Any = config.training.model_init_kwargs  # JSON of a command line is an object by now
    check_model_folder(str(config.model.model_name_or_path), loads_by or {})
    if config.run.method == "lisa":
        check_store(config.lisa.lisa_frozen_store)
        if config.lisa.lisa_weights_file is not None:
            read_text("--lisa_weights_file", split_columns(config.lisa.lisa_weights_file)[0])


def check_model_folder(name: str, loads_by: dict[str, Any]) -> None:
    """Raise UserError for a model's folder without configuration, tokenizer or weights, or with damaged ones.

    A name that is no path is one of the hub; `loads_by` are the arguments of from_pretrained.
    """
    folder, flag = Path(name), f"--model_name_or_path {name}"
    try:
        if not folder.is_dir():
            if os.path.lexists(folder):
                raise UserError(f"{flag}: is a file; give the folder of a model.")
            return
    except OSError as error:
        raise UserError(f"{flag}: cannot be read ({error.strerror}).") from error
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        rule = "it holds an adapter; merge it into its model first" if adapter else "give the folder of a model"
        raise UserError(f"{flag}: there is no config.json in it; {rule}.")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).exists():
            read_object(folder / file)
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise UserError(f"{flag}: there is no tokenizer in it; save the model's there, by save_pretrained.")
    if not {"variant", "gguf_file"} & set(loads_by):  # which are files of other names
        _check_weights(folder, flag)


def _check_weights(folder: Path, flag: str) -> None:
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{flag}: there are no weights in it, such as {SAFE_WEIGHTS_NAME}.")
    shards = {found}
    if found.endswith(".json"):
        index = read_object(folder / found)
        if wrong := misfit(index, {"weight_map": dict}) or misfit([*index["weight_map"].values()], [str]):
            raise UserError(f"{folder / found}: is damaged: {wrong}.")
        shards = set(index["weight_map"].values())
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise UserError(f"{flag}: {found} names {shard}, and there is no such file.")
        if shard.endswith(".safetensors"):
            try:
                with safe_open(folder / shard, framework="pt"):  # whose header says how long the file must be
                    pass
            except (SafetensorError, OSError) as error:
                raise UserError(f"{flag}: {shard} is damaged ({error}).") from error


def check_resume(wanted: str | bool | None, output_dir: Path, method: str, overwrites: bool = False) -> None:
    """Raise UserError on all ranks for a checkpoint that cannot be resumed, as far as its small files tell.

    So it does for a run that would write over another one without being asked by `overwrites`. All ranks call it: rank
    0's view of the folders counts.
    """
    problem = None
    if os.environ.get("RANK", "0") == "0":
        try:
            if wanted not in (None, False):
                if (output_dir / RUN_NAME).is_file():
                    read_object(output_dir / RUN_NAME)
                (_check_lisa if method == "lisa" else _check_other)(wanted, output_dir, method)
            check_overwrites(str(output_dir), wanted, overwrites)
        except UserError as error:
            problem = str(error)
        except OSError as error:  # a name that is too long, or a folder that may not be looked into
            problem = f"--resume_from_checkpoint {wanted}: cannot be read ({error.strerror})."
    raise_shared(problem)


def _check_lisa(wanted: str | bool | None, output_dir: Path, method: str) -> None:
    if wanted in (True, "auto"):
        found = _newest(output_dir)
        if found is not None:
            check_saved_by_trainer(*found)
        elif wanted is True:
            raise UserError(
                f"--resume_from_checkpoint true: there is no whole checkpoint in --output_dir {output_dir}; leave it "
                "out, or give auto, to begin at step 0."
            )
        return
    folder = Path(str(wanted))
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {folder}: no such folder.")
    if not has_only_weights(folder):  # from which a new run begins
        check_saved_by_trainer(folder, check_state(folder))


def _newest(output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that was saved last, and its state."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        try:
            read_json(folder / STATE_NAME)
        except DamagedError:  # passed over with a warning when the run resumes
            continue
        found.append((folder, check_state(folder)))
    return max(found, key=lambda one: one[1]["saved_at"], default=None)


def _check_other(wanted: str | bool | None, output_dir: Path, method: str) -> None:
    """Check a checkpoint of --method full or lora, which is the Trainer's own."""
    last = get_last_checkpoint(output_dir) if wanted is True and output_dir.is_dir() else wanted
    if last in (None, True):
        raise UserError(f"--resume_from_checkpoint true: there is no checkpoint in --output_dir {output_dir}.")
    folder = Path(str(last))
    flag = f"--resume_from_checkpoint {folder} with --method {method}"
    if not folder.is_dir():
        raise UserError(f"{flag}: no such folder.")
    if (folder / STATE_NAME).exists():
        raise UserError(
            f"{flag}: it is a checkpoint of --method lisa, which resumes it; to begin from its weights, give what "
            "lisa-dist export makes of it as --model_name_or_path."
        )
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"{flag}: there is no {TRAINER_STATE_NAME} in it; give a checkpoint that a trainer has saved.")
    read_object(folder / TRAINER_STATE_NAME)


def given_resume(training: TrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint`: true, false, auto or a path."""
    value = training.resume_from_checkpoint
    return {"true": True, "false": False}.get(str(value).lower(), value)
