"""`lisa-dist export`: a checkpoint as a folder that `from_pretrained` loads."""

from pathlib import Path

from safetensors import SafetensorError

from lisa_dist.checkpoint.export import export_checkpoint
from lisa_dist.commands import exit_on_error
from lisa_dist.errors import UserError
from lisa_dist.run_folder import STATE_NAME, check_state

KEEP = "--keep_adapter"  # in a folder of PEFT's, in the place of merging it


def main(folder: str, out: str, *more: str) -> None:
    """Export the checkpoint and print where it is."""
    with exit_on_error("lisa-dist export", OSError, SafetensorError):
        if more not in ((), (KEEP,)):
            raise UserError(f"{more[0]}: what may come after CHECKPOINT OUT is {KEEP}.")
        if (Path(folder) / STATE_NAME).exists():
            check_state(Path(folder))
        export_checkpoint(folder, out, keep_adapter=bool(more))
    print(f"saved {out}; load it with from_pretrained")
