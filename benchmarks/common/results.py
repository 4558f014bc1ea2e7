"""What every benchmark shares: its flags and its results file."""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from lisa_dist.files import replacing

STARTED = time.monotonic()
RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft", "bitsandbytes", "triton", "flash-attn", "liger-kernel")
PACKAGES += ("lisa_dist",)


def parser_of(about: str, results: str, with_data: bool = False) -> argparse.ArgumentParser:
    """The flags of a benchmark, also of a real model on real data. `results`: the name of its results file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / f"{results}.json")
    if with_data:
        parser.add_argument("--model", required=True, help="folder or hub id")
        parser.add_argument("--dataset", required=True, help="question/answer examples, .jsonl")
    return parser


def positive(word: str) -> int:
    """A flag's number of things, of which there is at least one."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def write_results(path: Path, figures: dict, quiet: bool = False) -> None:
    """Write figures as JSON, with the machine, the versions and the command that made them."""
    module = ".".join(Path(sys.argv[0]).with_suffix("").parts[-3:])
    about = {
        "command": shlex.join(["python", "-m", module, *map(_without_folders, sys.argv[1:])]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "seconds": round(time.monotonic() - STARTED),  # that all of it took
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged:
        staged.write_text(json.dumps(about | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {path}")


def _without_folders(word: str) -> str:
    """A word of a command; of a path elsewhere the last part, since where someone's files lie is nobody's business."""
    flag, equals, value = word.partition("=")
    if equals and value.startswith("/"):
        return f"{flag}={Path(value).name}"
    return Path(word).name if word.startswith(("/", "..")) else word


def versions() -> dict[str, str]:
    """Of Python and of what is installed among PACKAGES; with a GPU also of torch's CUDA."""
    installed = {found.metadata["Name"].lower().replace("_", "-") for found in metadata.distributions()}
    found = {name: metadata.version(name) for name in PACKAGES if name.replace("_", "-") in installed}
    cuda = {"cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {"python": platform.python_version()} | found | cuda


def _processor() -> str:
    """The name of this machine's CPU, where Linux knows it."""
    cpus = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
