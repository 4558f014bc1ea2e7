"""The checks of `lisa-dist check`: one process on each host, before a run.

They meet where the run's ranks will, at MASTER_ADDR, and compare what they have; rank 0 reports what is wrong.
"""

import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from lisa_dist.distributed.devices import why_no_gpu
from lisa_dist.distributed.health import version_of
from lisa_dist.distributed.ranks import GLOO_INTERFACE, expand_hosts
from lisa_dist.errors import UserError
from lisa_dist.text import format_bytes, in_one_line

PACKAGES: tuple[str, ...] = ("lisa_dist", "torch", "deepspeed", "transformers", "accelerate", "trl", "datasets")
PACKAGES += ("bitsandbytes", "triton", "flash-attn", "liger-kernel")
_APPEARS = 10.0  # seconds for a file that one host has written to be seen on another: network file systems cache
_SAMPLE = 1 << 26  # bytes that are written to learn how fast the folder is


@dataclass
class HostCheck:
    """One host's checks, and its part of the comparison.

    `folder` is the run's output folder; `gpus` are those that each host must have; `files` (flag and path) must be the
    same everywhere. With `save_within` seconds for a save, `checkpoint_bytes` gives the bytes of weights and of states.

    Hosts meet at a store that rank 0 keeps. It waits `meet_within` for all of them together; the others wait longer for
    its verdict, so that rank 0 alone reports a host that does not come, with all else that is wrong.
    """

    host: str
    folder: Path
    gpus: int
    files: Sequence[tuple[str, str]]
    meet_within: float
    save_within: float
    checkpoint_bytes: Callable[[], tuple[int, int]]

    def __post_init__(self) -> None:
        self._rank, self._world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def problems(self) -> list[str]:
        """What is wrong, in sentences with the host and a way out; of other hosts too, on rank 0."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        problems, speed = self._gpus(), 0.0
        try:
            speed = self._write()
        except OSError as error:
            problems.append(
                f"--output_dir {self.folder} cannot be written ({error.strerror or error}): mount it there, or give "
                "another one"
            )
        mine = {"host": self.host, "folder": str(self.folder), "problems": problems, "has": self._has()}
        try:
            socket.getaddrinfo(address, port)
            return self._compare(address, port, mine | {"bytes_a_second": speed})
        except socket.gaierror as error:
            problems.append(f"MASTER_ADDR {address}: {error.strerror}; export one that every host resolves")
        except dist.DistError:
            problems.append(
                f"nobody answers at MASTER_ADDR {address}, port {port}: the first host's check has not started, or the "
                "port is closed between them; export another MASTER_ADDR or MASTER_PORT"
            )
        return [f"host {self.host}: {problem}" for problem in problems]

    def _gpus(self) -> list[str]:
        if why := why_no_gpu():
            return [why]
        if (found := torch.cuda.device_count()) >= self.gpus:
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        about = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
        return [
            f"{found} GPUs are visible, not {self.gpus} (--gpus_per_node){about}: ask the scheduler for more, by "
            "--gpus-per-node, or give fewer"
        ]

    def _write(self) -> float:
        """Bytes a second that this host writes to the output folder; OSError where it cannot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"tmp-check-{uuid.uuid4().hex}"
        size = _SAMPLE if self.save_within else 2**20
        try:
            with path.open("wb") as file:
                started = time.monotonic()
                file.write(os.urandom(2**20) * (size >> 20))
                file.flush()
                os.fsync(file.fileno())
                return size / (time.monotonic() - started)
        finally:
            path.unlink(missing_ok=True)

    def _has(self) -> dict[str, str]:
        """What must be the same everywhere."""
        has = {"Python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
        has["the code of lisa_dist"] = _digest(sorted(Path(__file__).parents[1].rglob("*.py")))
        for flag, path in self.files:
            is_model_of_hub = flag == "--model_name_or_path" and not Path(path).exists()
            missing = "not here" if is_model_of_hub else "no such file"
            has[f"{flag} {path}"] = _digest([Path(path)]) if Path(path).is_file() else missing
        return has

    def _compare(self, address: str, port: int, mine: dict) -> list[str]:
        meets_until = time.monotonic() + self.meet_within
        patience = timedelta(seconds=self.meet_within)
        store = dist.TCPStore(address, port, self._world_size, self._rank == 0, patience, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=self.meet_within + 2 * _APPEARS))
        token = self.folder / f"tmp-check-{os.environ['MASTER_PORT']}-shared"
        if self._rank == 0:
            if not mine["problems"]:
                token.touch()
            store.set("token", "")
        store.get("token")
        mine["sees"] = bool(mine["problems"]) or _appears(token)
        store.set(f"here {self._rank}", "")
        if self._rank == 0:
            absent = [*range(self._world_size)]
            while absent := [rank for rank in absent if not store.check([f"here {rank}"])]:
                if time.monotonic() > meets_until:  # `wait` would print the stack
                    break
                time.sleep(0.05)
            store.set("missing", json.dumps(absent))
        missing = json.loads(store.get("missing"))
        if not missing and (problem := self._why_no_gloo(store)):
            mine["problems"].append(problem)
        store.set(f"host {self._rank}", json.dumps(mine))
        if self._rank != 0:
            verdict = store.get("verdict")
            store.set(f"left {self._rank}", "")
            if verdict != b"good":
                raise SystemExit(2)  # rank 0 says why
            return []
        try:
            arrived = [rank for rank in range(self._world_size) if rank not in missing]
            problems = self._judge([json.loads(store.get(f"host {rank}")) for rank in arrived], missing)
            store.set("verdict", "bad" if problems else "good")
            with suppress(dist.DistError):  # a host that has been killed meanwhile
                store.wait([f"left {rank}" for rank in arrived if rank != 0], timedelta(seconds=_APPEARS))
            return problems
        finally:
            token.unlink(missing_ok=True)

    def _why_no_gloo(self, store: dist.TCPStore) -> str:
        """Why no group over gloo can be made, as every run has one; nothing where it can."""
        patience = timedelta(seconds=min(self.meet_within, _APPEARS))
        try:
            group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self._rank, self._world_size, patience)
            group.barrier().wait()
        except RuntimeError as error:
            over = f"{GLOO_INTERFACE} {os.environ.get(GLOO_INTERFACE, 'is not set')}"
            return f"{over}: gloo does not reach the others ({in_one_line(error)}); export the interface that does"
        return ""

    def _judge(self, reports: Sequence[dict[str, Any]], missing: Sequence[int]) -> list[str]:
        """Rank 0: what the hosts say, and where they differ from this one."""
        hosts = expand_hosts(os.environ.get("SLURM_STEP_NODELIST", ""))  # one task on each, of a step of SLURM
        problems = [
            f"rank {rank}{f', host {hosts[rank]},' if rank < len(hosts) else ''} has not come within "
            f"{self.meet_within:.0f} s (--meet_within): it is down, or MASTER_ADDR is another one there"
            for rank in missing
        ]
        ours = reports[0]["has"]
        for report in reports:
            found, theirs = list(report["problems"]), report["has"]
            if not report["sees"]:
                found.append(
                    f"--output_dir {report['folder']} is another one: what host {self.host} writes is not seen there; "
                    "give a folder on a file system that all share"
                )
            found += [
                f"{name} is {theirs.get(name, 'not there')}, on host {self.host} {ours.get(name, 'not there')}"
                for name in {**ours, **theirs}
                if theirs.get(name) != ours.get(name)
            ]
            problems += [f"host {report['host']}: {text}" for text in found]
        if not problems and self.save_within:
            problems = self._time_to_save([report["bytes_a_second"] for report in reports])
        if not problems:
            names = ", ".join(report["host"] for report in reports)
            print(f"lisa-dist check: {len(reports)} host(s) are fit: {names}", flush=True)
        return problems

    def _time_to_save(self, bytes_a_second: list[float]) -> list[str]:
        """What is wrong with the time for a save."""
        within = self.save_within
        try:
            nbytes = sum(self.checkpoint_bytes())
        except UserError as error:
            return [str(error)]
        seconds = seconds_to_save(nbytes, bytes_a_second)
        print(
            f"lisa-dist check: a checkpoint has about {format_bytes(nbytes)}, and is saved in about {seconds:.0f} s, "
            f"as every host writes {format_bytes(int(min(bytes_a_second)))}/s; after the first one only what has "
            "changed is written",
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


def seconds_to_save(nbytes: int, bytes_a_second: Sequence[float]) -> float:
    """Seconds for a checkpoint of `nbytes`: each host writes as much as any other, and reads it back for its sums."""
    return 2 * nbytes / len(bytes_a_second) / min(bytes_a_second)


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
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
