"""The files that a run leaves in its output folder, for those who write them and those who read them."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lisa_dist.errors import UserError
from lisa_dist.files import DamagedError, naming_lost_files, read_json, read_regular, replacing
from lisa_dist.shapes import Each, count, misfit, number

RUN_NAME = "lisa_run.json"  # settings, model, versions
LOG_NAME = "lisa_log.jsonl"  # a line for each period
STEPS_NAME = "lisa_steps.jsonl"  # a line for each log of the Trainer's, while the run goes on
MOVEMENT_LOG = "lisa_movement.jsonl"  # a line for each period
ANSWERS_NAME = "lisa_answers.jsonl"  # a line for each answer to --sample_prompt
MEMORY_NAME = "lisa_memory.json"  # one step, planned and measured
NORMS_NAME = "lisa_norms.csv"  # a line for each block
IDENTITY_NAME = "lisa_identity.json"  # of a checkpoint of a trainer: what makes its run this run
STATE_NAME = "lisa_state.json"  # of a checkpoint: all but weights and optimizer states
TRAINER_CHECKPOINT_NAME = "lisa_checkpoint.json"  # of a checkpoint of --method full or lora: its files and their sums
ADAPTER_FILE = "adapter/adapter_model.safetensors"  # of a checkpoint or an exported model, with PEFT's config
TRAINER_STATE_NAME = "trainer_state.json"  # transformers.trainer's, which takes long to import
# The columns of lisa_norms.csv after the block, and one more of runs with adapters.
NORMS = ("weight_norm", "update_norm", "moved_norm")
PRODUCT = "product_norm"
_HIDDEN = "***"
# Names of secrets. Those of a tokenizer's special tokens are none.
_SECRET = re.compile(
    r"(?<!bos)(?<!eos)(?<!pad)(?<!unk)(?<!sep)(?<!cls)(?<!mask)(?:\b|_|(?-i:(?<=[a-z0-9])(?=[A-Z])))"
    r"(?:token|secret|pass(?:word|wd|phrase)|credentials?|authorization|(?:api|access|secret|private)[_-]?key)$",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,})")
# Rows of a table of lisa_memory.json: the title of a part, and the fields that it is the sum of.
MEMORY_PARTS = (
    ("weights", ("weights",)),
    ("states, always on", ("always_on_states",)),
    ("states, active blocks", ("active_states",)),
    ("gradients", ("gradients",)),
    ("buffers", ("buffers",)),
    ("weights gathered", ("gathered",)),
    ("activations", ("activations",)),
    ("logits", ("logits",)),
    ("beyond these at the peak", ("temporary",)),
)
# Of a plan: the last of them by what has it.
REFERENCE = ("reference model", ("reference",))  # of some tasks
PLANNED_PARTS = (
    MEMORY_PARTS[0],
    REFERENCE,
    *MEMORY_PARTS[1:-1],
    ("gradients by the peak", ("by_then",)),
    ("their buckets", ("buckets_at_peak",)),
    ("layers and loss, for a moment", ("passes",)),
    ("the optimizer, for a moment", ("step",)),
)

_LOGS = (LOG_NAME, STEPS_NAME, MOVEMENT_LOG, ANSWERS_NAME, MEMORY_NAME, NORMS_NAME, TRAINER_STATE_NAME)
# Flags that say how a run begins, not what it is; and files by which a folder has a model.
_OF_A_RESUME = ("--resume_from_checkpoint", "--overwrite_output_dir")
_WEIGHTS = ("*.safetensors", "*model*.bin")


def check_overwrites(output_dir: str, resume: str | bool | None, is_asked_for: bool) -> None:
    """Raise UserError for a run that would begin in a folder with the model or the checkpoints of another one.

    `resume` is the value of --resume_from_checkpoint, `is_asked_for` that of --overwrite_output_dir. A run that was
    cut before its first checkpoint has left nothing that could be lost.
    """
    folder = Path(output_dir)
    if is_asked_for or not os.path.isdir(output_dir):
        return
    checkpoints = _checkpoints(folder)
    if goes_on(folder, resume) and (resume != "auto" or checkpoints):
        return
    weights = [path for names in _WEIGHTS for path in sorted(folder.glob(names))]
    if not (found := [*weights, *checkpoints]):
        return
    or_resume = "--resume_from_checkpoint auto to go on with its run, " if checkpoints else ""
    raise UserError(
        f"--output_dir {output_dir}: has {found[0].name}, which this run would write over; give another folder, "
        f"{or_resume}or --overwrite_output_dir true."
    )


def check_log_files(output_dir: Path) -> None:
    """Raise UserError if a folder is in the place of a file that a run writes, or of its temporary file."""
    for path in (output_dir / f"{prefix}{name}" for name in (RUN_NAME, *_LOGS) for prefix in ("", "tmp-")):
        if path.is_dir() and not path.is_symlink():  # a link is replaced
            raise UserError(
                f"--output_dir {output_dir}: {path.name} is a folder, and the run writes a file of that name. Remove "
                "it, or give another --output_dir."
            )


def goes_on(folder: Path, resume: str | bool | None) -> bool:
    """Whether a run with this value of --resume_from_checkpoint goes on with that of the folder, if there is one."""
    wanted = str(resume)
    parents = (os.path.dirname(os.path.realpath(wanted)), os.path.realpath(os.path.dirname(os.path.abspath(wanted))))
    return (
        wanted.lower() == "true" or wanted == "auto" or (os.path.isdir(wanted) and os.path.realpath(folder) in parents)
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-[0-9]*") if path.is_dir() or path.is_symlink())


def write_run(folder: Path, run: dict, resumes: bool = False) -> None:
    """Write lisa_run.json, on one rank.

    A new run removes the logs and checkpoints of an earlier one from the folder. A resumed run keeps the first command
    and adds its own to `resumed`, with the values `before` it of flags that it changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if resumes and (folder / RUN_NAME).is_file():
        first = read_object(folder / RUN_NAME)
        kept = {name: first[name] for name in ("began", "command", "given") if name in first}
        earlier = first.get("resumed")
        earlier = earlier if isinstance(earlier, list) else []
        resume: dict[str, Any] = {name: run[name] for name in ("began", "command")}
        now, then = run.get("flags", {}), first.get("flags", {})
        other = [name for name in then if name in now and now[name] != then[name] and name not in _OF_A_RESUME]
        resume |= {"before": {name: then[name] for name in other}} if other else {}
        run = run | kept | {"resumed": [*earlier, resume]}
    elif not resumes:
        for name in _LOGS:
            (folder / name).unlink(missing_ok=True)
        for path in _checkpoints(folder):  # or --resume_from_checkpoint true might go on with one of them
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    with replacing(folder / RUN_NAME) as path:
        path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def without_secrets(argv: Iterable[str]) -> list[str]:
    """A command line with *** in place of tokens, keys and passwords, those in JSON too."""
    kept, hides = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            kept.append(_HIDDEN if hides else hide_secrets(word))
        else:
            kept.append(f"{name}={hide_secrets(value, name)}" if equals else word)
        hides = not equals and _SECRET.search(name) is not None
    return kept


def hide_secrets(value: Any, name: str = "") -> Any:
    """A value, or the dicts and lists in it, with *** in place of tokens, keys and passwords.

    They are known by the name that they have, or by how they begin: those of the Hugging Face hub, GitHub and OpenAI.
    """
    if isinstance(value, dict):
        return {key: hide_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_secrets(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET.search(name):
        return _HIDDEN
    if value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):  # no JSON
            given = json.loads(value)
            hidden = hide_secrets(given)
            value = value if hidden == given else json.dumps(hidden)
    return _TOKEN.sub(_HIDDEN, value)


def read_object(path: Path) -> dict:
    """A JSON file that holds one object. Raises ValueError naming a file that cannot be read."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged: it holds no object.")
    return content


def _warn(problem: str) -> None:
    print(f"warning: {problem}", flush=True)


def read_lines(path: Path, shape: Any = None, warn: Callable[[str], None] = _warn) -> list[dict]:
    """The lines of a .jsonl log that have a step and are of a shape, none where there is no file.

    A line cut short by a kill ends it; others that are damaged are left out, and `warn` is told which.
    """
    lines = []
    content = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number_of_line, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            found, read = None, json.loads(line)
        except (ValueError, RecursionError) as error:
            found, read = f"is not JSON ({error})", None
        found = found or misfit(read, {"step": count}) or (shape and misfit(read, shape))
        if found:
            warn(f"{path}: line {number_of_line} is damaged, and left out: {found}.")
        else:
            lines.append(read)
    return lines


def append_line(path: Path, line: dict, keep: Callable[[dict], bool] | None = None) -> None:
    """Add a line to a .jsonl log. With `keep` it is a run's first: of the lines that are there it says which stay.

    Raises SaveError where the file system refuses it. A resumed run leaves out a line that was cut then.
    """
    with naming_lost_files(path.parent):
        if keep is not None:
            earlier = [one for one in read_lines(path) if keep(one)]
            with replacing(path) as new:
                new.write_text("".join(json.dumps(one) + "\n" for one in earlier), encoding="utf-8")
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


STATE_FORMAT = 1  # of lisa_state.json
# What is read of a checkpoint's state before an engine is there; of one of a newer format, that it is one.
_ANY_STATE = {"format": count, "saved_at": number, "versions": {"lisa_dist": str}}
_FILES = {"world_size": count, "files": Each({"bytes": count, "sha256": str})}
_STATE = _ANY_STATE | _FILES | {"lisa": {"config": dict}}


def check_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's lisa_state.json.

    Raises DamagedError where it is damaged, or was written by something else; UserError where by a newer release.
    """
    path = folder / STATE_NAME
    state = read_json(path)
    found = misfit(state, _ANY_STATE)
    if found is None and state["format"] > STATE_FORMAT:
        raise UserError(
            f"{path} has format {state['format']}, written by lisa_dist {state['versions']['lisa_dist']}; this release "
            f"reads up to {STATE_FORMAT}: upgrade lisa_dist."
        )
    if found := found or misfit(state, _STATE):
        raise DamagedError(f"{path} is damaged, or not of a LISA run: {found}.")
    return state


def check_trainer_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's lisa_checkpoint.json. Raises DamagedError if it is damaged."""
    path = folder / TRAINER_CHECKPOINT_NAME
    state = read_json(path)
    if found := misfit(state, {"saved_at": number} | _FILES):
        raise DamagedError(f"{path} is damaged: {found}.")
    return state
