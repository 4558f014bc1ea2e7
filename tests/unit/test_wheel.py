"""What the wheel holds, used outside the repository: links are files in it, and recipes and examples come along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves files beside its sources.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in map(os.fsdecode, filter(None, files)):
        source, copy = ROOT / name, folder / "source" / name
        if source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source.readlink()) if source.is_symlink() else copy.write_bytes(source.read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        str(folder / "source"),
    ]
    ran = subprocess.run([*build, "--wheel-dir", str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = folder.glob("lisa_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def said_by(unpacked: Path, *words: str) -> str:
    """What the command of the wheel says, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(unpacked), "LISA_DIST_CACHE": str(unpacked / "cache")}
    script = "import lisa_dist, sys; from lisa_dist.cli import main; print(lisa_dist.__file__); main()"
    ran = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=unpacked.parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    place, _, said = ran.stdout.partition("\n")
    assert Path(place).is_relative_to(unpacked), "of the wheel, and not of the repository"
    return said


@pytest.mark.parametrize(
    "name", ["py.typed", "model_configs/llama3.1-8b.json", "kernels/adamw_triton.py",
             "ds_configs/zero3_offload.json", "report/report.html", "recipes/quickstart.yaml", "examples/dpo.py",
             "eval/eval_tasks/gsm8k.yaml", "examples/continued_pretraining/recipe.yaml"],
)  # fmt: skip
def test_every_kind_of_file_is_there(unpacked, name):
    assert (unpacked / "lisa_dist" / name).is_file()
    assert not (unpacked / "lisa_dist" / name).is_symlink()


def test_recipes_and_plans_come_with_it(unpacked):
    listed = said_by(unpacked, "recipes")
    assert {"quickstart", "llama2_7b_1gpu", "dpo.py"} <= set(listed.split())
    assert "lisa_activated_layers" in said_by(unpacked, "recipes", "show", "quickstart")
    assert "--lisa_activated_layers" in said_by(unpacked, "train", "--help")
