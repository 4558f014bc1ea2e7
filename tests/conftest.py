"""Set-up of all tests: CPU ranks, no hub, C++ ops built before ranks need them."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it starts with &
_caches = tempfile.mkdtemp(prefix="lisa_dist_tests_")
os.environ["HF_HOME"] = _caches  # data may be read-only, and nothing is left in the user's cache
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the traces of the process that starts them
    os.environ["LISA_DIST_CACHE"] = _caches

import ranks  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left with one at the end: whole groups, `full` tests, runs, ranks."""

    def place(item: pytest.Item) -> int:
        is_marked = [item.get_closest_marker(name) is not None for name in ("xdist_group", "full")]
        return [*is_marked, item.path.parent.name == "system", hasattr(item.module, "run_ranks"), True].index(True)

    items.sort(key=place)


@pytest.fixture(scope="session")
def cpu_ops() -> None:
    """DeepSpeed's C++ ops, built once: two ranks would race for the build."""
    from lisa_dist.zero.cpu_ops import build_cpu_ops

    build_cpu_ops()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a byte tokenizer and a chat template, and some rows."""
    from runs import save_tiny_run

    return save_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(folder) -> str:
    """The model alone, which nobody writes to."""
    return str(folder / "model")


@pytest.fixture(scope="session", autouse=True)
def _errors_name_flags():
    """As in a run; test_errors.py has them as Python sees them."""
    from lisa_dist.errors import naming_flags

    with naming_flags():
        yield


@pytest.fixture(scope="session", autouse=True)
def _stop_ranks_at_the_end():
    yield
    ranks.stop_ranks()


@pytest.fixture(autouse=True)
def _environment_of_its_own():
    """A parse makes its process the only rank where nothing says which it is, and a benchmark's ranks are CPUs'."""
    before = {name: value for name, value in os.environ.items() if name not in ranks.OF_RANKS}
    for name in ranks.OF_RANKS:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


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
