"""The scripts of launch/slurm, submitted as they are to real SLURM daemons.

They train a small real model on two CPU ranks. What a script does around a run is tested with a stand-in for `python`,
which takes no time to import anything: when signals come, how ranks end, which exit code the job has.
"""

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from models import save_tiny_llama
from ranks import PATIENCE, free_port
from runs import BIN, ROOT, on_two_ranks
from slurm import NODES, Cluster, why_not

SCRIPTS = {path.stem: str(path) for path in sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))}
STEPS, INTERVAL = 60, 20

_absent = why_not()
pytestmark = [
    pytest.mark.full,
    pytest.mark.xdist_group("slurm"),  # one cluster
    pytest.mark.skipif(_absent is not None, reason=f"SLURM: {_absent}"),
]

# `python` of a job: MODE says what the ranks do. What they do when they start again is to finish.
STAND_IN = """#!/usr/bin/env bash
set -eu
check() {
    echo "check $SLURM_NODEID"
    # Not by scancel, which ends before the signal has come: this one has, when the check ends.
    [ "$MODE$SLURM_NODEID${SLURM_RESTART_COUNT:-}" != checking0 ] || kill -USR1 "$SCRIPT"
}
case "$*" in
"-m lisa_dist check "*) [ "$MODE" != "unfit" ] || exit 3; check; exit ;;
"-m lisa_dist train "*) ;;
"-c "*) exit ;;
*) echo "not a command of the scripts: $*" >&2; exit 99 ;;
esac
finish() { touch "$OUTPUT_DIR/trainer_state.json"; echo "finished $SLURM_PROCID"; exit 0; }
until_signal() { echo "train $SLURM_PROCID"; while :; do sleep 0.05 || :; done; } # sleep gets the signal too, or first
[ -z "${SLURM_RESTART_COUNT:-}" ] || [ "$MODE" = full ] || finish
case "$MODE" in
fail) # rank 1, once the others have ended: srun tells the highest exit code, and what it kills has a higher one
    touch "$OUTPUT_DIR.$SLURM_PROCID"
    [ "$SLURM_PROCID" = 1 ] || exit 0
    until [ "$(ls "$OUTPUT_DIR".* | wc -l)" = "$SLURM_STEP_NUM_TASKS" ]; do sleep 0.05; done
    sleep 1
    exit 7 ;;
hang) [ "$SLURM_PROCID" != 1 ] || exit 7; sleep 600 ;;
devices) echo "asked $*"; echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, GPUs $CUDA_VISIBLE_DEVICES" ;;
save) trap 'sleep 0.5; exit 0' USR1; until_signal ;;
full) trap '' USR1; [ "$SLURM_PROCID" = 0 ] || trap 'exit 1' USR1; until_signal ;;
starting | checking) until_signal ;;
uneven) [ "$SLURM_PROCID" = 0 ] || trap 'sleep 0.5; exit 0' USR1; until_signal ;;
broken) trap '' TERM; trap 'exit 1' USR1; until_signal ;; # both: srun kills the slower one, else, before it has failed
ending) trap finish USR1; until_signal ;;
esac
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def stand_in(tmp_path) -> str:
    """The ACTIVATE of a job that has the stand-in for its `python`."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return f"PATH={python.parent}:$PATH"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A run of a few seconds: of the small real model where it is, else of a tiny one."""
    folder = tmp_path_factory.mktemp("recipe")
    data = Path(os.environ.get("LISA_DIST_DATA") or ROOT.parent / "shared" / "data")
    model = data / "models" / "stories260k-hf"
    if model.is_dir():
        rows = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    else:
        model = folder / "model"
        save_tiny_llama(model)
        rows = [json.dumps({"question": f"{n} + 1? " * 20, "answer": f"{n + 1} " * 20}) for n in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = {"model_name_or_path": str(model), "dataset_name": str(folder / "rows.jsonl"), "deepspeed": "zero2"}
    flags |= {"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2, "max_length": 64}
    flags |= {"lisa_interval_steps": INTERVAL, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    flags |= {"report_to": "none", "disable_tqdm": True}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(flags))
    return path


def submit(cluster: Cluster, name: str, folder: Path, *words: str, flags: Sequence[str] = (), **variables: str) -> str:
    """A script as it is shipped, its log and its OUTPUT_DIR in the folder."""
    folder.mkdir(exist_ok=True)
    variables = {"OUTPUT_DIR": str(folder / "out"), "GPUS_PER_NODE": "0", "SAVE_WITHIN": "0"} | variables
    return cluster.submit("--output", str(folder / "log"), *words, SCRIPTS[name], *flags, **variables)


def preempt(cluster: Cluster) -> str:
    """A job that wants both nodes at once, for a moment; its number."""
    return cluster.submit("--partition", "high", "--nodes", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")


@contextlib.contextmanager
def frozen(folder: Path):
    """The ranks that train into the folder stand still, for a signal to come in a known period at any speed."""
    ranks = [pid for pid, words in processes() if "train" in words and str(folder / "out") in words]
    ranks = [pid for pid in ranks if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    yield
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def processes() -> Iterator[tuple[int, list[str]]]:
    """Numbers and commands of all processes of this machine."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            yield int(path.name), (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue


def log(folder: Path) -> str:
    path = folder / "log"
    return path.read_text(errors="replace") if path.exists() else ""


def periods(folder: Path) -> int:
    path = folder / "out" / "lisa_log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "out").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run without SLURM that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--config", str(recipe), "--output_dir", str(folder / "out"), "--max_steps", str(STEPS)]
    on_two_ranks(flags, folder)
    return folder


@pytest.mark.usefixtures("cpu_ops")
def test_a_run_that_is_preempted_ends_with_the_weights_of_the_whole_one(cluster, recipe, whole, tmp_path):
    """The other scripts have these commands but for the signals; they are run below, with a stand-in."""
    one, two = (Path(SCRIPTS[name]).read_text().partition("set +u")[2] for name in ("train_1node", "train_multinode"))
    assert one == two
    words = ("--nodes", "2", "--ntasks-per-node", "1", "--gpus-per-node", "0")
    variables = {"RECIPE": str(recipe), "ACTIVATE": f"PATH={BIN}:$PATH"}
    number = submit(cluster, "train_preemptible", tmp_path, *words, flags=["--max_steps", str(STEPS)], **variables)
    cluster.until(lambda: periods(tmp_path) == 2, PATIENCE, "second period")
    with frozen(tmp_path):
        other = preempt(cluster)
        cluster.until(lambda: log(tmp_path).count("USR1,") == 1, PATIENCE, "signal")
    cluster.until(lambda: cluster.job(number)["Restarts"] == "1", PATIENCE, "requeue after the preemption")
    assert cluster.wait(other, PATIENCE)["JobState"] == "COMPLETED"
    (preempted_at,) = checkpoint_steps(tmp_path)
    assert INTERVAL < preempted_at < 2 * INTERVAL
    job = cluster.wait(number, PATIENCE)
    said = log(tmp_path)
    # SLURM 24.11 keeps in mind that it preempted a job until that job ends by itself, and then requeues it once more.
    assert job["JobState"] == "COMPLETED", said
    assert said.count("this run has finished") == int(job["Restarts"]) - 1 <= 1, said
    assert "hosts: node1 node2, each 1 ranks, 0 GPUs" in said
    assert "lisa-dist check: 2 host(s) are fit: node1, node2" in said
    assert said.index("SLURM_RESTART_COUNT 0") < said.index("SLURM_RESTART_COUNT 1")
    assert f"SIGUSR1: stopped after step {preempted_at} and saved" in said
    assert said.count("%  loss ") == STEPS, "rank 0 says each step once: none is taken twice"
    assert "load it with from_pretrained" in said
    assert digest(tmp_path) == digest(whole)


LAUNCHERS = {
    # The traps and the flag are for the launcher, which a signal to the step's processes would end too.
    "torchrun": "srun bash -c \"trap '' USR1 TERM; exec torchrun --signals-to-handle SIGINT --nnodes 2 --node-rank "
    '\\$SLURM_NODEID --nproc-per-node 1 --master-addr node1 --master-port $PORT $RUN"',
    "slurm": "deepspeed --launcher slurm --hostfile $HOSTS --no_ssh_check --master_addr node1 --master_port $PORT $RUN",
}


@pytest.mark.usefixtures("cpu_ops")
def test_one_run_goes_on_under_each_launcher_and_ends_with_the_same_weights(cluster, recipe, whole, tmp_path):
    """A start under each in one job: the first gets a signal, and the last one ends."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node} slots=1\n" for node in NODES))
    variables = f"HOSTS={hosts} PORT={free_port()} PATH={BIN}:$PATH PYTHONUNBUFFERED=1"
    run = f"{ROOT / 'launch' / 'train.py'} --config {recipe} --output_dir {tmp_path / 'out'} --max_steps {STEPS}"
    starts = "; ".join(f"{command}; echo {name} ended with $?" for name, command in LAUNCHERS.items())
    words = ("--nodes", "2", "--ntasks-per-node", "1", "--output", str(tmp_path / "log"), "--chdir", str(tmp_path))
    run += " --resume_from_checkpoint auto"
    number = cluster.submit(*words, "--wrap", f"set -e; export {variables}; RUN='{run}'; {starts}")
    cluster.until(lambda: periods(tmp_path) == 2, PATIENCE, "period 2")
    cluster.run("scancel", "--signal", "TERM", number)
    cluster.until(lambda: "SIGTERM: stopped" in log(tmp_path), PATIENCE, "end by SIGTERM")
    job, said = cluster.wait(number, PATIENCE), log(tmp_path)
    assert job["JobState"] == "COMPLETED", said
    for launcher in LAUNCHERS:
        assert f"{launcher} ended with 0" in said
    (stopped_at,) = checkpoint_steps(tmp_path)
    assert INTERVAL < stopped_at < STEPS
    assert f"SIGTERM: stopped after step {stopped_at} and saved" in said
    assert said.count("%  loss ") == STEPS, "it went on where it was"
    assert digest(tmp_path) == digest(whole)


def test_a_job_has_the_exit_code_of_its_run(cluster, stand_in, tmp_path):
    """All at once: with few ranks, as they find room beside each other then."""
    exit_codes = {"fail": "7:0", "hang": "143:0", "unfit": "3:0"}
    cases = [(name, mode, (), code) for name in SCRIPTS for mode, code in exit_codes.items()]
    # A restart would not bear these flags: the script refuses them.
    refused = ("--output_dir", "--resume_from_checkpoint")
    cases += [("train_preemptible", flag, (f"{flag}=x",), "2:0") for flag in refused]
    words = ("--ntasks-per-node", "2", "--gpus-per-node", "0", "--cpus-per-task", "1")
    jobs = {}
    for name, mode, flags, code in cases:
        folder = tmp_path / f"{name}-{mode}"
        number = submit(cluster, name, folder, *words, flags=flags, ACTIVATE=stand_in, MODE=mode)
        jobs[number] = folder, mode, code
    for number, (folder, mode, code) in jobs.items():
        job, said = cluster.wait(number, PATIENCE), log(folder)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", code, "0"), f"{folder.name}: {said}"
        if mode in refused:
            assert f"{mode}: this script sets it; give OUTPUT_DIR" in said
        else:
            assert "train" not in said if mode == "unfit" else "check 0" in said, folder.name


@pytest.mark.parametrize(("name", "nodes", "ranks"), [("1node", 1, 4), ("multinode", 2, 8), ("preemptible", 2, 8)])
def test_what_a_script_asks_for_is_a_gpu_for_each_rank(cluster, stand_in, tmp_path, name, nodes, ranks):
    variables = {"ACTIVATE": stand_in, "MODE": "devices", "RECIPE": "r.yaml"}
    job = cluster.wait(submit(cluster, f"train_{name}", tmp_path, **variables), PATIENCE)
    assert job["JobState"] == "COMPLETED", log(tmp_path)
    gpus = ",".join(str(gpu) for gpu in range(ranks))
    expected = [f"rank {rank} of {nodes * ranks}, GPUs {gpus}" for rank in range(nodes * ranks)]
    lines = log(tmp_path).splitlines()
    assert sorted(line for line in lines if line.startswith("rank")) == sorted(expected)
    asked = [line for line in lines if line.startswith("asked -m lisa_dist train ")]
    assert len(asked) == nodes * ranks
    assert all(f" --config r.yaml --output_dir {tmp_path / 'out'}" in line for line in asked)
    assert sum(line.startswith("check ") for line in lines) == nodes


def test_a_signal_is_answered_whenever_it_comes(cluster, stand_in, tmp_path):
    """All at once, as a requeued job waits for five seconds."""
    expected = {  # mode: exit code, restarts
        "save": ("0:0", "1"),
        "starting": ("0:0", "1"),  # no rank could save yet
        "uneven": ("0:0", "1"),  # one rank could
        "broken": ("1:0", "0"),  # the save failed; of the only rank, as srun may kill a second one first
        "ending": ("0:0", "0"),  # there was nothing more to do
        "checking": ("0:0", "1"),
        "between": ("0:0", "1"),  # the script has started the ranks, and not noted that it has
        "full": ("143:0", "1"),  # one rank's save fails in each start, and srun kills the other, which still saves
    }
    # Bash calls a DEBUG trap before each command: here the one that notes it.
    once = '[ -n "${SLURM_RESTART_COUNT:-}" ] || kill -USR1 $$'
    between = f"trap 'case $BASH_COMMAND in run=\\$!*) {once};; esac' DEBUG"
    jobs = {}
    for mode in expected:
        variables = {"ACTIVATE": stand_in, "MODE": mode}
        if mode == "between":
            variables = {"ACTIVATE": f"{stand_in}; {between}", "MODE": "save"}
        if mode == "checking":
            variables["ACTIVATE"] += "; export SCRIPT=$$"
        words = ("--ntasks-per-node", "1", "--gpus-per-node", "1", "--cpus-per-task", "1")
        words += ("--nodes", "1") if mode == "broken" else ()
        jobs[mode] = submit(cluster, "train_preemptible", tmp_path / mode, *words, **variables)
    for mode, number in jobs.items():
        if mode not in ("between", "checking"):
            ranks = 1 if mode == "broken" else 2
            cluster.until(lambda m=mode, n=ranks: log(tmp_path / m).count("train") == n, PATIENCE, f"train of {mode}")
            cluster.run("scancel", "--batch", "--signal", "USR1", number)
    cluster.until(lambda: log(tmp_path / "full").count("train") == 4, PATIENCE, "second start of full")
    cluster.run("scancel", "--batch", "--signal", "USR1", jobs["full"])
    for mode, number in jobs.items():
        job, said = cluster.wait(number, PATIENCE), log(tmp_path / mode)
        assert (job["ExitCode"], job["Restarts"]) == expected[mode], f"{mode}: {said}"
        assert said.count("finished") == (0 if mode in ("broken", "full") else 2), f"{mode}: {said}"
        assert "train" not in said or mode != "checking"


def test_a_run_that_is_preempted_as_it_ends_is_not_begun_again(cluster, stand_in, tmp_path):
    number = submit(cluster, "train_preemptible", tmp_path, ACTIVATE=stand_in, MODE="ending")
    cluster.until(lambda: log(tmp_path).count("train") == 16, PATIENCE, "train")
    preempt(cluster)
    cluster.until(lambda: cluster.job(number)["Restarts"] == "1", PATIENCE, "requeue")
    job = cluster.wait(number, PATIENCE)
    assert job["ExitCode"] == "0:0"
    assert log(tmp_path).count("finished 0") == 1
    assert "this run has finished" in log(tmp_path)


def test_what_a_failed_cluster_leaves_is_nothing(tmp_path):
    """Its daemons end with it, and so does what they have started."""
    marker = f"{3600 + os.getpid() / 1e6:.6f}"
    with pytest.raises(ZeroDivisionError), Cluster(tmp_path) as cluster:
        number = cluster.submit("--nodes", "2", "-o", "/dev/null", "--wrap", f"srun sleep {marker}")
        cluster.until(lambda: running(marker) == len(NODES), PATIENCE, f"sleep of job {number}")
        raise ZeroDivisionError
    deadline = time.monotonic() + PATIENCE
    while running(marker) or running(str(tmp_path)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def running(word: str) -> int:
    """How many programs that a cluster starts have the word in their command."""
    programs = ("sleep", "slurmd", "slurmctld")
    return sum(Path(words[0]).name in programs and any(word in one for one in words) for _, words in processes())
