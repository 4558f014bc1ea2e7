"""What the benchmark scripts share: starting ranks, and writing a table and JSON."""

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch


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
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
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
    packages = ("torch", "deepspeed", "transformers", "trl", "lisa_dist")
    about = {
        # Where someone's files lie is nobody else's business: absolute paths keep their last part alone.
        "command": shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: metadata.version(name) for name in packages},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written to {path}")


def group_parser(about: str, results: str, *, shrink: int) -> argparse.ArgumentParser:
    """The flags of a script that compares arms on groups of ranks (arms.py, rank_group.py)."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    parser.add_argument("--model", default="llama2-7b", help="shipped config, folder or hub id; weights are random")
    parser.add_argument("--shrink", type=int, default=shrink, help="its widths and vocabulary are divided by this")
    parser.add_argument("--num_layers", type=int, help="instead of the model's own")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / results)
    return parser
