"""The forms of the Triton kernels, compiled for a GPU that is not there.

With another Triton than the environment's, in a process of its own, it prints what it compiles:

    PYTHONPATH=folder_of_that_triton python tests/support/triton_forms.py kernels 80 90
"""

import importlib
import json
import sys
import types
from typing import Any

# Weights, whether there is a master, whether moments have 8 bits, gradients; and accesses of 16 bytes in a row of 256.
FORMS = {
    "fp32": ("fp32", False, False, "fp32", 4, 3),
    "bf16, fp32 master": ("bf16", True, False, "bf16", 3, 3),
    "bf16, fp32 master, 8 bits": ("bf16", True, True, "bf16", 1, 1),
    "bf16, stochastic": ("bf16", False, False, "bf16", 2, 2),
    "bf16, stochastic, fp32 gradients": ("bf16", False, False, "fp32", 3, 2),
    "bf16, stochastic, 8 bits": ("bf16", False, True, "bf16", 0, 0),
}
# Of the factored moment: weights, whether there is a master, and accesses of 16 bytes in a row of 256.
FACTORED_FORMS = {
    "fp32": ("fp32", False, 2, 1),
    "bf16, fp32 master": ("bf16", True, 1, 1),
    "bf16, stochastic": ("bf16", False, 0, 0),
}


def compile_form(kernel: Any, form: str, capability: int, seed: str = "i32") -> str:
    """PTX of the kernel `_adamw`, for pieces that begin and end at multiples of 16. `seed`: that argument's type."""
    weight, has_master, quantized, gradient, *_ = FORMS[form]
    kinds = _kinds(kernel, weight, has_master, gradient) | {"seed": seed}
    kinds |= dict.fromkeys(("exp_avg", "exp_avg_sq"), "*u8" if quantized else "*fp32")
    tables = ("code", "thresholds", "code_sq", "thresholds_sq", "exp_avg_scales", "exp_avg_sq_scales")
    kinds |= dict.fromkeys(tables, "*fp32" if quantized else None)
    kinds |= dict.fromkeys(("guesses", "guesses_sq"), "*u8" if quantized else None)
    return _compile(kernel, kinds, _constants(weight, has_master) | {"QUANTIZED": quantized}, capability)


def compile_factored(kernel: Any, form: str, capability: int) -> str:
    """PTX of the kernel `_factored`, for pieces that begin and end at multiples of 16."""
    weight, has_master, *_ = FACTORED_FORMS[form]
    kinds = _kinds(kernel, weight, has_master, weight) | {"row_roots": "*fp32", "column_roots": "*fp32"}
    kinds |= {"columns": "i32"}
    return _compile(kernel, kinds, _constants(weight, has_master) | {"NARROW": False}, capability)


def compile_sums(kernel: Any, capability: int) -> str:
    """PTX of the kernel `_squared_sums`."""
    kinds = dict.fromkeys(kernel.arg_names, "i32") | {"gradient": "*bf16"}
    kinds |= dict.fromkeys(("gradient_scale", "row_sums", "column_sums"), "*fp32")
    return _compile(kernel, kinds, {"HAS_SCALE": True, "ROWS": 16, "COLUMNS": 256}, capability, num_warps=4)


def compile_rows(kernel: Any, capability: int) -> str:
    """PTX of the kernel `_fp8_rows`, of rows of 4,096 elements times factors."""
    kinds = {"values": "*bf16", "factors": "*fp32", "codes": "*u8", "scales": "*fp32", "columns": "i32"}
    kinds |= {"HAS_FACTORS": "constexpr", "COLUMNS": "constexpr"}
    return _compile(kernel, kinds, {"HAS_FACTORS": True, "COLUMNS": 4096}, capability, num_warps=8)


def _kinds(kernel: Any, weight: str, has_master: bool, gradient: str) -> dict[str, Any]:
    kinds = dict.fromkeys(kernel.arg_names, "fp32") | {"master": "*fp32" if has_master else None}
    kinds |= {"weight": f"*{weight}", "gradient": f"*{gradient}", "gradient_scale": "*fp32"}
    return kinds | dict.fromkeys(("numel", "element", "seed", "parameter", "draw"), "i32")


def _constants(weight: str, has_master: bool) -> dict[str, Any]:
    constants = {"HAS_MASTER": has_master, "HAS_WEIGHT": True, "HAS_SCALE": True, "ROW": 256, "ROWS": 8}
    return constants | {"STOCHASTIC": weight == "bf16" and not has_master}


def _compile(kernel: Any, kinds: dict[str, Any], constants: dict[str, Any], capability: int, num_warps: int = 2) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {name: None for name in kinds if kinds[name] is None}
    signature = {name: "constexpr" if name in constants else kind for name, kind in kinds.items()}
    multiples = [name in ("numel", "element") or str(kind).startswith("*") for name, kind in kinds.items()]
    attributes = {(index,): [["tt.divisibility", 16]] for index, multiple in enumerate(multiples) if multiple}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]


def accesses(ptx: str) -> tuple[int, int]:
    """Loads and stores of 16 bytes."""
    return ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32")


def main(folder: str, *capabilities: str) -> None:
    """Compile each form of the kernel in a folder, and print versions, accesses, and whether registers are enough."""
    import triton

    package = types.ModuleType("kernels_by_themselves")  # the library would import what needs the environment's Triton
    package.__path__ = [folder]
    sys.modules[package.__name__] = package
    kernel = importlib.import_module(f"{package.__name__}.adamw_triton")._adamw
    factored = importlib.import_module(f"{package.__name__}.factored_triton")
    found = {}
    for capability in map(int, capabilities):
        compiled = {form: compile_form(kernel, form, capability) for form in FORMS}
        for form in FACTORED_FORMS:
            compiled[f"factored, {form}"] = compile_factored(factored._factored, form, capability)
        compiled["sums"] = compile_sums(factored._squared_sums, capability)
        for form, ptx in compiled.items():
            found[f"sm_{capability}, {form}"] = [*accesses(ptx), ".local" in ptx]
    print(json.dumps({"triton": triton.__version__, "forms": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
