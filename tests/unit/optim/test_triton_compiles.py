"""The Triton kernels compile for GPUs that are not there, with the environment's Triton and the oldest."""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from cases import full
from triton_forms import FACTORED_FORMS, FORMS, accesses, compile_factored, compile_form, compile_rows, compile_sums

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("capability", "seed"), [full(80, "i64"), (90, "i32")])
def test_triton_compiles_for_a_gpu_that_is_not_there(form, capability, seed):
    """Four elements a thread are one access to memory in pieces that begin and end at multiples of 16."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lisa_dist.kernels.adamw_triton import _adamw

    code = compile_form(_adamw, form, capability, seed)
    *_, loads, stores = FORMS[form]
    assert accesses(code) == (8 * loads, 8 * stores)
    assert ".local" not in code, "registers are enough"


@pytest.mark.parametrize("capability", [full(80), 90])
def test_the_kernels_of_factored_moments_compile(capability):
    """What is read a row or a column at a time cannot be one access; weights, masters and gradients are."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lisa_dist.kernels.factored_triton import _factored, _squared_sums

    for form, (*_, loads, stores) in FACTORED_FORMS.items():
        code = compile_factored(_factored, form, capability)
        assert accesses(code) == (8 * loads, 8 * stores), form
        assert ".local" not in code, form
        assert code.count("div.s64") <= 9, "one for each row of 256, and the first element's"
    assert ".local" not in compile_sums(_squared_sums, capability)


@pytest.mark.parametrize("capability", [full(89), 90, full(100)])
def test_the_kernel_of_rows_in_fp8_compiles(capability):
    pytest.importorskip("triton", reason="Triton is not installed")
    from lisa_dist.kernels.fp8_rows_triton import _fp8_rows

    code = compile_rows(_fp8_rows, capability)
    assert "cvt.rn.satfinite.e4m3x2.f32" in code
    assert ".local" not in code


@pytest.fixture
def oldest_triton(request) -> Path:
    """A folder of the oldest Triton that pyproject.toml takes, from an index; kept for the next time."""
    version = re.search(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text()).group(1)
    folder = request.config.cache.mkdir(f"triton-{version}")
    if not (folder / "whole").exists():
        with tempfile.TemporaryDirectory() as wheels:
            command = [sys.executable, "-m", "pip", "download", f"triton=={version}", "--no-deps", "--dest", wheels]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip(f"no Triton {version} for this Python can be downloaded")
            zipfile.ZipFile(next(Path(wheels).iterdir())).extractall(folder)
        for program in (folder / "triton" / "backends" / "nvidia" / "bin").iterdir():
            program.chmod(0o755)  # which a wheel knows, and zipfile does not
        (folder / "whole").touch()
    return folder


@pytest.mark.full
def test_the_oldest_triton_compiles_all_forms(oldest_triton, tmp_path):
    """The same accesses as with ours, without which a line that only newer ones take would not be seen."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "triton_forms.py"), str(ROOT / "kernels"), "80", "90"]
    variables = {"PYTHONPATH": str(oldest_triton), "TRITON_CACHE_DIR": str(tmp_path)}
    finished = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout)
    assert oldest_triton.name == f"triton-{found['triton'].rpartition('.')[0]}"
    forms = FORMS | {f"factored, {name}": form for name, form in FACTORED_FORMS.items()}
    wanted = {name: [8 * loads, 8 * stores, False] for name, (*_, loads, stores) in forms.items()}
    sums = {name: found["forms"].pop(name) for name in ("sm_80, sums", "sm_90, sums")}
    assert not any(is_local for *_, is_local in sums.values())
    assert found["forms"] == {f"sm_{sm}, {name}": one for sm in (80, 90) for name, one in wanted.items()}
