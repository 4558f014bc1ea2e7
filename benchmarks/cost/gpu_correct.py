"""Does a GPU compute what a CPU computes? Kernels, random bits, codes of frozen layers, and losses; a minute.

python -m benchmarks.cost.gpu_correct
TRITON_INTERPRET=1 LISA_DIST_KERNELS=triton python -m benchmarks.cost.gpu_correct --rehearse    # on a CPU, small sizes

Each form of AdamW's step, of the factored moment's, and the sums of squares, are compared with plain torch on the CPU:
of a piece that begins and ends at multiples of 16, of an odd one behind 2^36 elements, and once of more than 2^31, of
which the last are looked at. Random bits and bitsandbytes' codes are to be the same. Ten losses of a small model, of
which a period is three steps, may differ by 1e-4 in fp32 and by 2e-2 in bf16.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from bitsandbytes import functional as codes
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

import lisa_dist
from benchmarks.common import runs
from benchmarks.common.methods import LISA
from benchmarks.common.ranks import ON_CPU
from benchmarks.common.results import parser_of, write_results
from benchmarks.cost.gpu import of_recipe
from benchmarks.quality.training import train
from benchmarks.tables.render import print_table
from lisa_dist.core.frozen_forms import BLOCKSIZES
from lisa_dist.kernels.adamw import StepNumbers, StepTensors, adamw_reference
from lisa_dist.kernels.dynamic_code import quantize
from lisa_dist.kernels.factored import FactoredNumbers, FactoredTensors, factored_torch, num_rows, squared_sums_torch
from lisa_dist.kernels.philox import random_bits
from lisa_dist.optim import ops

FP32, BF16 = torch.float32, torch.bfloat16
# Weights, and whether they have a master.
WEIGHTS = {"fp32": (FP32, False), "bf16, fp32 master": (BF16, True), "bf16, stochastic": (BF16, False)}
WEIGHTS |= {"fp16, fp32 master": (torch.float16, True), "master alone": (None, True)}
KINDS = ("AdamW", "AdamW, 8 bits", "factored")
DRAW = {"seed": 2**40 + 3, "parameter": 77, "draw": 5}
RUNS = {f"{ds_config}, {name}": (ds_config, dtype, LISA)
        for ds_config in ("zero2", "zero3") for name, dtype in (("fp32", FP32), ("bf16", BF16))}  # fmt: skip
RUNS["zero2, bf16, llama3_8b_16gb"] = ("zero2", BF16, of_recipe("llama3_8b_16gb"))
TOLERANCES = {FP32: 1e-4, BF16: 2e-2}  # of losses
STEPS = 10


def compare(found: torch.Tensor, wanted: torch.Tensor) -> dict:
    """Whether the last elements of a tensor are the same but for rounding: by how much they differ, and how many."""
    is_code, is_rounded = wanted.dtype == torch.uint8, wanted.dtype != FP32
    found, wanted = found[-len(wanted) :].cpu().float(), wanted.float()
    differences = (found - wanted).abs() / (1.0 if is_code else wanted.abs() + 0.01)
    largest, differing = differences.max().item(), (differences > 0).float().mean().item()
    most = 1.0 if is_code else 2**-7 if is_rounded else 1e-5
    passed = largest <= most and (differing <= 0.002 or not is_rounded)
    return {"passed": passed, "largest": largest, "differing": differing}


def worst(found: list[dict]) -> dict:
    """Several comparisons as one."""
    highest = {name: max(one[name] for one in found) for name in ("largest", "differing")}
    return {"passed": all(one["passed"] for one in found)} | highest


def tensors_of(kind: str, dtype: torch.dtype | None, has_master: bool, element: int, numel: int, columns: int):
    """The tensors of a step over a piece, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight, master, gradient, first, second = torch.randn(5, numel, generator=generator)
    weight, master = None if dtype is None else weight.to(dtype), master if has_master else None
    gradient, scale = (gradient * 0.1).to(dtype or FP32), torch.tensor([0.25])
    if kind == "factored":
        row_roots = torch.rand(num_rows(element, numel, columns), generator=generator) + 0.1
        column_roots = torch.rand(columns, generator=generator) + 0.1
        return FactoredTensors(weight, master, gradient, row_roots, column_roots, scale)
    moments = [(first * 1e-2, None), (second**2 * 1e-4, None)]
    if kind == "AdamW, 8 bits":
        moments = [quantize(moments[0][0], True, element), quantize(moments[1][0], False, element)]
    (exp_avg, scales), (exp_avg_sq, scales_sq) = moments
    return StepTensors(weight, master, gradient, exp_avg, exp_avg_sq, scales, scales_sq, scale)


def placed(tensors, offset: int, repeats: int, device: torch.device):
    """A copy on a device, of each tensor behind so many elements of its storage, or of so many times its elements."""
    moved = {}
    for name, value in vars(tensors).items():
        moved[name] = value if value is None else torch.cat([value.new_zeros(offset), value]).to(device)[offset:]
        if repeats > 1 and value is not None and name not in ("column_roots", "gradient_scale"):
            moved[name] = moved[name].repeat(repeats)
    return type(tensors)(**moved)


def check_step(
    kind: str, weights: tuple, numel: int, device: torch.device, element: int = 0, offset: int = 0, repeats: int = 1
) -> dict:
    """A step over a piece, or over so many like it, of which the last is compared."""
    columns = 320 if repeats == 1 else numel // 1024
    tensors, last = tensors_of(kind, *weights, element, numel, columns), element + (repeats - 1) * numel
    stepped, found = placed(tensors, offset, repeats, device), []
    if kind == "factored":
        numbers = FactoredNumbers(1e-2, 1e-8, 0.1, element, **DRAW)
        rows, of_columns = ops.squared_sums(stepped.gradient, stepped.gradient_scale, element, columns)
        wanted = squared_sums_torch(tensors.gradient, tensors.gradient_scale, element, columns)
        found += [compare(rows, wanted[0]), compare(of_columns / repeats, wanted[1])]
        ops.factored_step(stepped, numbers)
        factored_torch(tensors, replace(numbers, element=last))
    else:
        numbers = StepNumbers(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, element, **DRAW)
        ops.adamw_step(stepped, numbers)
        tensors = adamw_reference(tensors, replace(numbers, element=last))
    written = [name for name, value in vars(tensors).items() if value is not None and not name.startswith("gradient")]
    return worst(found + [compare(getattr(stepped, name), getattr(tensors, name)) for name in written])


def check_bits(element: int, numel: int, device: torch.device) -> dict:
    """Random bits by what they round up: all that lie as far from the next bf16, and none that lie further."""
    bits, rows, wrong = random_bits(element, numel, **DRAW), num_rows(element, numel, 1024), 0
    for further, rounded in ((0, 1 + 2**-7), (1, 1.0)):
        gradient = (bits + further - 65536).float().to(device)
        weight, *roots = (torch.ones(size, device=device) for size in (numel, rows, 1024))
        tensors = FactoredTensors(weight.to(BF16), None, gradient, *roots)
        ops.factored_step(tensors, FactoredNumbers(2**-23, 0.0, 0.0, element, **DRAW))
        wrong += (tensors.weight.float() != rounded).sum().item()
    return {"passed": wrong == 0, "largest": float(wrong > 0), "differing": wrong / (2 * numel)}


def check_codes(bits: int, device: torch.device) -> dict:
    """bitsandbytes' codes of a matrix, which are to be the same, and what is made of them."""
    how = {"compress_statistics": True, "quant_type": "nf4"} if bits == 4 else {}
    form, made = ("4bit" if bits == 4 else "blockwise"), []
    value = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(BF16)
    for place in (device, torch.device("cpu")):
        coded, state = getattr(codes, f"quantize_{form}")(value.to(place), blocksize=BLOCKSIZES[bits], **how)
        made.append((coded.flatten(), getattr(codes, f"dequantize_{form}")(coded, state).flatten()))
    of_codes, of_values = (compare(*pair) for pair in zip(*made, strict=True))
    of_codes["passed"] = of_codes["differing"] == 0
    return worst([of_codes, of_values])


def losses_of(name: str, shrink: int) -> list[float]:
    """Losses of steps on the same rows, on the device that there is."""
    ds_config, dtype, method = RUNS[name]
    torch.manual_seed(0)
    config = runs.shrunk_config("llama3.1-8b", shrink, 4)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = lisa_dist.LisaConfig(lisa_interval_steps=3, **method.settings)
    engine, lisa = lisa_dist.initialize(model, ds_config, settings, lr=2e-4, weight_decay=0.1, optim=method.optim)
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    losses = train(engine, lisa, [{"input_ids": tokens, "labels": tokens}] * STEPS)
    lisa.close()
    engine.destroy()
    return losses


def check_losses(name: str, shrink: int, on_cpu: Callable[[], dict]) -> dict:
    """Losses here against those of a CPU."""
    found, wanted = losses_of(name, shrink), on_cpu()[name]
    largest = max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))
    passed = largest <= TOLERANCES[RUNS[name][1]] and wanted[-1] < wanted[0] - 0.1  # else nothing would be shown
    return {"passed": passed, "largest": largest, "losses": found, "losses_on_cpu": wanted}


def checks(device: torch.device, rehearses: bool, on_cpu: Callable[[], dict]) -> Iterator[tuple]:
    """Each check's name, a function and its arguments."""
    numel, piece = (4096, 4096) if rehearses else (1 << 20, 1 << 22)
    repeats = 3 if rehearses else 2**31 // piece + 1
    for kind in KINDS:
        for weights, form in WEIGHTS.items():
            yield f"{kind}, {weights}, aligned", check_step, kind, form, numel, device
            yield f"{kind}, {weights}, odd", check_step, kind, form, numel + 77, device, (1 << 36) + 7, 3
        if kind != "AdamW":
            form = WEIGHTS["bf16, stochastic"]
            yield f"{kind}, {repeats * piece:,} elements", check_step, kind, form, piece, device, 0, 0, repeats
    yield "random bits", check_bits, (1 << 36) + 7, numel, device
    for bits in BLOCKSIZES:
        yield f"codes of {bits} bits", check_codes, bits, device
    for name in RUNS:
        yield f"losses, {name}", check_losses, name, 64 if rehearses else 16, on_cpu


def main() -> None:
    """Check; print a line of each, write the results, and end with status 1 where one has failed."""
    parser = parser_of(__doc__, "gpu_correct")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on whatever there is")
    parser.add_argument("--losses", type=int, help="print those of a model so much smaller, and nothing else")
    arguments = parser.parse_args()
    if arguments.losses:
        print(json.dumps({name: losses_of(name, arguments.losses) for name in RUNS}))
        return
    device = torch.device(get_accelerator().current_device_name())
    if device.type == "cpu" and not arguments.rehearse:
        parser.error("there is no GPU; --rehearse runs the same on a CPU")
    command = [sys.executable, "-m", "benchmarks.cost.gpu_correct", "--losses", "64" if arguments.rehearse else "16"]
    other = subprocess.Popen(command, env=os.environ | ON_CPU, stdout=subprocess.PIPE, text=True)  # beside the kernels
    on_cpu = functools.cache(lambda: json.loads(other.communicate()[0].splitlines()[-1]))
    kernels, why = ops.choose_kernels(device.type)
    figures = {"kernels": f"{kernels} ({why})", "checks": {}}
    for name, check, *given in checks(device, arguments.rehearse, on_cpu):
        begun = time.perf_counter()
        try:
            found = check(*given)
        except Exception as error:  # noqa: BLE001 - it is what was found, and the other checks tell more
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
        figures["checks"][name] = found | {"seconds": time.perf_counter() - begun}
        write_results(arguments.results, figures, quiet=True)
    print(f"by {figures['kernels']}")
    rows, failed = [], kernels != "triton" and not arguments.rehearse
    for name, one in figures["checks"].items():
        failed |= not one["passed"]
        verdict = "passed" if one["passed"] else one.get("error", "FAILED")
        rows.append([name, f"{one.get('largest', 0):.1e}", f"{one.get('differing', 0):.1e}", verdict])
    print_table(["", "largest difference", "elements that differ", ""], *rows)
    print("FAILED" if failed else f"all {len(rows)} checks passed")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
