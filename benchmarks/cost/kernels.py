"""How near to the memory's bandwidth does AdamW step, in which form, by whose kernel?

python -m benchmarks.cost.kernels                            # all that this device can run, one command
OMP_NUM_THREADS=1 python -m benchmarks.cost.kernels --sizes 1e6 1e7

The floor is what must move (each operand read, each result written, once) at the bandwidth of a plain copy of 512 MB,
measured in the same run. A figure is the median of the steps that fit into a second, three at least.
"""

import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Container

import torch

from benchmarks.common.results import RESULTS, parser_of, write_results
from benchmarks.common.runs import peak_within
from benchmarks.tables.render import print_table
from lisa_dist.core.live_bytes import live_tensor_bytes
from lisa_dist.optim.adamw import LisaAdamW, PartitionStep
from lisa_dist.optim.ops import choose_kernels
from lisa_dist.optim.states import Piece

SIZES = (1e6, 1e7, 1e8)  # and on a GPU 1e9
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16 = torch.float32, torch.bfloat16
SCALES = 2 * 2 * 4 / 256  # bytes an element of 8-bit moments: two scales a block, read and written
# Bytes an element that must move: gradient and weights, master, moments.
MOVES = {
    "fp32": 4 + 8 + 16,
    "bf16, fp32 master": 2 + 2 + 8 + 16,
    "bf16, fp32 master, 8 bits": 2 + 2 + 8 + 4 + SCALES,
    "bf16, stochastic": 2 + 4 + 16,
    "bf16, stochastic, 8 bits": 2 + 4 + 4 + SCALES,
    "bf16, 8 bits": 2 + 4 + 4 + SCALES,
    "fp32, 8 bits": 4 + 8 + 4 + SCALES,
}


TORCHAO = ("torchao.optim", "AdamW8bit")
SEEN = ("lisa_adamw", "torch AdamW")  # whose allocations on a CPU can be seen: not those of C++ and of compiled code


def ours(numel: int, device: torch.device, form: str) -> Callable[[], None]:
    """A step of lisa_adamw over one flat partition, as ZeRO has it."""
    weight = torch.randn(numel, device=device).to(FP32 if form == "fp32" else BF16)
    partition = torch.nn.Parameter(weight.float() if "master" in form else weight)
    gradient = torch.randn(numel, device=device).to(weight.dtype)
    optimizer = LisaAdamW([partition], state_bits=8 if "8 bits" in form else 32, **SETTINGS)
    beside, scale = weight if "master" in form else None, torch.ones(1, device=device)

    def step() -> None:
        pieces = [Piece("weight", 0, numel, 0)]
        optimizer.prepare(partition, PartitionStep(pieces, [gradient], beside, scale, draw=1))
        optimizer.step()

    return step


def theirs(optimizer: tuple[str, str], how: dict, dtype: torch.dtype, numel: int, device: torch.device) -> Callable:
    """A step of an optimizer, by its module and name, over one parameter that has its gradient."""
    weight = torch.nn.Parameter(torch.randn(numel, device=device).to(dtype))
    weight.grad = torch.randn(numel, device=device).to(dtype)
    module, name = optimizer
    return getattr(importlib.import_module(module), name)([weight], **SETTINGS, **how).step


def contenders(on_gpu: bool) -> list[tuple[str, str, Callable]]:
    """Name, form, and a function of (numel, device) that builds a step."""
    adamw, adamw8bit = ("torch.optim", "AdamW"), ("bitsandbytes.optim", "AdamW8bit")
    deepspeed = ("DeepSpeed FusedAdam", "FusedAdam", "adam_w_mode")
    if not on_gpu:
        deepspeed = ("DeepSpeedCPUAdam", "DeepSpeedCPUAdam", "adamw_mode")
    others = (
        ("torch AdamW, foreach", "fp32", adamw, {"foreach": True}, FP32),
        ("torch AdamW, fused", "fp32", adamw, {"fused": True}, FP32),
        ("bitsandbytes AdamW8bit", "fp32, 8 bits", adamw8bit, {}, FP32),
        ("bitsandbytes AdamW8bit in bf16", "bf16, 8 bits", adamw8bit, {}, BF16),
        ("torchao AdamW8bit in bf16", "bf16, stochastic, 8 bits", TORCHAO, {"bf16_stochastic_round": True}, BF16),
        (deepspeed[0], "fp32", ("deepspeed.ops.adam", deepspeed[1]), {deepspeed[2]: True}, FP32),
    )
    found = [(f"lisa_adamw, {form}", form, functools.partial(ours, form=form)) for form in list(MOVES)[:5]]
    return found + [(name, form, functools.partial(theirs, *how)) for name, form, *how in others]


def seconds_of(step: Callable, device: torch.device) -> float:
    """The median of the steps that fit into a second, after one that warms up and compiles."""
    step()
    found, started = [], time.perf_counter()
    while len(found) < 3 or (time.perf_counter() - started < 1 and len(found) < 200):
        synchronize(device)
        begun = time.perf_counter()
        step()
        synchronize(device)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_beside(step: Callable, device: torch.device) -> int:
    """The most that a step allocates for a moment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    before = live_tensor_bytes()
    return peak_within(step) - before


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy, what is read and what is written both counted."""
    source = torch.zeros(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def measure(name: str, form: str, build: Callable, numel: int, device: torch.device, floor: float) -> dict:
    """Seconds, share of the floor, bytes beside; or why it could not run."""
    gc.collect()
    cuda_cache = torch.cuda.empty_cache if device.type == "cuda" else lambda: None
    cuda_cache()
    try:
        step = build(numel, device)
        seconds = seconds_of(step, device)
        beside = bytes_beside(step, device) if device.type == "cuda" or name.startswith(SEEN) else None
    # Anyone's optimizer may fail here in its own way, and what it says is the figure then.
    except (ImportError, RuntimeError, ValueError, AssertionError, OSError) as error:
        return {"not_run": " ".join(str(error).split())[:120] or type(error).__name__}
    lowest = numel * MOVES[form] / floor
    return {"seconds": seconds, "share_of_floor": lowest / seconds, "bytes_beside": beside}


def of_one_size(numel: int, device: torch.device, floor: float, names: Container[str] | None = None) -> list[dict]:
    """What each contender takes for so many elements, or each of these names, printed too."""
    figures, rows = [], []
    chosen = [one for one in contenders(device.type == "cuda") if names is None or one[0] in names]
    for name, form, build in chosen:
        found = measure(name, form, build, numel, device, floor)
        figures.append({"name": name, "form": form, "numel": numel} | found)
        shown = [f"{numel:,}", name, f"{MOVES[form]:.1f}"]
        if "not_run" in found:
            rows.append([*shown, found["not_run"], "", "", ""])
        else:
            seconds = found["seconds"]
            beside = "-" if found["bytes_beside"] is None else f"{found['bytes_beside'] / 2**20:.1f}"
            rows.append([*shown, f"{1e3 * seconds:.3f}", f"{1e9 * seconds / numel:.3f}",
                         f"{100 * found['share_of_floor']:.0f}%", beside])  # fmt: skip
    print_table(["elements", "optimizer", "bytes each", "ms", "ns each", "of the floor", "MiB beside"], *rows)
    return figures


def main() -> None:
    """Run everything on the GPU if there is one, else on the CPU; print tables and write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = parser_of(__doc__, "kernels")
    parser.set_defaults(results=RESULTS / f"kernels_{'gpu' if on_gpu else 'cpu'}.json")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES + (1e9,) * on_gpu, help="elements")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    floor = bandwidth(device)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {torch.get_num_threads()} threads; a copy moves "
          f"{floor / 1e9:.1f} GB/s; kernels of lisa_adamw: {' '.join(choose_kernels(device.type))}")  # fmt: skip
    figures = {"bytes_a_second": floor, "threads": torch.get_num_threads(), "kernels": []}
    for numel in map(int, arguments.sizes):
        figures["kernels"] += of_one_size(numel, device, floor)
        write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
