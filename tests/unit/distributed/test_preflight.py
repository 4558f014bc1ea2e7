"""`lisa-dist check` on two processes that stand for two hosts: what is wrong is named, with the host where it is."""

import contextlib
import io
import json
import os
import re
import time
from unittest.mock import patch

import pytest
from models import tiny_llama
from ranks import free_port, run_ranks
from torch import distributed as dist

from lisa_dist.checkpoint.size import checkpoint_bytes
from lisa_dist.commands.check import CheckArguments, compared_files, flags_of_run, main
from lisa_dist.distributed import preflight
from lisa_dist.distributed.preflight import seconds_to_save


def check(port: int, folder: str, flags: list[str], on_host_2: dict, everywhere: dict | None = None) -> tuple[int, str]:
    """Exit status of one host, and what is said; the second one may have some things of its own."""
    rank = dist.get_rank()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": f"node{rank + 1}"}
    environment |= everywhere or {}
    flags, said = ["--output_dir", f"{folder}/out", *flags], io.StringIO()
    with contextlib.ExitStack() as stack:
        if rank == 1 and on_host_2:
            environment |= on_host_2["environment"]
            flags += on_host_2["flags"]
            stack.enter_context(patch.dict(vars(preflight), on_host_2["there"]))
        stack.enter_context(patch.dict(os.environ, environment))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        ended = stack.enter_context(pytest.raises(SystemExit))
        main(flags)
    return ended.value.code, said.getvalue()


def test_hosts_that_are_fit(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'out'}\ndataset_name: {tmp_path / 'rows.jsonl'}\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--learning_rate", "1e-5"]
    fit = (0, "lisa-dist check: 2 host(s) are fit: node1, node2\n")
    assert run_ranks(check, 2, free_port(), str(tmp_path), flags, {}) == [fit, (0, "")]
    assert not list((tmp_path / "out").iterdir()), "nothing is left behind"


def of_host_2(*flags: str, there: dict | None = None, environment: dict | None = None) -> dict:
    return {"flags": flags, "there": there or {}, "environment": environment or {}}


SLIPS = {
    "no GPUs": (["--gpus_per_node", "8"], {}, "host node1: 0 GPUs are visible, not 8 (--gpus_per_node)"),
    "no GPUs on one": (
        [],
        of_host_2("--gpus_per_node", "1"),
        "host node2: 0 GPUs are visible, not 1 (--gpus_per_node)",
    ),
    "other folder": (
        [],
        of_host_2("--output_dir", "FOLDER/other", there={"_APPEARS": 1.0}),
        "host node2: --output_dir FOLDER/other is another one: what host",
    ),
    "read-only folder": (
        [],
        of_host_2("--output_dir", "/proc/out"),
        "host node2: --output_dir /proc/out cannot be written",
    ),
    "versions": (
        [],
        of_host_2(there={"PACKAGES": ("lisa_dist", "triton", "magic")}),
        "host node2: torch is not there, on host node1 2.",
    ),
    "data": (
        ["--dataset_name", "FOLDER/here.txt#10", "more"],
        of_host_2("--dataset_name", "FOLDER/absent.jsonl"),
        "host node2: --dataset_name FOLDER/absent.jsonl is no such file, on host node1 not there",
    ),
    "DeepSpeed config": (
        [],
        of_host_2("--deepspeed", "FOLDER/absent.json"),
        "host node2: --deepspeed FOLDER/absent.json is no such file, on host node1 not there",
    ),
    "gloo": (
        ["--meet_within", "3"],
        of_host_2(environment={"GLOO_SOCKET_IFNAME": "absent"}),
        "host node2: GLOO_SOCKET_IFNAME absent: gloo does not reach the others (",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_is_wrong_is_named_with_its_host(tmp_path, slip):
    flags, on_host_2, said = json.loads(json.dumps(SLIPS[slip]).replace("FOLDER", str(tmp_path)))
    (status, told), (other, nothing) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2)
    assert (status, other, nothing) == (2, 2, "")
    assert f"lisa-dist check: {said}" in told


def test_an_address_that_does_not_resolve_is_named_on_its_host(tmp_path):
    on_host_2 = of_host_2(environment={"MASTER_ADDR": "no-such-host.invalid"})
    first, (status, said) = run_ranks(check, 2, free_port(), str(tmp_path), ["--meet_within", "3"], on_host_2)
    assert status == 2
    assert said.startswith("lisa-dist check: host node2: MASTER_ADDR no-such-host.invalid: ")
    assert first[0] == 2
    assert "lisa-dist check: rank 1 has not come within 3 s (--meet_within): it is down, or MASTER_ADDR" in first[1]


def test_hosts_that_do_not_come_are_named_beside_what_is_wrong_elsewhere(tmp_path):
    on_host_2, four = of_host_2("--gpus_per_node", "1"), {"WORLD_SIZE": "4", "SLURM_STEP_NODELIST": "node[1-4]"}
    flags = ["--meet_within", "5"]
    (status, said), (other, nothing) = run_ranks(check, 2, free_port(), str(tmp_path), flags, on_host_2, four)
    assert (status, other, nothing) == (2, 2, "")
    lines = said.splitlines()
    assert [line.partition(", which")[0] for line in lines[:2]] == [
        f"lisa-dist check: rank {rank}, host node{rank + 1}, has not come within 5 s (--meet_within): it is down, or "
        "MASTER_ADDR is another one there"
        for rank in (2, 3)
    ]
    assert lines[2].startswith("lisa-dist check: host node2: 0 GPUs are visible, not 1")
    assert len(lines) == 3


TIME = (
    r"lisa-dist check: a checkpoint has about \d[\d.]* MiB, and is saved in about \d+ s, as every host writes "
    r"\d[\d.]* [MG]iB/s; after the first one only what has changed is written\n"
)


@pytest.mark.parametrize(
    ("within", "ends_in", "status", "said"),
    [
        ("60", None, 0, TIME),
        (
            "0.000001",
            None,
            2,
            r"a save takes about 0 s, and the job ends 0 s \(--save_within\) after its signal: send it",
        ),
        ("60", 30, 2, "before it could train and save: give it more time"),
    ],
)
def test_a_save_must_fit_before_the_end(tmp_path, within, ends_in, status, said):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--save_within", within]
    job = {} if ends_in is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + ends_in)}
    ((found, told),) = run_ranks(check, 1, free_port(), str(tmp_path), flags, {}, job)
    assert found == status
    assert re.search(said, told), told


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
    ((status, told),) = run_ranks(check, 1, free_port(), str(tmp_path), flags, {})
    assert status == 2
    assert said.replace("FOLDER", str(tmp_path)) in told


def test_flags_of_the_run_win_over_its_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nlearning_rate: 1.0e-5\nbf16: false\n")
    arguments = CheckArguments(config=str(recipe))
    flags_of_recipe = {"output_dir": "out", "learning_rate": 1e-5, "bf16": False}
    assert flags_of_run(arguments, []) == flags_of_recipe
    words = ["--bf16", "true", "--learning-rate", "3e-4", "--dataset_name", "a.jsonl#3", "b.jsonl", "--packing"]
    changed = {"learning_rate": 3e-4, "bf16": True, "dataset_name": ["a.jsonl#3", "b.jsonl"], "packing": True}
    assert flags_of_run(arguments, words) == flags_of_recipe | changed


def test_a_file_with_a_blank_in_its_name_is_compared():
    files = compared_files(None, {"dataset_name": "my rows.jsonl", "eval_dataset_name": ["a.jsonl", "b c.jsonl"]})
    assert [path for _, path in files] == ["my rows.jsonl", "a.jsonl", "b c.jsonl"]
