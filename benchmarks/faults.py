"""Does a run survive? Random faults on a real model: every run must end with the weights of the undisturbed one.

python benchmarks/faults.py --model stories260k-hf --dataset gsm8k/train.jsonl
python benchmarks/faults.py --model stories260k-hf --dataset gsm8k/train.jsonl --faults 0 --clean_runs 100 \\
    --results benchmarks/results/exits.json

A fault is SIGKILL, SIGSTOP or SIGTERM to one of two ranks: at a random time, in a save, or in a switch. Then the run is
started again with --resume_from_checkpoint auto, and hit again, until it has finished.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import print_table, write_results

WORLD_SIZE = 2
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
MOMENTS = ("time", "save", "switch")
HANG_TIMEOUT = 10  # seconds; --hang_timeout of the runs
BOUND = 60  # seconds in which the other rank must have ended


def worker() -> None:
    """One rank: trains as `launch/train.py` does, and sends itself the fault that FAULT describes."""
    from lisa_dist.checkpoint import save as checkpoint
    from lisa_dist.commands.train import main
    from lisa_dist.distributed import watchdog
    from lisa_dist.train import trainer
    from lisa_dist.zero import partitions as zero

    fault = json.loads(os.environ["FAULT"])
    number = fault and getattr(signal, fault["signal"])

    def strike_within(owner, name: str) -> None:
        original = getattr(owner, name)
        calls = 0

        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fault["call"]:
                Path(os.environ["STRUCK"]).touch()
                threading.Timer(fault["delay"], os.kill, (os.getpid(), number)).start()
            return original(*args, **kwargs)

        setattr(owner, name, called)

    if fault and fault["rank"] == int(os.environ["RANK"]):
        where = {
            "time": (watchdog.Watchdog, "__enter__"),
            "save": (trainer, "save_checkpoint"),
            "switch": (zero.ZeroPartitions, "repartition"),
        }
        assert checkpoint.save_checkpoint is trainer.save_checkpoint
        strike_within(*where[fault["moment"]])
    main(sys.argv[1:])


def draw_fault(generator: random.Random, seconds: float) -> dict:
    """A fault: which signal, to which rank, when. `seconds` is about how long the run takes."""
    moment = generator.choice(MOMENTS)
    return {
        "signal": generator.choice(SIGNALS),
        "rank": generator.randrange(WORLD_SIZE),
        "moment": moment,
        "call": 1 if moment == "time" else generator.randint(1, 3),
        # A save of this model takes some 50 ms and a switch some 10.
        "delay": generator.uniform(0, {"time": seconds, "save": 0.05, "switch": 0.01}[moment]),
    }


def what_survivors_said(fault: dict, outcome: dict) -> str | None:
    """What is wrong with how the other rank ended after a kill or a stop, if anything."""
    other = 1 - fault["rank"]
    code, said = outcome["codes"][other], outcome["said"][other]
    if code == 0:  # the fault came after its last collective
        return None
    if code != 1:
        return f"exit status {code}"
    return None if f"rank(s) [{fault['rank']}]" in said else f"does not name rank {fault['rank']}: {said[-500:]}"


def start(arguments: argparse.Namespace, output_dir: str, fault: dict | None, steps: int) -> dict:
    """Start both ranks, wait until they have ended; exit codes, seconds, whether the fault struck, what was said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    struck = Path(output_dir).with_name("struck")
    struck.unlink(missing_ok=True)
    flags = {
        "model_name_or_path": arguments.model,
        "dataset_name": arguments.dataset,
        "output_dir": output_dir,
        "deepspeed": arguments.ds_config,
        "resume_from_checkpoint": "auto",
        "max_steps": steps,
        "save_steps": 3,
        "save_total_limit": 2,
        "lisa_interval_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 128,
        "learning_rate": 1e-3,
        "hang_timeout": HANG_TIMEOUT,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    command = [sys.executable, __file__, "--worker"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ranks, logs = [], []
    for rank in range(WORLD_SIZE):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAULT": json.dumps(fault),
            "STRUCK": str(struck),
        }
        logs.append(Path(output_dir).with_name(f"rank-{rank}.log"))
        with logs[-1].open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    struck_at, hung = None, False
    stopped = fault["rank"] if fault and fault["signal"] == "SIGSTOP" else None
    while any(rank.poll() is None for index, rank in enumerate(ranks) if index != stopped or not struck.exists()):
        time.sleep(0.1)
        if struck.exists() and struck_at is None:
            struck_at = time.monotonic() + fault["delay"]
        if struck_at is not None and time.monotonic() - struck_at > BOUND:
            hung = True
            break
    seconds = None if struck_at is None else max(0.0, time.monotonic() - struck_at)
    if stopped is not None and struck_at is not None:
        # The stopped rank itself is for the launcher to kill; had the run finished before, both have ended.
        ranks[stopped].kill()
    for rank in ranks if hung else ():
        rank.kill()
    codes = [rank.wait() for rank in ranks]
    said = [log.read_text() for log in logs]
    return {"codes": codes, "seconds": seconds, "struck": struck_at is not None, "hung": hung, "said": said}


def digest(output_dir: str) -> str:
    """SHA-256 of the saved weights."""
    return hashlib.sha256((Path(output_dir) / "model.safetensors").read_bytes()).hexdigest()


def campaign(arguments: argparse.Namespace, folder: Path) -> dict:
    """Strike runs until enough faults have struck; figures by kind of fault."""
    generator = random.Random(arguments.seed)
    reference = folder / "reference"
    started = time.monotonic()
    outcome = start(arguments, str(reference), None, arguments.steps)
    assert outcome["codes"] == [0, 0], outcome["said"]
    print(f"undisturbed run: {time.monotonic() - started:.0f} s", flush=True)
    wanted = digest(str(reference))

    struck, runs, same, problems = collections.Counter(), 0, 0, []
    slowest: dict[str, float] = collections.defaultdict(float)
    while sum(struck.values()) < arguments.faults:
        output_dir = folder / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        runs += 1
        while True:
            fault = draw_fault(generator, arguments.training_seconds)
            enough = sum(struck.values()) >= arguments.faults
            outcome = start(arguments, str(output_dir), None if enough else fault, arguments.steps)
            kind = f"{fault['signal']} {fault['moment']}"
            if outcome["struck"]:
                struck[kind] += 1
                slowest[kind] = max(slowest[kind], outcome["seconds"])
                print(f"{sum(struck.values()):3d}  {kind:15} rank {fault['rank']} codes {outcome['codes']}", flush=True)
            if outcome["struck"] and fault["signal"] != "SIGTERM" and not outcome["hung"]:
                wrong = what_survivors_said(fault, outcome)
                if wrong:
                    problems.append({"the other rank": wrong, "fault": fault})
            if outcome["hung"]:
                problems.append({"hung": fault})
            if outcome["struck"] and fault["signal"] == "SIGTERM" and outcome["codes"] != [0, 0]:
                problems.append({"SIGTERM did not end well": fault, "codes": outcome["codes"]})
            if not outcome["struck"] and outcome["codes"] != [0, 0]:
                problems.append({"a run that nothing struck failed": outcome["said"][0][-2000:]})
                break
            if outcome["codes"] == [0, 0] and "load it with from_pretrained" in outcome["said"][0]:
                break
        if (output_dir / "model.safetensors").exists() and digest(str(output_dir)) == wanted:
            same += 1
        else:
            problems.append({"other weights": str(runs)})
    rows = [[kind, str(count), f"{slowest[kind]:.1f}"] for kind, count in sorted(struck.items())]
    print_table(["fault", "times", "slowest end s"], rows)
    print(f"{sum(struck.values())} faults in {runs} runs; {same} of {runs} runs end with the undisturbed weights")
    print(f"problems: {json.dumps(problems, indent=1)}")
    return {
        "faults": dict(struck),
        "slowest_end_seconds": {kind: round(seconds, 1) for kind, seconds in slowest.items()},
        "runs": runs,
        "runs_with_the_undisturbed_weights": same,
        "problems": problems,
    }


def clean_runs(arguments: argparse.Namespace, folder: Path) -> dict:
    """Short runs that nothing disturbs: all must end with exit status 0."""
    codes = collections.Counter()
    for number in range(arguments.clean_runs):
        output_dir = folder / "clean"
        shutil.rmtree(output_dir, ignore_errors=True)
        outcome = start(arguments, str(output_dir), None, 2)
        codes.update(outcome["codes"])
        if outcome["codes"] != [0, 0]:
            print(f"run {number}: {outcome['codes']}\n{outcome['said'][0][-2000:]}", flush=True)
    print(f"exit statuses of {WORLD_SIZE} ranks in {arguments.clean_runs} runs: {dict(codes)}")
    return {"exit_statuses": {str(code): count for code, count in codes.items()}}


def main() -> None:
    """Run the campaign, or clean runs, or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--ds_config", default="zero2")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--clean_runs", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--training_seconds", type=float, default=6.0, help="about how long the steps of a run take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Few rows, for a start to take no longer than it must.
        rows = Path(arguments.dataset).read_text(encoding="utf-8").splitlines(keepends=True)[:100]
        arguments.dataset = str(Path(folder) / "rows.jsonl")
        Path(arguments.dataset).write_text("".join(rows), encoding="utf-8")
        figures = campaign(arguments, Path(folder)) if arguments.faults else {}
        if arguments.clean_runs:
            figures |= clean_runs(arguments, Path(folder))
    write_results(arguments.results, figures)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.argv.remove("--worker")
        worker()
    else:
        main()
