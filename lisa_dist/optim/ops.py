"""Which implementation of a kernel runs where: the one module that imports `lisa_dist.kernels`.

Triton on CUDA where it can be imported, torch otherwise; the environment variable LISA_DIST_KERNELS = triton | torch
forces either. AdamW's kernel is the torch operator `lisa_dist::adamw_`, so that compilers and fake tensors know it.
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
from typing import Any

import torch

from lisa_dist.errors import UserError
from lisa_dist.kernels.adamw import StepNumbers, StepTensors, adamw_torch, check_tensors, chunk_bytes, chunks
from lisa_dist.kernels.dynamic_code import BLOCK, dequantize, num_blocks, quantize, table_bytes
from lisa_dist.kernels.factored import (
    FactoredNumbers,
    FactoredTensors,
    check_factored,
    factored_chunk_bytes,
    factored_torch,
    num_rows,
    squared_sums_torch,
)

__all__ = [
    "BLOCK",
    "OPERATORS",
    "FactoredNumbers",
    "FactoredTensors",
    "StepNumbers",
    "StepTensors",
    "adamw_step",
    "check_factored",
    "check_tensors",
    "choose_kernels",
    "chunk_bytes",
    "chunks",
    "dequantize",
    "factored_chunk_bytes",
    "factored_step",
    "num_blocks",
    "num_rows",
    "quantize",
    "squared_sums",
    "table_bytes",
]

VARIABLE = "LISA_DIST_KERNELS"
KERNELS = ("triton", "torch")

_TENSORS = (
    "weight",
    "master",
    "gradient",
    "exp_avg",
    "exp_avg_sq",
    "exp_avg_scales",
    "exp_avg_sq_scales",
    "gradient_scale",
)
torch.library.define(
    "lisa_dist::adamw_",
    "(Tensor(a!)? weight, Tensor(b!)? master, Tensor gradient, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? exp_avg_scales, Tensor(f!)? exp_avg_sq_scales, Tensor? gradient_scale, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, int step, int element=0, int seed=0, int parameter=0, int draw=0) "
    "-> ()",
)


def choose_kernels(device_type: str) -> tuple[str, str]:
    """What runs on a device, "triton" or "torch", and why, in a few words; ValueError for what is forced in vain."""
    return _choose(device_type, os.environ.get(VARIABLE, "auto"), os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _choose(device_type: str, forced: str, interpreted: bool) -> tuple[str, str]:
    if forced not in (*KERNELS, "auto"):
        raise UserError(f"{VARIABLE}={forced}: unknown; choose triton or torch, or leave it out.")
    if forced == "torch":
        return "torch", f"{VARIABLE}=torch"
    if forced == "triton":
        version, missing = _import_triton()
        if missing:
            raise UserError(f"{VARIABLE}=triton: {missing}; pip install triton, or leave the variable out.")
        if device_type != "cuda" and not interpreted:
            raise UserError(
                f"{VARIABLE}=triton on {device_type}: Triton's kernels run on CUDA, and elsewhere in its interpreter "
                "alone (TRITON_INTERPRET=1, slow); leave the variable out."
            )
        if not interpreted and (missing := why_no_compiler()):
            raise UserError(f"{VARIABLE}=triton: {missing}, or leave the variable out.")
        return "triton", f"{VARIABLE}=triton"
    if device_type != "cuda":
        return "torch", "no CUDA device"
    version, missing = _import_triton()
    missing = missing or why_no_compiler()
    return ("torch", missing) if missing else ("triton", f"Triton {version}")


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


def adamw_step(tensors: StepTensors, numbers: StepNumbers) -> None:
    """One step of AdamW over a piece of a parameter, in place; the tensors have passed `check_tensors`."""
    torch.ops.lisa_dist.adamw_(*(getattr(tensors, name) for name in _TENSORS), *vars(numbers).values())


def _adamw(*tensors_and_numbers: Any) -> None:
    """The operator: the fields of StepTensors, then those of StepNumbers."""
    tensors = StepTensors(*tensors_and_numbers[: len(_TENSORS)])
    kernels, _ = choose_kernels(tensors.target.device.type)
    if kernels == "triton":
        from lisa_dist.kernels.adamw_triton import adamw_triton as step
    else:
        step = adamw_torch
    step(tensors, StepNumbers(*tensors_and_numbers[len(_TENSORS) :]))


torch.library.impl("lisa_dist::adamw_", "default", _adamw)
# What each of our operators runs, for whoever looks inside.
OPERATORS = {torch.ops.lisa_dist.adamw_.default: _adamw}


@torch.library.register_fake("lisa_dist::adamw_")
def _fake(*tensors_and_numbers: Any) -> None:
    """It returns nothing; what it writes keeps shape and dtype."""
