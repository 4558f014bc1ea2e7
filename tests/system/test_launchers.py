"""Launchers for rented nodes: the files of launch/kubernetes, launch/skypilot and launch/ray as they are shipped.

Their formats are checked by the programs that read them. What they start is a run on two CPU ranks, which is stopped,
goes on, and has the losses of torchrun's two ranks that nothing has stopped.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from ranks import PATIENCE, free_port
from runs import ROOT, clean_environment, flags_for, said_by
from torch.distributed.run import get_args_parser

STEPS = 40
JOB_SET = yaml.safe_load((ROOT / "launch" / "kubernetes" / "jobset.yaml").read_text())
(NODE,) = JOB_SET["spec"]["replicatedJobs"]
JOB = NODE["template"]["spec"]
(CONTAINER,) = JOB["template"]["spec"]["containers"]
SKY_TASK = ROOT / "launch" / "skypilot" / "train.yaml"
SKY = Path(os.environ.get("LISA_DIST_PLUGINS") or ROOT / ".plugins") / "skypilot" / "bin" / "python"


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory, cpu_ops) -> Path:
    changes = {"max_steps": STEPS, "learning_rate": 0.01, "eval_strategy": "no", "eval_on_start": False}
    words = flags_for(folder, Path("set by the launcher"), **changes)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump({k[2:]: yaml.safe_load(v) for k, v in zip(words[::2], words[1::2], strict=True)}))
    return path


@pytest.fixture(scope="module")
def whole(recipe) -> list[float]:
    """The losses of torchrun's two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += [str(free_port()), str(ROOT / "launch" / "train.py"), "--config", str(recipe)]
    said_by([*command, "--output_dir", str(recipe.parent / "whole")])
    return losses(recipe.parent / "whole")


def losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def start(command: list[str], output: Path, **variables: str) -> subprocess.Popen:
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with output.open("w") as file:
        return subprocess.Popen(command, env=clean_environment() | variables, stdout=file, stderr=subprocess.STDOUT)


def wait_for_second_period(run: subprocess.Popen, output_dir: Path, output: Path) -> None:
    deadline, log = time.monotonic() + PATIENCE, output_dir / "lisa_log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert run.poll() is None, output.read_text()[-6000:]
        assert time.monotonic() < deadline, output.read_text()[-6000:]
        time.sleep(0.1)


def kill(run: subprocess.Popen) -> None:
    """And what it has started; nothing where it has ended."""
    if run.poll() is None:
        for process in [*psutil.Process(run.pid).children(recursive=True), run]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.full
@pytest.mark.xdist_group("launchers")  # share `whole`
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
def test_ray_starts_the_ranks_of_torchrun_and_starts_them_again_after_a_signal(recipe, whole, tmp_path):
    output = tmp_path / "said.txt"
    script = [sys.executable, str(ROOT / "launch" / "ray" / "train.py"), "--ranks", "2", "--cpu"]
    command = [*script, "--config", str(recipe), "--output_dir", str(tmp_path / "out")]
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    run = start(command, output, **variables)
    try:
        wait_for_second_period(run, tmp_path / "out", output)
        below = psutil.Process(run.pid).children(recursive=True)
        ranks = [process for process in below if process.cmdline()[1:4] == ["-m", "lisa_dist", "train"]]
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGTERM)
        assert run.wait(timeout=PATIENCE) == 0, output.read_text()[-6000:]
    finally:
        kill(run)
    said = output.read_text()
    assert said.count("SIGTERM: stopped after step ") == said.count(f", after step {stopped_at(tmp_path)} of ") == 1
    assert losses(tmp_path / "out") == whole
    assert "this run has finished" in said_by(command, **variables)
    refused = start([*script, "--output_dir", str(tmp_path / "none"), "--no_flag", "1"], output, **variables)
    assert refused.wait(timeout=PATIENCE) == 2
    assert "RETRY" not in output.read_text(), "what cannot be is not tried again"


def stopped_at(folder: Path) -> int:
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 0 < step < STEPS
    return step


def start_pods(recipe: Path, folder: Path) -> list[subprocess.Popen]:
    """The two pods of the manifest, a rank each."""
    assert NODE["replicas"] == 2
    values = {"RECIPE": recipe, "OUTPUT_DIR": folder / "out", "GPUS_PER_NODE": 1, "OMP_NUM_THREADS": 1}
    values |= {"NODES": 2, "MASTER_ADDR": "127.0.0.1", "HF_HOME": os.environ["HF_HOME"]}
    assert values.keys() | {"NODE"} == {variable["name"] for variable in CONTAINER["env"]}
    variables = {name: str(value) for name, value in values.items()} | {"PET_MASTER_PORT": str(free_port())}
    return [start(CONTAINER["command"], folder / f"{node}.txt", NODE=str(node), **variables) for node in range(2)]


@pytest.mark.full
@pytest.mark.xdist_group("launchers")  # share `whole`
def test_a_pod_that_is_preempted_saves_and_has_its_job_restarted(recipe, whole, tmp_path):
    pods, output = start_pods(recipe, tmp_path), tmp_path / "0.txt"
    try:
        wait_for_second_period(pods[0], tmp_path / "out", output)
        pods[1].terminate()
        said = {pod.wait(timeout=PATIENCE): (tmp_path / f"{node}.txt").read_text() for node, pod in enumerate(pods)}
        assert list(said) == [0, 128 + signal.SIGTERM], said
        assert f"SIGTERM: stopped after step {stopped_at(tmp_path)} and saved" in output.read_text()
        for _ in range(2):  # the second time there is nothing to do
            pods = start_pods(recipe, tmp_path)
            assert [pod.wait(timeout=PATIENCE) for pod in pods] == [0, 0], output.read_text()[-6000:]
            assert losses(tmp_path / "out") == whole
    finally:
        for pod in pods:
            kill(pod)
    assert output.read_text() == f"{tmp_path / 'out'}: this run has finished\n"


def test_a_pod_that_is_preempted_before_its_ranks_start_ends(tmp_path):
    bash, c, script = CONTAINER["command"]
    begun = script.replace("torchrun --nnodes", "kill -TERM $$; echo started")
    pod = start([bash, c, begun], tmp_path / "said.txt", OUTPUT_DIR=str(tmp_path / "out"))
    assert pod.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    assert (tmp_path / "said.txt").read_text() == ""


def test_the_manifest_is_a_job_set():
    assert JOB["completions"] == JOB["parallelism"] == 1, "the Job of a coordinator must have them"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    assert models.JobsetV1alpha2JobSet.from_dict(JOB_SET).to_dict() == JOB_SET, "a field that it does not know is lost"


@pytest.mark.skipif(not SKY.exists(), reason=f"SkyPilot is not installed in {SKY.parents[1]}: make test-plugins")
def test_skypilot_reads_its_task():
    read = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); (one,) = task.resources; "
    read += "print(task.num_nodes, one.accelerators, one.job_recovery['max_restarts_on_errors'], *task.storage_mounts)"
    assert said_by([str(SKY), "-c", read, str(SKY_TASK)]).endswith("2 {'H100': 8} 3 /checkpoints\n")


def test_the_task_of_skypilot_starts_torchrun_on_each_node(tmp_path):
    task = yaml.safe_load(SKY_TASK.read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("PATH=$PWD:$PATH")
    (torchrun := tmp_path / "torchrun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"")
    torchrun.chmod(0o755)
    of_node = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    variables = task["envs"] | {f"SKYPILOT_{name}": value for name, value in of_node.items()}
    started = get_args_parser().parse_args(said_by(["bash", "-c", task["run"]], tmp_path, **variables).splitlines())
    assert (started.nnodes, started.node_rank, started.nproc_per_node) == ("2", 1, "8")
    assert (started.master_addr, started.training_script) == ("10.0.0.1", "launch/train.py")
    recipe, output_dir = task["envs"]["RECIPE"], task["envs"]["OUTPUT_DIR"]
    flags = ["--config", recipe, "--output_dir", output_dir, "--resume_from_checkpoint", "auto"]
    assert started.training_script_args == flags
    assert (ROOT / recipe).exists()
    assert any(Path(output_dir).is_relative_to(mounted) for mounted in task["file_mounts"])
