"""The hub: a model card that says how a run trained, and uploads whose errors say what to do."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_save
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from lisa_dist.distributed.collectives import sharing_errors
from lisa_dist.errors import UserError
from lisa_dist.report.html import figures_of
from lisa_dist.report.run_files import read_run
from lisa_dist.run_folder import RUN_NAME
from lisa_dist.text import format_bytes

CARD_NAME = "README.md"
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of the library that the hub's own has for HTTP: it has changed twice
_PIPELINES = {"reward": "text-classification"}
_WAYS_OUT = {
    401: "log in by `hf auth login`, or set HF_TOKEN",
    403: "take a token that may write there, or another name",
    413: "the file is too large for it; ask for a larger quota",
}


def write_card(run_folder: str | Path, to: str | Path | None = None, name: str | None = None, **_: Any) -> Path:
    """Write the model card of the run in a folder, by default into it; returns its path.

    What the Trainer gives to `create_model_card` besides is taken from the run. Paths of this machine are left out.
    Raises ValueError for a folder without a run.
    """
    run, path = read_run(run_folder), Path(to or run_folder) / CARD_NAME
    record, layers = run.run, [len(period["layers"]) for period in run.periods]
    flags = record.get("flags", {})
    base, method = record.get("model", ""), record.get("method", "")
    how = {
        "method": f"LISA: {max(layers)} of {run.num_layers} {run.unit}s at a time" if layers else method,
        "learning rate": " ".join(str(flags.get(f"--{one}", "")) for one in ("learning_rate", "lr_scheduler_type")),
        "devices": record.get("devices", ""),
        "peak of a step, planned": _peak(run.memory, "planned"),
        "peak of a step, measured": _peak(run.memory, "measured"),
        **figures_of(run),
    }
    rows = [f"| {name} | {value} |" for name, value in how.items() if str(value).strip()]
    data = without_examples(record.get("rows", []))
    command = shlex.join(map(_without_folders, shlex.split(record.get("command", ""), comments=True)))
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    source = f"[{base}](https://huggingface.co/{base})" if _is_of_hub(base) else _without_folders(base)
    parts = [
        f"# {name or Path(run_folder).resolve().name}",
        f"{source}, trained by `lisa-dist` ({record.get('task', 'sft')}).",
        "\n".join(["| | |", "|---|---|", *rows]),
        "## Data\n\n" + "\n".join(f"- {_without_folders(line)}" for line in data),
        f"## Command\n\n```\n{command}\n```\n\n{versions}",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    about: dict[str, Any] = {"library_name": "transformers", "tags": ["lisa_dist", method, record.get("task", "sft")]}
    about["pipeline_tag"] = _PIPELINES.get(record.get("task", ""), "text-generation")
    about |= {"base_model": base} if _is_of_hub(base) else {}
    metadata_save(path, about)
    return path


def without_examples(lines: Sequence[str]) -> list[str]:
    """Lines about data without those that show it: a model may be public where its data are not."""
    return [line for line in lines if not re.match("(first|another training) (example|row)", line)]


def _peak(memory: dict | None, which: str) -> str:
    parts = (memory or {}).get(which) or {}
    return format_bytes(parts["peak"]) if "peak" in parts else ""


def _is_of_hub(name: str) -> bool:
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _without_folders(text: str) -> str:
    """A word or a line that begins with a path, with its last part alone."""
    first, space, rest = text.partition(" ")
    name, colon, _ = first.partition(":") if first.endswith(":") else (first, "", "")
    return (name if _is_of_hub(name) or "://" in name else Path(name).name or name) + colon + space + rest


@contextlib.contextmanager
def naming_the_hub(what: str, then: str) -> Iterator[None]:
    """Raise UserError for what the hub refuses, or where it cannot be reached; `then` is the end of its message."""
    try:
        yield
    except (_HTTP_ERROR, OSError) as error:
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        if status is not None:
            why = f"the hub answers {status}"
            way_out = _WAYS_OUT.get(status, "see https://status.huggingface.co, and try again")
        elif isinstance(error, LocalTokenNotFoundError):
            why, way_out = "there is no token", _WAYS_OUT[401]
        elif isinstance(error, (OfflineModeIsEnabled, _HTTP_ERROR, ConnectionError)):
            why, way_out = (
                f"the hub cannot be reached ({type(error).__name__})",
                "look at the network, and HF_HUB_OFFLINE",
            )
        else:
            raise
        raise UserError(f"{what}: {why}; {way_out}{then}.") from error


def meet_hub(args: Any) -> None:
    """Make the repository of a run, as the Trainer would once it has loaded the model; all ranks call it.

    Raises UserError for what the hub refuses, or where it cannot be reached.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with sharing_errors(), naming_the_hub(f"--push_to_hub to {name}", ", or leave the flag out"):
        if args.process_index == 0:
            HfApi().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)


def upload(folder: Path, name: str) -> None:
    """Upload a folder as a model of the hub, a new one where there is none. Raises UserError for what is refused."""
    then = f"; the model is saved: `hf upload {name} {folder}`"
    with naming_the_hub(f"--push_to_hub {name}", then):
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="lisa-dist export")


def write_card_of_checkpoint(checkpoint: Path, out: Path, name: str) -> None:
    """The card of the run that a checkpoint is of, where its folder is that run's."""
    if (checkpoint.resolve().parent / RUN_NAME).exists():
        write_card(checkpoint.resolve().parent, out, name)
