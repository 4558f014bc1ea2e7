"""Full training, LoRA and LISA on one GPU: peak memory, tokens a second, and the share of the GPU's arithmetic.

python -m benchmarks.cost.gpu
python -m benchmarks.cost.gpu --rehearse     # the same on a CPU, with models small enough for it

First what gpu_correct.py checks. Then shapes of Llama-3.1-8B and LLaMA-2-7B with random weights, bf16, one row of 2048
tokens, of a recipe as many as it has; each method in a process of its own, in the order of ORDER. The results are
written anew whenever one ends. None is begun that may not end in time, and one that hangs is ended. Full training does
not fit 80 GB: it is compared on the 7B shape with 12 layers. Static has the layers that LISA has. LISA's peak is the
larger of two periods, and a switch is what a period's first step begins with. A recipe has the flags of its file, and
the layers that its header plans.
"""

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import yaml

from benchmarks.common import runs
from benchmarks.common.methods import EIGHT, EMBED_FROZEN, FULL, LISA, LORA_16, LORA_128, STATIC, Method, checkpointed
from benchmarks.common.ranks import Caller, RankError, RankGroup
from benchmarks.common.results import RESULTS, parser_of, positive, versions, write_results
from benchmarks.cost import kernels
from benchmarks.tables.recipes import COMMAND, RECIPES
from benchmarks.tables.render import print_table
from lisa_dist.commands import plan
from lisa_dist.distributed.allocator import use_expandable_segments
from lisa_dist.flags import FlagParser
from lisa_dist.memory.planner import make_plans
from lisa_dist.optim.ops import why_no_compiler


def of_recipe(name: str) -> Method:
    """The method of a shipped recipe, by the flags of its file."""
    flags = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    # On one rank stages 1 and 2 are alike but for accumulation, which no method has.
    assert flags["deepspeed"] in ("zero1", "zero2")
    assert flags["per_device_train_batch_size"] == 1
    settings = {flag: value for flag, value in flags.items() if flag.startswith("lisa_")}
    del settings["lisa_interval_steps"]
    method = Method(name, "lisa", settings, checkpointed=flags["checkpointed_layers"], length=flags["max_length"])
    return replace(method, optim=flags.get("optim", method.optim))


SIX_BYTES = Method("lisa, 6 bytes", "lisa", EIGHT | {"lisa_master": "bf16_sr"}, optim="lisa_adamw")
ON_HOST = Method("lisa, always on, on host", "lisa", {"lisa_offload": "embed,head,rest"})
BNB_8 = Method("lisa, bitsandbytes AdamW8bit", "lisa", optim="adamw_bnb_8bit")
OURS_8 = Method("lisa, lisa_adamw, 8 bits", "lisa", EIGHT, optim="lisa_adamw")
ENDS_FROZEN = Method("lisa, embed and head frozen", "lisa", EMBED_FROZEN)
KEPT = Method("lisa, states kept", "lisa", {"lisa_state": "keep"})
LISA_ADAMW = Method("lisa, lisa_adamw", "lisa", optim="lisa_adamw")
FLASH = replace(LISA, name="lisa, flash-attn", attention="flash_attention_2")
LIGER = replace(LISA, name="lisa, Liger", liger=True)
COMPILED = replace(LISA, name="lisa, compiled", compiled=True)
ONE = {"lisa_activated_layers": 1}
GAMMA_1, STATIC_1, CALLBACK_1 = (Method(f"{name}, gamma 1", name, ONE) for name in ("lisa", "static", "callback"))


# Model, and how many of its layers (None: all).
LLAMA_8B, OF_12_LAYERS = ("llama3.1-8b", None), ("llama2-7b", 12)
# The first six answer whether LISA and what is shipped fit, as planned, and what LISA costs. None: kernels alone.
ORDER = (
    (LLAMA_8B, LISA),
    *((LLAMA_8B, of_recipe(name)) for name in ("llama3_8b_16gb", "llama3_8b_24gb")),
    *((LLAMA_8B, method) for method in (STATIC, FULL, LORA_16)),
    None,
    *((LLAMA_8B, method) for method in (SIX_BYTES, BNB_8, OURS_8, FLASH, LIGER, COMPILED, checkpointed(LISA), KEPT)),
    *((OF_12_LAYERS, method) for method in (FULL, GAMMA_1, LORA_16, STATIC_1, CALLBACK_1)),
    *((LLAMA_8B, method) for method in (ENDS_FROZEN, LISA_ADAMW, LORA_128)),
    *((OF_12_LAYERS, checkpointed(method)) for method in (FULL, GAMMA_1)),
    (LLAMA_8B, ON_HOST),  # the last: it may have to build an operator first
)
KERNELS = ("lisa_adamw, bf16, stochastic", "lisa_adamw, bf16, stochastic, 8 bits", "lisa_adamw, bf16, fp32 master")
KERNELS += ("lisa_adamw, fp32", "torch AdamW, fused", "bitsandbytes AdamW8bit", "bitsandbytes AdamW8bit in bf16")
# Dense bf16, in floating-point operations a second, by a part of the card's name, of which the first counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12}
PEAK_FLOPS |= {"GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "5090": 209e12}
REHEARSED = (64, 8)  # by how much widths are divided, and the layers
WARMUP, INTERVAL, SWITCHES = 2, 8, 3
METHOD_SECONDS = 150  # after which a method has hung


def why_not_here(method: Method) -> str:
    """What a method needs and is not here, or nothing."""
    from transformers.utils import is_flash_attn_2_available

    if method.attention != "sdpa" and not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if method.liger and not torch.cuda.is_available():
        return "Liger's kernels need a GPU"
    if method.compiled and torch.cuda.is_available():
        return why_no_compiler()
    return "liger-kernel is not installed" if method.liger and find_spec("liger_kernel") is None else ""


def settled(method: Method, config) -> Method:
    """The same method; of a recipe with numbers of active and checkpointed layers, by the command of its header."""
    if method.checkpointed != "auto":
        return method
    given = method.settings.get("lisa_activated_layers")
    if isinstance(given, int):  # of a rehearsal's model there may be fewer
        method = replace(
            method, settings=method.settings | {"lisa_activated_layers": min(given, config.num_hidden_layers)}
        )
    lines = (RECIPES / f"{method.name}.yaml").read_text(encoding="utf-8").splitlines()
    command = next(line.removeprefix(COMMAND) for line in lines if line.startswith(COMMAND))
    arguments, _ = FlagParser(plan.ARGUMENTS, plan.USAGE, plan.HELP).parse(shlex.split(command))
    (found,) = make_plans(config, arguments, method.config)
    layers = {"lisa_activated_layers": found.lisa_config.lisa_activated_layers}
    return replace(method, settings=method.settings | layers, checkpointed=found.workload.checkpointed_layers)


def measure(method: Method, config, layers: tuple[int, ...], arguments: argparse.Namespace) -> dict:
    """Steps of one period and the peak of one more; of LISA switches and the next period's peak. `layers`: static's."""
    kind = {"rows": arguments.rows, "dtype": torch.bfloat16, "interval": INTERVAL}
    length = arguments.length if arguments.rehearse else method.length or arguments.length
    tokens, method = arguments.rows * length, settled(method, config)
    with RankGroup(1, runs.Run, method, config, "zero2", layers=layers, **kind) as ranks:
        ranks.call("steps", WARMUP, length)
        steps = [ranks.call("step", length)[0] for _ in range(INTERVAL - WARMUP - 1)]
        active = ranks.call("get", "active_layers")[0]
        found = {
            "steps": steps,
            "tokens": tokens,
            "flops": runs.flops_of_step(config, method, tokens, length, active),
            "active_layers": active,
            "checkpointed": method.checkpointed,
            "live": ranks.call("live_bytes")[0],
        }
        peaks, firsts = [runs.peak_of(ranks, length)], []
        for number in range(SWITCHES if method.kind == "lisa" else 0):
            firsts.append(ranks.call("step", length)[0])  # of a new period
            if number == 0:
                peaks.append(runs.peak_of(ranks, length))
            ranks.call("steps", INTERVAL - 1 - (number == 0), length)
        found["switches"], found["reserved"] = [step["begin"] for step in firsts], ranks.call("reserved_bytes")[0]
        return max(peaks, key=lambda one: one["peak"]) | found


def measure_kernels(numel: int) -> dict:
    """On a rank: what kernels.py says of the forms of KERNELS, and of the floor."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    floor = kernels.bandwidth(device)
    return {"bytes_a_second": floor, "kernels": kernels.of_one_size(numel, device, floor, KERNELS)}


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where what is inside takes longer."""

    def stop(*_) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """The seconds of a run. What is begun is taken to need as long as the longest that has ended yet."""

    def __init__(self, seconds: float):
        self._started, self._seconds, self._longest = time.monotonic(), seconds, 0.0

    def run(self, what: Callable[[], dict], is_typical: bool = True) -> dict:
        """What a function finds, with its seconds; or why it could not run, or not to its end."""
        begun = time.monotonic()
        left = self._seconds - (begun - self._started)
        if left <= self._longest:
            return {"not_run": f"time was up: {max(left, 0):.0f} s are left, and a method takes {self._longest:.0f} s"}
        limit = min(left, METHOD_SECONDS)
        try:
            with limited(limit):
                found = what()
        except RankError as error:  # of full training it is expected
            found = {"not_run": {"OutOfMemoryError": "out of memory"}.get(error.kind, str(error)[-600:])}
        except TimeoutError:
            found = {"not_run": f"ended after {limit:.0f} s"}
        else:
            self._longest = max(self._longest, (time.monotonic() - begun) * is_typical)
        return found | {"seconds": time.monotonic() - begun}


def start() -> dict:
    """Have the server of ranks started, and read from the disk what methods import."""
    with RankGroup(1, Method, "none", "none"):
        return {}


def title_of(shape: tuple[str, int | None]) -> str:
    """A shape by its name, as results have it."""
    return f"{shape[0]}, {shape[1] or 'all'} layers"


def run_all(arguments: argparse.Namespace, peak_flops: float | None) -> dict:
    """Every method until time is up; what could not run says why."""
    budget, figures = Budget(60 * arguments.minutes), {"arms": {}, "kernels": {"not_run": "not reached"}}
    figures["correct"] = budget.run(lambda: correctness(arguments.rehearse), is_typical=False)
    for shape, method in filter(None, ORDER):
        figures["arms"].setdefault(title_of(shape), {})[method.name] = {"not_run": "not reached"}
    started = budget.run(start, is_typical=False)
    said = started.get("not_run") or f"{started['seconds']:.0f} s"
    print(f"started: {said}", flush=True)
    for shape, method in (one or (None, None) for one in ORDER):
        if shape is None:
            figures["kernels"] = budget.run(lambda: kernels_on_a_rank(10**5 if arguments.rehearse else 10**8))
            for one in figures["kernels"].get("kernels", [figures["kernels"]]):
                took = one.get("not_run") or f"{1e3 * one['seconds']:.3f} ms, {one['share_of_floor']:.0%} of the floor"
                print(f"kernels, {one.get('name', 'all')}: {took}", flush=True)
        else:
            of_shape = figures["arms"][title_of(shape)]
            found = of_shape[method.name] = run_one(shape, method, of_shape, budget, arguments)
            cells = cells_of(found, next(iter(of_shape.values())), peak_flops)
            named = (f"{name} {cell}" for name, cell in zip(HEADER, cells, strict=True))
            print(f"{title_of(shape)}, {method.name}: {', '.join(named) if all(cells) else cells[0]}", flush=True)
        if arguments.results:
            write_results(arguments.results, figures, quiet=True)
    return figures


def run_one(shape: tuple, method: Method, of_shape: dict, budget: Budget, arguments: argparse.Namespace) -> dict:
    """One method of a shape; `of_shape` has the others."""
    lisa = next((found for name, found in of_shape.items() if name.startswith("lisa")), {"not_run": "no such method"})
    if missing := why_not_here(method):
        return {"not_run": missing}
    if method.kind == "static" and "not_run" in lisa:
        return {"not_run": "LISA, whose layers it has, did not run"}
    config = runs.shrunk_config(shape[0], *(REHEARSED if arguments.rehearse else (1, shape[1])))
    return budget.run(lambda: measure(method, config, lisa.get("active_layers", ()), arguments), not method.compiled)


def correctness(rehearses: bool) -> dict:
    """What gpu_correct.py finds and prints, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "gpu_correct.json"
        words = ["-m", "benchmarks.cost.gpu_correct", "--results", str(results), *["--rehearse"] * rehearses]
        ended = subprocess.run([sys.executable, *words], check=False)
        found = json.loads(results.read_text(encoding="utf-8"))["figures"] if results.exists() else {}
    return found if ended.returncode == 0 else found | {"not_run": f"ended with status {ended.returncode}"}


def kernels_on_a_rank(numel: int) -> dict:
    """The step of AdamW by itself, in a process of its own."""
    with RankGroup(1, Caller) as ranks:
        return ranks.call("run", measure_kernels, numel)[0]


def cells_of(found: dict, first: dict, peak_flops: float | None) -> list[str]:
    """A row of the table; `first` is the method that speeds are compared with, if it ran."""
    if "not_run" in found:
        return [found["not_run"].splitlines()[-1], *[""] * (len(HEADER) - 1)]
    each = [step["step"] for step in found["steps"]]
    seconds = median(each)
    of_first = None  # in tokens a second
    if "not_run" not in first:
        of_first = median(step["step"] for step in first["steps"]) / first["tokens"] * found["tokens"] / seconds
    return [
        f"{found['peak'] / 2**30:.2f}",
        "-" if found["planned"] is None else f"{found['planned'] / found['peak'] - 1:+.1%}",
        "-" if found["reserved"] is None else f"{found['reserved'] / 2**30:.2f}",
        f"{found['tokens'] / seconds:.0f}",
        f"{min(each):.3f}-{max(each):.3f}",
        "-" if of_first is None else f"{of_first:.2f}",
        *(f"{median(step[phase] for step in found['steps']):.3f}" for phase in runs.PHASES[1:]),
        f"{median(found['switches']):.3f}" if found["switches"] else "-",
        "-" if peak_flops is None else f"{found['flops'] / seconds / peak_flops:.1%}",
        f"{found['seconds']:.0f}",
    ]


HEADER = ("peak GiB", "planned", "reserved GiB", "tokens/s", "step s", "of first", *runs.PHASES[1:], "switch s", "MFU")
HEADER += ("took s",)


def peak_flops_of(card: str) -> float | None:
    """Dense bf16 FLOP/s of a card by its name; None for one that is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def main() -> None:
    """Measure; print a line of each method as it ends, and a table of each shape."""
    parser = parser_of(__doc__, "gpu")
    parser.set_defaults(results=None)
    parser.add_argument("--rows", type=positive, default=1)
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a row")
    parser.add_argument("--minutes", type=float, default=8.5, help="in which what is begun is to end")
    parser.add_argument("--peak_tflops", type=float, help="dense bf16 of the card, where it is not known here")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, a 64th of the width; writes no --results")
    arguments = parser.parse_args()
    if arguments.results is None and not arguments.rehearse:
        arguments.results = RESULTS / "gpu.json"
    if arguments.peak_tflops is not None and arguments.peak_tflops <= 0:
        parser.error(f"--peak_tflops {arguments.peak_tflops:g}: must be more than 0")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; --rehearse runs the same on a CPU, with small models")
    use_expandable_segments()  # as `lisa-dist train` does; ranks inherit it
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    peak_flops = 1e12 * arguments.peak_tflops if arguments.peak_tflops else peak_flops_of(card)
    about = f"{card}, bf16, {arguments.rows} x {arguments.length} tokens; "
    about += ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"on {about}")
    print("MFU counts the operations that a method cannot do without.")
    figures = run_all(arguments, peak_flops)
    print(f"\non {about}")
    for shape, of_methods in figures["arms"].items():
        first = next(iter(of_methods.values()))
        print_table([shape, *HEADER], *([name, *cells_of(one, first, peak_flops)] for name, one in of_methods.items()))


if __name__ == "__main__":
    main()
