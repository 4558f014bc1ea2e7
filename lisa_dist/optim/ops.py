"""Which implementation of a kernel runs where: the one module that imports those of Triton.

Triton on CUDA where it can be imported, torch otherwise; the environment variable LISA_DIST_KERNELS = triton | torch
forces either.
"""

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from lisa_dist.errors import UserError
from lisa_dist.kernels.adamw import StepNumbers, StepTensors, adamw_torch
from lisa_dist.kernels.factored import FactoredNumbers, FactoredTensors, factored_torch, squared_sums_torch
from lisa_dist.kernels.fp8_rows import fp8_rows_torch

VARIABLE = "LISA_DIST_KERNELS"


def choose_kernels(device_type: str) -> tuple[str, str]:
    """What runs on a device, "triton" or "torch", and why, in a few words; ValueError for what is forced in vain."""
    return _choose(device_type, os.environ.get(VARIABLE, "auto"), os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _choose(device_type: str, forced: str, interpreted: bool) -> tuple[str, str]:
    if forced not in ("triton", "torch", "auto"):
        raise UserError(f"{VARIABLE}={forced}: unknown; choose triton or torch, or leave it out.")
    if forced == "torch":
        return "torch", f"{VARIABLE}=torch"
    is_forced = forced == "triton"
    if device_type != "cuda" and not is_forced:
        return "torch", "no CUDA device"
    version, missing = _import_triton()
    advice = "; pip install triton" if missing else ""
    if device_type != "cuda" and not interpreted and not missing:
        raise UserError(
            f"{VARIABLE}=triton on {device_type}: Triton's kernels run on CUDA, and elsewhere in its interpreter "
            "alone (TRITON_INTERPRET=1, slow); leave the variable out."
        )
    if not (is_forced and interpreted):
        missing = missing or why_no_compiler()
    if missing and is_forced:
        raise UserError(f"{VARIABLE}=triton: {missing}{advice}, or leave the variable out.")
    if missing:
        return "torch", missing
    return "triton", f"{VARIABLE}=triton" if is_forced else f"Triton {version}"


def _import_triton() -> tuple[str, str]:
    """Triton's version, and why it cannot be imported, one of them empty; that it is installed does not tell."""
    if importlib.util.find_spec("triton") is None:
        return "", "Triton is not installed"
    try:
        import triton
        import triton.language
    except (ImportError, OSError, RuntimeError) as error:
        return "", f"Triton cannot be imported ({' '.join(str(error).split())})"
    return triton.__version__, ""


@functools.cache
def why_no_compiler() -> str:
    """Why Triton cannot launch a kernel where it can be imported, or nothing.

    At its first launch it compiles C that includes Python.h, with the compiler that is looked for here.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler, which Triton needs: apt install gcc, or set CC"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "line.c"
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        command = [*shlex.split(compiler), "-fsyntax-only", "-I", sysconfig.get_path("include"), str(source)]
        try:
            compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C compiler {compiler} cannot be run ({error.strerror}), which Triton needs: set CC"
    if compiled.returncode:
        first = next((line for line in compiled.stderr.splitlines() if "error" in line), compiled.stderr.strip())
        return f"{compiler} cannot compile with Python.h, which Triton needs: apt install python3-dev ({first})"
    return ""


def squared_sums(
    gradient: torch.Tensor, gradient_scale: torch.Tensor | None, element: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of a piece's squared gradient over each row that it touches, and over each of the matrix's columns, fp32."""
    kernels, _ = choose_kernels(gradient.device.type)
    if kernels == "triton":
        from lisa_dist.kernels.factored_triton import squared_sums_triton as sums
    else:
        sums = squared_sums_torch
    return sums(gradient, gradient_scale, element, columns)


def factored_step(tensors: FactoredTensors, numbers: FactoredNumbers) -> None:
    """One step with a factored moment over a piece of a matrix, in place; the tensors have passed `check_factored`."""
    kernels, _ = choose_kernels(tensors.target.device.type)
    if kernels == "triton":
        from lisa_dist.kernels.factored_triton import factored_triton as step
    else:
        step = factored_torch
    step(tensors, numbers)


def has_fp8(device: torch.device) -> bool:
    """Whether a device casts to e4m3 and multiplies it by itself; a CPU does, for tests.

    ROCm's compute capability is the number of an AMD architecture: 9.0 is a GPU without fp8.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_rows(values: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of values [rows, columns] in e4m3, and scales [rows, 1]; each column times its factor before."""
    if values.is_meta or not has_fp8(values.device):
        return fp8_rows_torch(values, factors)
    kernels, _ = choose_kernels(values.device.type)
    if kernels == "triton":
        from lisa_dist.kernels.fp8_rows_triton import fp8_rows_triton

        return fp8_rows_triton(values.contiguous(), factors)
    return fp8_rows_torch(values, factors)


def adamw_step(tensors: StepTensors, numbers: StepNumbers) -> None:
    """One step of AdamW over a piece of a parameter, in place; the tensors have passed `check_tensors`."""
    kernels, _ = choose_kernels(tensors.target.device.type)
    if kernels == "triton":
        from lisa_dist.kernels.adamw_triton import adamw_triton as step
    else:
        step = adamw_torch
    step(tensors, numbers)
