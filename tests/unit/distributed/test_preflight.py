"""`lisa-dist check` on two processes that stand for two hosts: what is wrong is named, with the host where it is."""

import contextlib
import io
import os
import re
import time
from pathlib import Path

import pytest
from models import tiny_llama
from ranks import free_port, run_ranks
from torch import distributed as dist

from lisa_dist.checkpoint.size import checkpoint_bytes
from lisa_dist.commands.check import CheckArguments, flags_of_run, main
from lisa_dist.distributed import preflight
from lisa_dist.distributed.preflight import HostCheck, seconds_to_save


def check(port: int, folder: str, flags: list[str], on_host_2: dict) -> tuple[int, str, float]:
    """Exit status, what is said, and seconds of one host; the second one may have some things of its own."""
    rank = dist.get_rank()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": f"node{rank + 1}"}
    flags = ["--output_dir", f"{folder}/out", *flags]
    if rank == 1:
        environment |= on_host_2.get("environment", {})
        flags += on_host_2.get("flags", [])
    before = dict(os.environ)
    os.environ.update(environment)
    said, begun = io.StringIO(), time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if rank == 1:
                for name, value in on_host_2.get("there", {}).items():
                    patch.setattr(preflight, name, value)
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            ended = stack.enter_context(pytest.raises(SystemExit))
            main(flags)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return ended.value.code, said.getvalue(), time.monotonic() - begun


def test_hosts_that_are_fit(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'out'}\ndataset_name: {tmp_path / 'rows.jsonl'}\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--learning_rate", "1e-5"]
    (status, said, _), other = run_ranks(check, 2, free_port(), str(tmp_path), flags, {})
    assert (status, said) == (0, "lisa-dist check: 2 host(s) are fit: node1, node2\n")
    assert other[:2] == (0, "")
    assert not list((tmp_path / "out").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "on_host_2", "said"),
    [
        (["--gpus_per_node", "8"], {}, "host node1: 0 GPUs are visible, not 8 (--gpus_per_node)"),
        ([], {"flags": ["--gpus_per_node", "1"]}, "host node2: 0 GPUs are visible, not 1 (--gpus_per_node)"),
        (
            [],
            {"flags": ["--output_dir", "FOLDER/other"], "there": {"_APPEARS": 1.0}},
            "host node2: --output_dir FOLDER/other is another one: what host",
        ),
        ([], {"flags": ["--output_dir", "/proc/out"]}, "host node2: --output_dir /proc/out cannot be written"),
        (
            [],
            {"there": {"PACKAGES": ("lisa_dist", "triton", "magic")}},
            "host node2: torch is not there, on host node1 2.",
        ),
        (
            [],
            {"flags": ["--dataset_name", "FOLDER/absent.jsonl"]},
            "host node2: --dataset_name FOLDER/absent.jsonl is no such file, on host node1 not there",
        ),
        (
            ["--dataset_name", "FOLDER/here.txt#10", "more"],
            {"flags": ["--deepspeed", "FOLDER/absent.json"]},
            "host node2: --deepspeed FOLDER/absent.json is no such file, on host node1 not there",
        ),
        (
            ["--meet_within", "3"],
            {"environment": {"GLOO_SOCKET_IFNAME": "absent"}},
            "host node2: GLOO_SOCKET_IFNAME absent: gloo does not reach the others (",
        ),
    ],
    ids=[
        "no GPUs",
        "no GPUs on one",
        "other folder",
        "read-only folder",
        "versions",
        "data",
        "DeepSpeed config",
        "gloo",
    ],
)
def test_what_is_wrong_is_named_with_its_host(tmp_path, flags, on_host_2, said):
    on_host_2 = {
        name: [word.replace("FOLDER", str(tmp_path)) for word in words] if name == "flags" else words
        for name, words in on_host_2.items()
    }
    (status, told, seconds), (other, nothing, _) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2)
    assert (status, other, nothing) == (2, 2, "")
    assert f"lisa-dist check: {said.replace('FOLDER', str(tmp_path))}" in told
    assert seconds < 300


def test_an_address_that_does_not_resolve_is_named_on_its_host(tmp_path):
    on_host_2 = {"environment": {"MASTER_ADDR": "no-such-host.invalid"}}
    flags = ["--meet_within", "3"]
    first, (status, said, seconds) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2)
    assert status == 2
    assert said.startswith("lisa-dist check: host node2: MASTER_ADDR no-such-host.invalid: ")
    assert seconds < 300
    assert first[0] == 2
    assert "lisa-dist check: rank 1 has not come within 3 s (--meet_within): it is down, or MASTER_ADDR" in first[1]


def two_of_four(port: int, folder: str) -> tuple[int, str, float]:
    """Two hosts that expect two more."""
    os.environ |= {"WORLD_SIZE": "4", "SLURM_STEP_NODELIST": "node[1-4]"}
    on_host_2 = {"flags": ["--gpus_per_node", "1"]}
    return check(port, folder, ["--meet_within", "5"], on_host_2)


def test_hosts_that_do_not_come_are_named_beside_what_is_wrong_elsewhere(tmp_path):
    (status, said, seconds), (other, nothing, _) = run_ranks(two_of_four, 2, free_port(), str(tmp_path))
    assert (status, other, nothing) == (2, 2, "")
    lines = said.splitlines()
    assert [line.partition(", which")[0] for line in lines[:2]] == [
        f"lisa-dist check: rank {rank}, host node{rank + 1}, has not come within 5 s (--meet_within): it is down, or "
        "MASTER_ADDR is another one there"
        for rank in (2, 3)
    ]
    assert lines[2].startswith("lisa-dist check: host node2: 0 GPUs are visible, not 1")
    assert len(lines) == 3
    assert seconds < 300


def test_a_save_must_fit_before_the_end(tmp_path):
    model = tmp_path / "model"
    tiny_llama().config.save_pretrained(model)
    flags = ["--model_name_or_path", str(model), "--save_within"]
    status, said, _ = run_ranks(check, 1, free_port(), str(tmp_path), [*flags, "60"], {})[0]
    assert status == 0
    assert "lisa-dist check: a checkpoint has about " in said
    status, said, _ = run_ranks(check, 1, free_port(), str(tmp_path), [*flags, "0.000001"], {})[0]
    assert status == 2
    assert "a save takes about 0 s, and the job ends 0 s (--save_within) after its signal: send it earlier" in said


def time_to_save(port: int, folder: str) -> tuple[list[str], str]:
    """Problems, and what is said, of one host that has much time for a small checkpoint."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        host = HostCheck("node1", Path(folder), save_within=1000, checkpoint_bytes=lambda: (2**20, 3 * 2**20))
        problems = host.problems()
    return problems, said.getvalue()


def test_the_time_of_a_save_is_told(tmp_path):
    ((problems, said),) = run_ranks(time_to_save, 1, free_port(), str(tmp_path))
    assert problems == []
    speed = r"\d[\d.]* [MG]iB/s"
    seconds = rf"and is saved in about \d+ s, as every host writes {speed}; after the first one only what has changed"
    assert re.search(f"lisa-dist check: a checkpoint has about 4[.]0 MiB, {seconds}", said), said


def test_hosts_write_as_much_as_each_other_and_wait_for_the_slowest(tmp_path):
    model = tmp_path / "model"
    tiny_llama().config.save_pretrained(model)
    flags = {"model_name_or_path": str(model), "bf16": "true", "lisa_activated_layers": "2"}
    parameters = [parameter.numel() for parameter in tiny_llama().parameters()]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in tiny_llama().model.layers]
    total, active = sum(parameters), sum(parameters) - sum(layers) + 2 * layers[0]
    assert checkpoint_bytes(flags) == (2 * total, 12 * active)
    assert checkpoint_bytes(flags | {"method": "full"}) == (2 * total, 12 * total)
    del flags["bf16"]  # no GPU is here
    assert checkpoint_bytes(flags) == (4 * total, 12 * active)
    assert seconds_to_save(sum(checkpoint_bytes(flags)), [100, 300]) == (4 * total + 12 * active) / 100


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--save_within needs the run's --model_name_or_path"),
        (["--model_name_or_path", "no/such-model"], "--model_name_or_path no/such-model: no such folder"),
        (["--packin"], "--packin: no such flag; did you mean --packing?"),
        (["--config", "FOLDER"], "--config FOLDER: cannot be read"),
        (["--config", "FOLDER/empty.yaml"], "--config FOLDER/empty.yaml: must hold keys and values"),
    ],
)
def test_flags_that_are_no_use_are_named(tmp_path, flags, said):
    (tmp_path / "empty.yaml").write_text("")
    flags = [*(word.replace("FOLDER", str(tmp_path)) for word in flags), "--save_within", "60"]
    status, told, _ = run_ranks(check, 1, free_port(), str(tmp_path), flags, {})[0]
    assert status == 2
    assert said.replace("FOLDER", str(tmp_path)) in told


def ends_soon(port: int, folder: str, model: str) -> tuple[int, str, float]:
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 30)
    return check(port, folder, ["--model_name_or_path", model, "--save_within", "60"], {})


def test_a_job_that_ends_before_it_could_save_is_refused(tmp_path):
    model = tmp_path / "model"
    tiny_llama().config.save_pretrained(model)
    status, said, _ = run_ranks(ends_soon, 1, free_port(), str(tmp_path), str(model))[0]
    assert status == 2
    assert "before it could train and save: give it more time" in said


def test_flags_of_the_run_win_over_its_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nlearning_rate: 1.0e-5\nbf16: false\n")
    arguments = CheckArguments(config=str(recipe))
    flags_of_recipe = {"output_dir": "out", "learning_rate": 1e-5, "bf16": False}
    assert flags_of_run(arguments, []) == flags_of_recipe
    words = ["--bf16", "true", "--learning-rate", "3e-4", "--dataset_name", "a.jsonl#3", "b.jsonl", "--packing"]
    changed = {"learning_rate": 3e-4, "bf16": True, "dataset_name": ["a.jsonl#3", "b.jsonl"], "packing": True}
    assert flags_of_run(arguments, words) == flags_of_recipe | changed


def test_a_folder_is_asked_for():
    with pytest.raises(SystemExit) as ended:
        main(["--gpus_per_node", "0"])
    assert ended.value.code == 2
