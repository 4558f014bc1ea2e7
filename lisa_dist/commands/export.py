"""`lisa-dist export`: a checkpoint as a folder that `from_pretrained` loads."""

from pathlib import Path

from safetensors import SafetensorError

from lisa_dist.checkpoint.export import export_checkpoint
from lisa_dist.commands import exit_on_error
from lisa_dist.errors import UserError
from lisa_dist.report.hub import upload, write_card_of_checkpoint
from lisa_dist.run_folder import STATE_NAME, check_state

KEEP = "--keep_adapter"  # in a folder of PEFT's, in the place of merging it
PUSH = "--push_to_hub"  # with the name of a model of the hub


def main(folder: str, out: str, *more: str) -> None:
    """Export the checkpoint, with a model card where it lies in its run's folder, and print where it is."""
    with exit_on_error("lisa-dist export", OSError, SafetensorError):
        pushes, name = PUSH in more, ""
        if pushes:
            at = more.index(PUSH)
            name, more = "".join(more[at + 1 : at + 2]), more[:at] + more[at + 2 :]
            if not name or name.startswith("-"):
                raise UserError(f"{PUSH}: give the name of a model of the hub, as {PUSH} me/{Path(out).name}.")
        if more not in ((), (KEEP,)):
            raise UserError(f"{more[0]}: what may come after CHECKPOINT OUT is {KEEP}, and {PUSH} NAME.")
        if (Path(folder) / STATE_NAME).exists():
            check_state(Path(folder))
        export_checkpoint(folder, out, keep_adapter=bool(more))
        write_card_of_checkpoint(Path(folder), Path(out), name)
        print(f"saved {out}; load it with from_pretrained")
        if pushes:
            upload(Path(out), name)
            print(f"pushed to {name}")
