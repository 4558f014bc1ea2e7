"""`lisa-dist check`: what would end a run on several hosts after minutes or days, found in seconds and named by host.

One process on each host, as `srun --ntasks-per-node=1 lisa-dist check ...` starts them, with the flags of the run. They
meet where its ranks will, at MASTER_ADDR, and compare what they have. Rank 0 prints what is wrong.
"""

import hashlib
import json
import os
import platform
import re
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from torch import distributed as dist

from lisa_dist.core.layer_weights import split_columns
from lisa_dist.distributed.health import host_name, version_of
from lisa_dist.distributed.ranks import expand_hosts, set_rank
from lisa_dist.errors import UserError
from lisa_dist.flags import FlagParser
from lisa_dist.text import format_bytes

PACKAGES = ("lisa_dist", "torch", "deepspeed", "transformers", "accelerate", "trl", "datasets", "bitsandbytes")
PACKAGES += ("triton", "flash-attn", "liger-kernel")
_COMPARED = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz")  # files of a run that all hosts must have
_APPEARS = 10.0  # seconds for a file that one host has written to be seen on another: network file systems cache
_SAMPLE = 1 << 26  # bytes that are written to learn how fast the folder is


@dataclass
class CheckArguments:
    """Flags of `lisa-dist check`; all others are taken for the run's."""

    config: str | None = field(default=None, metadata={"help": "Recipe of the run, as for train."})
    output_dir: str | None = field(default=None, metadata={"help": "Of the run; every host must see it."})
    gpus_per_node: int = field(default=0, metadata={"help": "GPUs that each host must have."})
    save_within: float = field(
        default=0.0, metadata={"help": "Seconds between the signal that stops the job and its end; 0: not checked."}
    )
    meet_within: float = field(default=60.0, metadata={"help": "Seconds to wait for the other hosts."})


USAGE = "lisa-dist check --config recipe.yaml --output_dir DIR [--any_flag_of_the_run value ...], on every host"
HELP = {
    "The run": {
        "config": "its recipe; other flags are taken for the run's",
        "output_dir": "its folder, which every host must see",
    },
    "What must hold": {
        "gpus_per_node": "GPUs that each host must have",
        "save_within": "seconds from the stop signal to the end of the job; 0: not checked",
        "meet_within": "seconds to wait for the other hosts",
    },
}


def main(argv: Sequence[str]) -> None:
    """Check this host and compare it with the others; exit status 2 on every host when anything is wrong."""
    host = host_name()
    try:
        parser = FlagParser([CheckArguments], USAGE, HELP)
        arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        set_rank()
        problems = _Host(host, arguments, _flags(arguments, rest)).check()
    except UserError as error:
        problems = [f"host {host}: {error}"]
    for problem in problems:
        print(f"lisa-dist check: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(2 if problems else 0)


def _flags(arguments: CheckArguments, rest: Sequence[str]) -> dict[str, str]:
    """The run's flags, from its recipe and the command line."""
    flags = {}
    if arguments.config is not None:
        try:
            flags = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {arguments.config}: cannot be read ({error}).") from error
        if not isinstance(flags, dict):
            raise UserError(f"--config {arguments.config}: holds no flags, such as learning_rate: 1.0e-5.")
    name, values = None, []
    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            flags[name] = " ".join(values) or "true"
        name, values = word.removeprefix("--").replace("-", "_"), []  # the run's parser takes both
    if arguments.output_dir is not None:
        flags["output_dir"] = arguments.output_dir
    if "output_dir" not in flags:
        raise UserError("--output_dir is missing: give the run's, or a --config that has it.")
    return flags


class _Host:
    """One host's checks, and its part of the comparison.

    Hosts meet at a store that rank 0 keeps. It waits `meet_within` for all of them together; the others wait longer for
    its verdict, so that what is said of a host that does not come is said by rank 0 alone, with all else that is wrong.
    """

    def __init__(self, host: str, arguments: CheckArguments, flags: dict):
        self._host, self._arguments, self._flags = host, arguments, flags
        self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._folder = Path(flags["output_dir"])

    def check(self) -> list[str]:
        """What is wrong, in sentences with the host and a way out; of other hosts too, on rank 0."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        problems, speed = self._gpus(), 0.0
        try:
            speed = self._write()
        except OSError as error:
            problems.append(
                f"--output_dir {self._folder} cannot be written ({error.strerror or error}): mount it there, or give "
                "another one"
            )
        mine = {
            "host": self._host,
            "folder": str(self._folder),
            "problems": problems,
            "has": self._has(),
            "bytes_a_second": speed,
        }
        try:
            socket.getaddrinfo(address, port)
        except OSError as error:
            text = f"MASTER_ADDR {address}: {error.strerror}; export one that every host resolves"
            return [f"host {self._host}: {one}" for one in [*problems, text]]
        try:
            return self._compare(address, port, mine)
        except dist.DistError:
            text = (
                f"nobody answers at MASTER_ADDR {address}, port {port}: the first host's check has not started, or the "
                "port is closed between them; export another MASTER_ADDR or MASTER_PORT"
            )
            return [f"host {self._host}: {one}" for one in [*problems, text]]

    def _gpus(self) -> list[str]:
        wanted, found = self._arguments.gpus_per_node, torch.cuda.device_count()
        if found >= wanted:
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        about = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
        return [
            f"{found} GPUs are visible, not {wanted} (--gpus_per_node){about}: ask the scheduler for more, by "
            "--gpus-per-node, or give fewer"
        ]

    def _write(self) -> float:
        """Bytes a second that this host writes to the output folder; OSError where it cannot."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"tmp-check-{uuid.uuid4().hex}"
        size = _SAMPLE if self._arguments.save_within else 1
        try:
            with path.open("wb") as file:
                started = time.monotonic()
                file.write(os.urandom(1 << 20) * max(1, size >> 20))
                file.flush()
                os.fsync(file.fileno())
                return size / (time.monotonic() - started)
        finally:
            path.unlink(missing_ok=True)

    def _has(self) -> dict[str, str]:
        """What must be the same everywhere."""
        has = {"Python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
        has["the code of lisa_dist"] = _digest(sorted(Path(__file__).parents[1].rglob("*.py")))
        model = self._flags.get("model_name_or_path")
        files = [("--config", self._arguments.config), ("--model_name_or_path", model and f"{model}/config.json")]
        for flag in ("dataset_name", "eval_dataset_name", "lisa_weights_file", "deepspeed"):
            names = self._flags.get(flag) or []
            for name in names.split() if isinstance(names, str) else names:
                path = split_columns(name)[0] if flag == "lisa_weights_file" else re.sub(r"#\d+$", "", name)
                files.append((f"--{flag}", path))
        for flag, path in files:
            if path is None or (flag != "--config" and Path(path).suffix not in _COMPARED):
                continue
            is_model_of_hub = flag == "--model_name_or_path" and not Path(path).exists()
            missing = "not here" if is_model_of_hub else "no such file"
            has[f"{flag} {path}"] = _digest([Path(path)]) if Path(path).is_file() else missing
        return has

    def _compare(self, address: str, port: int, mine: dict) -> list[str]:
        self._meets_until = time.monotonic() + self._arguments.meet_within
        patience = timedelta(seconds=self._arguments.meet_within)
        store = dist.TCPStore(address, port, self._world_size, self._rank == 0, patience, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=self._arguments.meet_within + 2 * _APPEARS))
        token = self._folder / f"tmp-check-{os.environ['MASTER_PORT']}-shared"
        if self._rank == 0:
            if not mine["problems"]:
                token.touch()
            store.set("token", str(token))
        store.get("token")
        mine["sees"] = bool(mine["problems"]) or _appears(token)
        store.set(f"host {self._rank}", json.dumps(mine))
        if self._rank != 0:
            verdict = store.get("verdict")
            store.set(f"left {self._rank}", "")
            if verdict != b"good":
                raise SystemExit(2)  # rank 0 says why
            return []
        try:
            problems, arrived = self._judge(store)
            store.set("verdict", "bad" if problems else "good")
            with suppress(dist.DistError):  # a host that has been killed meanwhile
                store.wait([f"left {rank}" for rank in arrived if rank != 0], timedelta(seconds=_APPEARS))
            return problems
        finally:
            token.unlink(missing_ok=True)

    def _judge(self, store: dist.TCPStore) -> tuple[list[str], list[int]]:
        """Rank 0: what the hosts say, and where they differ from this one; and the ranks that have come."""
        problems, reports, arrived = [], [], []
        while True:  # `check` says without waiting what has come; `wait` would print the stack when something has not
            missing = [rank for rank in range(self._world_size) if not store.check([f"host {rank}"])]
            if not missing or time.monotonic() > self._meets_until:
                break
            time.sleep(0.05)
        for rank in range(self._world_size):
            if rank in missing:
                within = f"{self._arguments.meet_within:.0f} s (--meet_within)"
                problems.append(
                    f"{_name_of_task(rank)} has not come within {within}: it is down, or MASTER_ADDR is another one "
                    "there"
                )
            else:
                reports.append(json.loads(store.get(f"host {rank}")))
                arrived.append(rank)
        for report in reports:
            found = list(report["problems"])
            if not report["sees"]:
                found.append(
                    f"--output_dir {report['folder']} is another one: what host {self._host} writes is not seen there; "
                    "give a folder on a file system that all share"
                )
            theirs, ours = report["has"], reports[0]["has"]
            found += [
                f"{name} is {theirs.get(name, 'not there')}, on host {self._host} {ours.get(name, 'not there')}"
                for name in {**ours, **theirs}
                if theirs.get(name) != ours.get(name)
            ]
            problems += [f"host {report['host']}: {text}" for text in found]
        if not problems:
            problems += self._time_to_save([report["bytes_a_second"] for report in reports])
        if not problems:
            hosts = ", ".join(report["host"] for report in reports)
            print(f"lisa-dist check: {len(reports)} host(s) are fit: {hosts}", flush=True)
        return problems, arrived

    def _time_to_save(self, bytes_a_second: list[float]) -> list[str]:
        """What is wrong with the time for a save: rank 0 writes weights, all write states, and read all of it back."""
        within = self._arguments.save_within
        if not within:
            return []
        try:
            weights, states = _checkpoint_bytes(self._flags)
        except UserError as error:
            return [str(error)]
        all_hosts = sum(bytes_a_second)
        seconds = weights / bytes_a_second[0] + (states + weights + states) / all_hosts
        print(
            f"lisa-dist check: a checkpoint has about {format_bytes(weights + states)}, and is saved in about "
            f"{seconds:.0f} s, as rank 0 writes {format_bytes(bytes_a_second[0])}/s and all hosts "
            f"{format_bytes(all_hosts)}/s",
            flush=True,
        )
        if seconds > within:
            return [
                f"a save takes about {seconds:.0f} s, and the job ends {within:.0f} s (--save_within) after its "
                "signal: send it earlier, or write to a faster folder"
            ]
        left = int(os.environ.get("SLURM_JOB_END_TIME", 2**62)) - time.time()
        if left < within + seconds:
            return [f"the job ends in {left:.0f} s, before it could train and save: give it more time"]
        return []


def _name_of_task(rank: int) -> str:
    """Rank so-and-so, and its host where there is one task on each host of a SLURM step."""
    hosts = expand_hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    return f"rank {rank}, host {hosts[rank]}," if rank < len(hosts) else f"rank {rank}"


def _checkpoint_bytes(flags: dict) -> tuple[int, int]:
    """Of the weights, and of masters and moments of what is active.

    About: embeddings may be frozen, states have 8 bits. Raises UserError where there is no model to tell from.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from lisa_dist.config import LisaConfig
    from lisa_dist.core.blocks import find_blocks

    name = flags.get("model_name_or_path")
    if flags.get("method") == "lora":
        raise UserError("--save_within with --method lora: a checkpoint of adapters is small; leave it out.")
    if name is None:
        raise UserError("--save_within needs the run's --model_name_or_path, or a --config that has it.")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise UserError(
            f"--model_name_or_path {name}: no such folder, and no such model can be reached on the hub "
            f"({type(error).__name__})."
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = find_blocks(model, None)
    layers = [block.numel for block in blocks.layers]
    gamma = int(flags.get("lisa_activated_layers", LisaConfig().lisa_activated_layers))
    total = active = sum(block.numel for block in blocks)
    if flags.get("method", "lisa") == "lisa":
        active = total - sum(layers) + min(gamma, len(layers)) * max(layers)
    # In bf16 unless told otherwise where there are GPUs, as the run itself.
    in_bf16 = str(flags.get("bf16", torch.cuda.is_available())).lower() == "true"
    return total * (2 if in_bf16 else 4), 12 * active


def _appears(path: Path) -> bool:
    """Whether a file of another host comes to be seen here."""
    ends = time.monotonic() + _APPEARS
    while not path.exists():
        if time.monotonic() > ends:
            return False
        time.sleep(0.2)
    return True


def _digest(paths: Sequence[Path]) -> str:
    """A few digits that tell files with different bytes apart."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
