"""Does a run outlive preemption? launch/slurm/train_preemptible.sbatch on real SLURM daemons, again and again.

python benchmarks/preempt.py --model stories260k-hf --dataset gsm8k/train.jsonl

As root, where SLURM is installed. A job of a higher partition takes both nodes from a run at a random step, --rounds
times; each time the run starts again on one node or on two. Once with two ranks throughout, where weights must be those
of the undisturbed run bit for bit, and once with a rank on each node and the same global batch, where losses must agree
to rounding. Beside it: how long it takes from the signal to the end of the run.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml
from bench import print_table, write_results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from slurm import Cluster, why_not  # noqa: E402

SCRIPT = str(ROOT / "launch" / "slurm" / "train_preemptible.sbatch")
PATIENCE = 600  # seconds for a run to start and take a step
TOLERANCE = 1e-5  # between losses of different numbers of ranks, in fp32


class Run:
    """One job of the script, in a folder of its own; `ranks_per_node` is called with its number of nodes."""

    def __init__(self, cluster: Cluster, folder: Path, arguments: argparse.Namespace, changes_world_size: bool):
        self._cluster, self._folder, self._arguments = cluster, folder, arguments
        folder.mkdir()
        self._write_recipe()
        activate = f"export PATH={Path(sys.executable).parent}:$PATH"
        if not changes_world_size:  # two on one node, one on each of two
            activate += " SLURM_NTASKS_PER_NODE=$((2 / SLURM_JOB_NUM_NODES)) SLURM_NTASKS=2; unset SLURM_NPROCS"
        ranks = "1" if changes_world_size else "2"
        self._job = cluster.submit(
            *("--nodes", "1", "--ntasks-per-node", ranks, "--gpus-per-node", "0", "--time", "1-0"),
            *("--output", str(folder / "log"), SCRIPT, "--max_steps", str(arguments.steps)),
            RECIPE=str(folder / "recipe.yaml"),
            OUTPUT_DIR=str(folder / "out"),
            ACTIVATE=activate,
            GPUS_PER_NODE="0",
            SAVE_WITHIN="0",
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        )

    def _write_recipe(self) -> None:
        arguments = self._arguments
        flags = {
            "model_name_or_path": arguments.model,
            "dataset_name": arguments.dataset,
            "deepspeed": arguments.ds_config,
            "bf16": False,
            "lisa_interval_steps": 7,
            "per_device_train_batch_size": arguments.micro_batch_size,
            "global_batch_size": 2 * arguments.micro_batch_size,
            "gradient_checkpointing": False,
            "max_length": arguments.max_length,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        (self._folder / "recipe.yaml").write_text(yaml.safe_dump(flags))

    def _log(self) -> str:
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _until(self, condition, what: str) -> float:
        """Wait for a condition on the log; when it came."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self._log()):
            state = self._cluster.job(self._job)["JobState"]
            if time.monotonic() > deadline or state in ("FAILED", "COMPLETED"):
                sys.exit(f"no {what} of a job that is {state}:\n{self._log()[-4000:]}")
            time.sleep(0.02)
        return time.monotonic()

    def preempt(self, number: int, steps: int, nodes: int) -> float:
        """Let it take some steps, preempt it, have it start again on so many nodes; seconds from signal to end."""
        taken = self._log().count("  loss ")
        self._until(lambda log: log.count("  loss ") >= taken + steps, f"step of start {number}")
        words = ("--partition", "high", "--nodes", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        self._cluster.submit(*words)
        signalled = self._until(lambda log: log.count("USR1,") > number, f"signal {number}")
        ended = self._until(lambda log: log.count("srun ended") > number, f"end {number}")
        self._cluster.until(lambda: self._cluster.job(self._job)["Restarts"] == str(number + 1), 60, "requeue")
        self._cluster.run("scontrol", "update", f"JobId={self._job}", f"NumNodes={nodes}")
        return ended - signalled

    def end(self) -> tuple[str, list[float]]:
        """Wait for the end: a sum of the weights, and the losses of all steps."""
        job = self._cluster.wait(self._job, PATIENCE)
        if job["JobState"] != "COMPLETED":
            sys.exit(f"the run is {job['JobState']}:\n{self._log()[-4000:]}")
        weights = hashlib.sha256((self._folder / "out" / "model.safetensors").read_bytes()).hexdigest()
        history = json.loads((self._folder / "out" / "trainer_state.json").read_text())["log_history"]
        return weights, [entry["loss"] for entry in history if "loss" in entry]

    def checkpoint_bytes(self) -> int:
        """Of the newest checkpoint."""
        newest = max((self._folder / "out").glob("checkpoint-*"), key=os.path.getmtime)
        return sum(path.stat().st_size for path in newest.iterdir())


def campaign(run: Run, rounds: int, generator: random.Random) -> dict:
    """Preempt a run so many times and let it end."""
    nodes, seconds = [1], []
    for number in range(rounds):
        nodes.append(generator.choice((1, 2)) if number else 2)  # both, even in one round
        seconds.append(run.preempt(number, generator.randint(1, 3), nodes[-1]))
        print(f"{number + 1:3d}  {nodes[-2]} node(s), {seconds[-1]:.1f} s to its end", flush=True)
    saved = run.checkpoint_bytes()
    weights, losses = run.end()
    return {"weights": weights, "losses": losses, "nodes": nodes, "seconds": seconds, "checkpoint_bytes": saved}


def main() -> None:
    """Run both campaigns beside an undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--dataset", required=True, help="rows, .jsonl")
    parser.add_argument("--ds_config", default="zero2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of the run; enough for all rounds, by default 25 for each")
    parser.add_argument("--micro_batch_size", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--same_ranks_only", action="store_true", help="leave the other campaign out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "preempt.json")
    arguments = parser.parse_args()
    if why_not() is not None:
        sys.exit(f"preempt: {why_not()}")
    arguments.model = str(Path(arguments.model).resolve())
    arguments.steps = arguments.steps or 25 * arguments.rounds
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = Path(arguments.dataset).read_text(encoding="utf-8").splitlines(keepends=True)[:200]
        arguments.dataset = str(folder / "rows.jsonl")
        Path(arguments.dataset).write_text("".join(rows), encoding="utf-8")
        (folder / "cluster").mkdir()
        with Cluster(folder / "cluster") as cluster:
            whole_weights, whole_losses = Run(cluster, folder / "whole", arguments, False).end()
            found = {
                "two ranks": campaign(Run(cluster, folder / "same", arguments, False), arguments.rounds, generator)
            }
            if not arguments.same_ranks_only:
                changing = Run(cluster, folder / "changing", arguments, True)
                found["a rank a node"] = campaign(changing, arguments.rounds, generator)
    figures, rows = {"steps": len(whole_losses)}, []
    for name, outcome in found.items():
        differs = max(abs(one - other) for one, other in zip(outcome["losses"], whole_losses, strict=True))
        same = outcome["weights"] == whole_weights
        median, longest = statistics.median(outcome["seconds"]), max(outcome["seconds"])
        figures[name] = {
            "preemptions": arguments.rounds,
            "nodes_of_each_start": outcome["nodes"],
            "weights_are_the_undisturbed_runs": same,
            "largest_difference_of_a_loss": differs,
            "seconds_from_signal_to_end": {"median": round(median, 2), "longest": round(longest, 2)},
            "checkpoint_bytes": outcome["checkpoint_bytes"],
        }
        times = [f"{median:.1f}", f"{longest:.1f}"]
        rows.append([name, str(arguments.rounds), "yes" if same else "no", f"{differs:.1e}", *times])
    print_table(["ranks", "preemptions", "same weights", "loss differs by", "median s to end", "longest"], rows)
    write_results(arguments.results, figures)
    two_ranks = figures["two ranks"]
    if two_ranks["largest_difference_of_a_loss"] or not two_ranks["weights_are_the_undisturbed_runs"]:
        sys.exit("preempt: on two ranks throughout the run has ended with other weights or losses")
    if any(figures[name]["largest_difference_of_a_loss"] > TOLERANCE for name in found):
        sys.exit(f"preempt: losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
