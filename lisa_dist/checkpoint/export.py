"""Export a checkpoint: a folder with the model alone, which `from_pretrained` loads."""

import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from lisa_dist.checkpoint.folders import put_in_place
from lisa_dist.checkpoint.optimizer_states import STATE_FILES
from lisa_dist.checkpoint.resume import read_state
from lisa_dist.checkpoint.weights import export_weights, has_weights
from lisa_dist.distributed.collectives import describe_files
from lisa_dist.errors import UserError
from lisa_dist.run_folder import STATE_NAME

# Files of a checkpoint that are not copied; weights are exported by themselves.
_NOT_THE_MODEL = (
    STATE_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "rng_state*",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


def export_checkpoint(folder: str | Path, out: str | Path) -> None:
    """Turn a checkpoint into a folder that `from_pretrained` loads, with nothing else in it; needs no ranks and no GPU.

    Raises ValueError when a file of the checkpoint is damaged, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / STATE_NAME).is_file():
        raise UserError(f"{folder} is no checkpoint of a LISA run: there is no {STATE_NAME} in it{_advice(folder)}.")
    if out.exists():
        raise UserError(f"{out} is there already: choose a folder that is not.")
    state = read_state(folder)
    if "config.json" not in state["files"]:
        raise UserError(f"{folder}: there is no config.json in it, which says what model it is; it cannot be exported.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {out.parent} can be no folder ({error.strerror}); choose another.") from error
    staging = Path(tempfile.mkdtemp(prefix=f"tmp-{out.name}-", dir=out.parent))
    try:
        export_weights(folder, staging)
        for name in state["files"]:
            if not any(fnmatch(name, pattern) for pattern in _NOT_THE_MODEL):
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging / name)
        describe_files(staging)  # flushes them
        put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _advice(folder: Path) -> str:
    """What to do with a folder of another method's run, which needs no export."""
    if has_weights(folder):
        return "; it holds a model already, which from_pretrained loads as it is"
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter: from_pretrained loads it with its base, and peft's merge_and_unload() merges it"
    return ""
