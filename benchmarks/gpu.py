"""Full training, LoRA and LISA on one GPU: peak memory, tokens a second, and the share of the GPU's arithmetic.

python benchmarks/gpu.py
python benchmarks/gpu.py --rehearse     # the same on a CPU, with models small enough for it

Shapes of LLaMA-2-7B and Llama-3.1-8B with random weights, bf16, one row of 2048 tokens, nothing checkpointed; each arm
in a process of its own, so that the peak is its own. Full training of these does not fit one GPU of 80 GB: what it says
is kept, and it is compared on the 7B shape with 12 of its layers, one of them active. No network is needed.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from arms import EMBED_FROZEN, FULL, LISA, LORA_16, LORA_128, PHASES, Arm, Run, flops_of_step, shrunk_config
from bench import print_table, write_results
from rank_group import RankError, RankGroup

DRAWN, EIGHT = {"lisa_always_on": "rest"}, {"lisa_state_bits": "embed=8,head=8,layers=8"}
SMALLEST = EIGHT | {"lisa_master": "bf16_sr"}
POLICIES = (
    LISA,
    Arm("lisa, lisa_adamw", "lisa", optim="lisa_adamw"),
    Arm("lisa, 6 bytes", "lisa", SMALLEST, optim="lisa_adamw"),
    Arm("lisa, drawn", "lisa", DRAWN),
    Arm("lisa, always on, on host", "lisa", {"lisa_offload": "embed,head,rest"}),
    Arm("lisa, embed and head frozen", "lisa", EMBED_FROZEN),
)
ONE = {"lisa_activated_layers": 1}
# Of each shape: its name, layers (None: all), and the arms; the most telling first, in case time is short.
SHAPES = (
    ("llama2-7b", 12, (FULL, LORA_16, Arm("lisa, gamma 1", "lisa", ONE), Arm("callback, gamma 1", "callback", ONE))),
    ("llama2-7b", None, (LISA, LORA_16, FULL, POLICIES[2], LORA_128, *POLICIES[3:], POLICIES[1])),
    ("llama3.1-8b", None, (LISA, LORA_16, FULL, POLICIES[2], LORA_128, *POLICIES[3:], POLICIES[1])),
)
# Dense bf16, in floating-point operations a second, by a part of the card's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
WARMUP, INTERVAL = 2, 8


def attention() -> str:
    """flash-attn where it is installed and there is a GPU for it, else torch's own, which has its kernel too."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def measure(arm: Arm, config, arguments: argparse.Namespace) -> dict:
    """Steps of one arm: medians, peak, parts; the last of them begins with a switch."""
    kind = {"rows": arguments.rows, "dtype": torch.bfloat16, "interval": INTERVAL, "attention": attention()}
    with RankGroup(1, Run, arm, config, "zero2", **kind) as ranks:
        ranks.call("steps", WARMUP, arguments.length)
        steps = [ranks.call("step", arguments.length)[0] for _ in range(INTERVAL - WARMUP - 1)]
        peak = ranks.call("peak_bytes", arguments.length)[0]
        live = ranks.call("live_bytes")[0]
        planned = ranks.call("planned_bytes", arguments.length)[0]
        switch = ranks.call("step", arguments.length)[0]["begin"] if arm.method == "lisa" else None
    return {"steps": steps, "peak": peak, "live": live, "planned": planned, "switch": switch}


def run_all(arguments: argparse.Namespace) -> dict:
    """Every arm of every shape until time is up; what could not run says why."""
    figures, started = {}, time.monotonic()
    for model, num_layers, compared in SHAPES:
        layers = num_layers if not arguments.rehearse else 4
        config = shrunk_config(model, 64 if arguments.rehearse else 1, layers)
        of_shape = figures[f"{model}, {num_layers or 'all'} layers"] = {}
        for arm in compared:
            tokens = arguments.rows * arguments.length
            found = {"flops": flops_of_step(config, arm, tokens, arguments.length), "tokens": tokens}
            if time.monotonic() - started > 60 * arguments.minutes:
                found["not_run"] = "time was up"
            else:
                try:
                    found |= measure(arm, config, arguments)
                except RankError as error:  # of full training it is expected
                    found["not_run"] = {"OutOfMemoryError": "out of memory"}.get(error.kind, str(error)[-600:])
            of_shape[arm.name] = found
            print(f"{model}, {layers or 'all'} layers, {arm.name}: "
                  f"{found.get('not_run') or 'measured'}", flush=True)  # fmt: skip
            write_results(arguments.results, figures, quiet=True)
    return figures


def rows_of(of_arms: dict, baseline: str, peak_flops: float | None) -> list[list[str]]:
    """A row of each arm; ratios are to `baseline` where it ran."""
    rows, base = [], of_arms[baseline]
    for name, found in of_arms.items():
        if "not_run" in found:
            rows.append([name, found["not_run"].splitlines()[-1], *[""] * (len(HEADER) - 1)])
            continue
        seconds = median(one["step"] for one in found["steps"])
        to_base = None if "not_run" in base else median(one["step"] for one in base["steps"]) / seconds
        rows.append(
            [
                name,
                f"{found['peak'] / 2**30:.2f}",
                f"{found['planned'] / found['peak'] - 1:+.1%}",
                f"{found['tokens'] / seconds:.0f}",
                "-" if to_base is None else f"{to_base:.2f}",
                *(f"{median(one[phase] for one in found['steps']):.3f}" for phase in PHASES[1:]),
                "-" if found["switch"] is None else f"{found['switch']:.3f}",
                "-" if peak_flops is None else f"{found['flops'] / seconds / peak_flops:.1%}",
            ]
        )
    return rows


HEADER = ("peak GiB", "planned", "tokens/s", "of first", *PHASES[1:], "switch s", "MFU")


def main() -> None:
    """Measure, print a table of each shape, draw peaks and speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--minutes", type=float, default=8, help="after which no further arm is begun")
    parser.add_argument("--peak_tflops", type=float, help="dense bf16 of the card, where it is not known here")
    parser.add_argument("--rehearse", action="store_true", help="with models of 4 layers and a 64th of the width")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; --rehearse runs the same on a CPU, with small models")
    figures = run_all(arguments)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    known = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    peak_flops = 1e12 * arguments.peak_tflops if arguments.peak_tflops else known
    print(f"on {card}, {attention()}, bf16, {arguments.rows} x {arguments.length} tokens")
    print("MFU counts the operations that a method cannot do without.")
    for shape, of_arms in figures.items():
        print_table([shape, *HEADER], rows_of(of_arms, next(iter(of_arms)), peak_flops))
    write_results(arguments.results, figures)
    plot(figures, arguments.results.with_suffix(".png"))


def plot(figures: dict, path: Path) -> None:
    """Peak against speed, a point an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(figures), 4), layout="constrained")
    for axes, (shape, of_arms) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items(), strict=True):
        for name, found in of_arms.items():
            if "not_run" not in found:
                speed = found["tokens"] / median(one["step"] for one in found["steps"])
                axes.plot(found["peak"] / 2**30, speed, "o", label=name)
        axes.set(title=shape, xlabel="peak, GiB", ylabel="tokens a second")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
