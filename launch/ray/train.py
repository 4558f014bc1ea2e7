"""Train on a Ray cluster: python launch/ray/train.py --ranks 16 --output_dir DIR --config recipe.yaml --any_flag value.

Ray Train starts a worker for each rank, and each worker runs launch/train.py's run in a process of its own: a run saves
at a signal, Python handles signals in the main thread, and a worker's main thread is Ray's. When a signal has stopped
the ranks, or one is lost, Ray starts all of them again, and they resume from the newest checkpoint in `--output_dir`. A
worker that Ray itself ends takes its rank along without a save: give `--save_steps`.

All hosts have the same packages, paths and files, and see the same `--output_dir`.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

REFUSED = 2  # the exit status of a rank whose flags or files cannot be


class WithoutDevice(TorchConfig):
    """Ray's worker begins no CUDA: the memory of its GPU is the rank's."""

    train_func_context = contextlib.nullcontext


def train_rank(run: dict) -> None:
    """Run the rank of this worker. Raises RuntimeError when Ray is to start all ranks again."""
    from lisa_dist.distributed.ranks import free_port  # imports DeepSpeed, which the host that submits need not have

    port = broadcast_from_rank_zero(free_port())  # on MASTER_PORT the workers' own process group listens
    command = [sys.executable, "-m", "lisa_dist", "train", *run["flags"]]
    code = subprocess.run(command, env=os.environ | {"MASTER_PORT": str(port)}, cwd=run["folder"]).returncode
    if code != REFUSED and not (code == 0 and Path(run["finished"]).exists()):
        raise RuntimeError(f"rank {os.environ['RANK']} ended with status {code} before the run had finished")


def main() -> None:
    """Start the ranks, and exit with status 0 when the run has finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, required=True, help="each on a GPU of its own")
    parser.add_argument("--cpu", action="store_true", help="on CPUs")
    parser.add_argument("--max_failures", type=int, default=5, help="starts after the first one")
    parser.add_argument("--output_dir", type=Path, required=True)
    ours, flags = parser.parse_known_args()
    output_dir = ours.output_dir.absolute()
    finished = output_dir / "trainer_state.json"  # what a run writes last
    if finished.exists():
        print(f"{output_dir}: this run has finished")
        return
    flags += ["--output_dir", str(output_dir), "--resume_from_checkpoint", "auto"]
    failures = FailureConfig(max_failures=ours.max_failures)
    TorchTrainer(
        train_rank,
        train_loop_config={"flags": flags, "folder": os.getcwd(), "finished": str(finished)},
        torch_config=WithoutDevice(),
        scaling_config=ScalingConfig(num_workers=ours.ranks, use_gpu=not ours.cpu),
        run_config=RunConfig(name="ray", storage_path=str(output_dir), failure_config=failures),
    ).fit()
    raise SystemExit(0 if finished.exists() else REFUSED)


if __name__ == "__main__":
    main()
