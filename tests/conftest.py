"""Set-up of all tests: CPU ranks, no hub, C++ ops built before ranks need them."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
_caches = tempfile.mkdtemp(prefix="lisa_dist_tests_")
os.environ["HF_HOME"] = _caches  # data may be read-only, and nothing is left in the user's cache

import ranks  # noqa: E402

# What one worker does, since it shares a cluster, a run, or ranks that import all by themselves; the rest goes to
# whichever worker is free. By parts of names, since pytest 9 does not tell pytest-xdist 3.8 of its marks of groups.
TOGETHER = {
    "test_slurm.py": "slurm",
    "test_hosts.py": "hosts",
    "test_liger.py": "interpreter",
    "test_kernels.py": "interpreter",
    "test_fp32_by_triton": "interpreter",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Groups first, the largest at the head, and then test by test: no worker is left with a long file at the end."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for part, group in TOGETHER.items() if part in nodeid), nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def cpu_ops() -> None:
    """DeepSpeed's C++ ops, built once: two ranks would race for the build."""
    from lisa_dist.cpu_ops import build_cpu_ops

    build_cpu_ops()


@pytest.fixture(scope="session", autouse=True)
def _stop_ranks_at_the_end():
    yield
    ranks.stop_ranks()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, beside the repository or where LISA_DIST_DATA points; skips where it is absent."""
    folder = Path(os.environ.get("LISA_DIST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LISA_DIST_DATA")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; where none may be mounted, files of at most 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    yield folder, None if mounted.returncode == 0 else 1_000_000
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", folder], check=True)
