"""`lisa-dist check` on two processes that stand for two hosts: what is wrong is named, with the host where it is."""

import contextlib
import io
import os
import time

import pytest
from models import tiny_llama
from ranks import free_port, run_ranks
from torch import distributed as dist

from lisa_dist import preflight
from lisa_dist.preflight import _flags, main


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
    said, begun, packages = io.StringIO(), time.monotonic(), preflight.PACKAGES
    if rank == 1 and "packages" in on_host_2:
        preflight.PACKAGES = on_host_2["packages"]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
            main(flags)
    finally:
        preflight.PACKAGES = packages
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
            {"flags": ["--output_dir", "FOLDER/other"]},
            "host node2: --output_dir FOLDER/other is another one: what host",
        ),
        ([], {"flags": ["--output_dir", "/proc/out"]}, "host node2: --output_dir /proc/out cannot be written"),
        ([], {"packages": ("lisa_dist", "triton", "magic")}, "host node2: torch is not there, on host node1 2."),
        (
            [],
            {"flags": ["--dataset_name", "FOLDER/absent.jsonl"]},
            "host node2: --dataset_name FOLDER/absent.jsonl is no such file, on host node1 not there",
        ),
    ],
    ids=["no GPUs", "no GPUs on one", "other folder", "read-only folder", "versions", "data"],
)
def test_what_is_wrong_is_named_with_its_host(tmp_path, flags, on_host_2, said):
    on_host_2 = {
        name: [word.replace("FOLDER", str(tmp_path)) for word in words] if name == "flags" else words
        for name, words in on_host_2.items()
    }
    (status, told, seconds), (other, nothing, _) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2)
    assert (status, other, nothing) == (2, 2, "")
    assert f"lisa-dist check: {said.replace('FOLDER', str(tmp_path))}" in told
    assert seconds < 30


def test_an_address_that_does_not_resolve_is_named_on_its_host(tmp_path):
    on_host_2 = {"environment": {"MASTER_ADDR": "no-such-host.invalid"}}
    flags = ["--meet_within", "2"]
    first, (status, said, seconds) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2)
    assert status == 2
    assert said.startswith("lisa-dist check: host node2: MASTER_ADDR no-such-host.invalid: ")
    assert seconds < 30
    assert first[0] == 2
    assert "rank 1 of 2: its host has not come within 2 s" in first[1]


def test_a_save_must_fit_before_the_end(tmp_path):
    model = tmp_path / "model"
    tiny_llama().config.save_pretrained(model)
    flags = ["--model_name_or_path", str(model), "--save_within"]
    status, said, _ = run_ranks(check, 1, free_port(), str(tmp_path), [*flags, "60"], {})[0]
    assert status == 0
    assert "lisa-dist check: a checkpoint has about " in said
    status, said, _ = run_ranks(check, 1, free_port(), str(tmp_path), [*flags, "0.000001"], {})[0]
    assert status == 2
    assert "a save takes about 0 s, and the job ends 0 s after the signal: send it earlier" in said


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
    arguments = preflight.CheckArguments(config=str(recipe))
    assert _flags(arguments, []) == {"output_dir": "out", "learning_rate": 1e-5, "bf16": False}
    words = ["--bf16", "--learning_rate", "3e-4", "--dataset_name=rows.jsonl"]
    changed = {"output_dir": "out", "learning_rate": "3e-4", "bf16": "true", "dataset_name": "rows.jsonl"}
    assert _flags(arguments, words) == changed


def test_a_folder_is_asked_for():
    with pytest.raises(SystemExit) as ended:
        main(["--gpus_per_node", "0"])
    assert ended.value.code == 2
