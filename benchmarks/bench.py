"""What the benchmark scripts share: starting ranks, and writing a table and JSON."""

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

STARTED = time.monotonic()
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft", "bitsandbytes", "triton", "flash-attn", "lisa_dist")


def worker_parser(question: str, results: str) -> argparse.ArgumentParser:
    """The flags of a script that launches itself on ranks: with `--folder` it is one of them."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / results)
    return parser


def launch(script: Path, arguments: list[str], num_ranks: int) -> None:
    """Run a script under the deepspeed launcher on CPU ranks of one thread each, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | ON_CPU
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # ninja is there
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", str(num_ranks), "--master_port", str(port), str(script), *arguments]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {finished.returncode}:\n{finished.stdout[-4000:]}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A plain table, columns as wide as they need."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def stacked_bars(axes, names: list[str], parts: dict[str, list[float]]) -> None:
    """A bar for each name, from the bottom up, made of one piece after another; each part has a color."""
    left = [0.0] * len(names)
    for label, sizes in parts.items():
        axes.barh(names, sizes, left=left, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]


def write_results(path: Path, figures: dict, quiet: bool = False) -> None:
    """Write figures as JSON, with the machine, the versions and the command that made them."""
    about = {
        "command": shlex.join(["python", *map(_without_folders, sys.argv)]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version()} | _versions(),
        "seconds": round(time.monotonic() - STARTED),  # that all of it took
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {path}")


def _without_folders(word: str) -> str:
    """A word of a command; where someone's files lie is nobody else's business: of an absolute path the last part."""
    flag, equals, value = word.partition("=")
    if equals and value.startswith("/"):
        return f"{flag}={Path(value).name}"
    return Path(word).name if word.startswith("/") else word


def _versions() -> dict[str, str]:
    """Of what is installed among PACKAGES."""
    installed = {found.metadata["Name"].lower().replace("_", "-") for found in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name.replace("_", "-") in installed}


def _processor() -> str:
    """The name of this machine's CPU, where Linux knows it."""
    cpus = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def positive(word: str) -> int:
    """A flag's number of things, of which there is at least one."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def run_on_cpu() -> None:
    """Ranks that are started from now on are CPU ranks of one thread, on a machine with a GPU too."""
    os.environ |= ON_CPU
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja is there


def group_parser(about: str, results: str, *, shrink: int) -> argparse.ArgumentParser:
    """The flags of a script that compares arms on groups of CPU ranks (arms.py, rank_group.py)."""
    run_on_cpu()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    parser.add_argument("--model", default="llama2-7b", help="shipped config, folder or hub id; weights are random")
    parser.add_argument("--shrink", type=positive, default=shrink, help="its widths and vocabulary are divided by this")
    parser.add_argument("--num_layers", type=positive, help="instead of the model's own")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / results)
    return parser
