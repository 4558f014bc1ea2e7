"""What do LISA's policies take of memory, against LoRA and full training? By plan: one GPU, bf16, one row.

python -m benchmarks.cost.policies
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.common.results import parser_of, write_results
from benchmarks.tables.show import show
from lisa_dist import LisaConfig
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.frozen_layers import held_bytes, linear_modules
from lisa_dist.memory.plan import PlanArguments, load_model_config
from lisa_dist.memory.planner import make_plans
from lisa_dist.text import GIB

MODELS = ("llama2-7b", "llama3.1-8b")
SMALLEST = {"lisa_master": "bf16_sr", "lisa_state_bits": "embed=8,head=8,layers=8"}
FACTORED = {"lisa_master": "bf16_sr", "lisa_state_bits": "embed=factored,head=factored,layers=8"}
# Name, arguments of the plan, settings of LISA.
ARMS = (
    ("full", {"method": "full"}, {}),
    ("LoRA r16", {"method": "lora", "lora_r": 16}, {}),
    ("LoRA r128", {"method": "lora", "lora_r": 128}, {}),
    ("LISA as published", {}, {}),
    ("LISA, always-on 8 bit", {}, {"lisa_state_bits": "embed=8,head=8,rest=8"}),
    ("LISA, lisa_adamw", {"optim": "lisa_adamw"}, {}),
    ("LISA, always on, 6 bytes", {"optim": "lisa_adamw"}, SMALLEST),
    ("LISA, factored", {"optim": "lisa_adamw"}, FACTORED),
    ("LISA, factored, frozen 8 bits", {"optim": "lisa_adamw"}, FACTORED | {"lisa_frozen_bits": 8}),
    ("LISA, factored, frozen 4 bits", {"optim": "lisa_adamw"}, FACTORED | {"lisa_frozen_bits": 4}),
    ("LISA, drawn, 6 bytes", {"optim": "lisa_adamw"}, SMALLEST | {"lisa_always_on": "rest"}),
    ("LISA, states on host", {"deepspeed": "zero2_offload"}, {}),
    ("LISA, embed+head on host", {}, {"lisa_offload": "embed,head"}),
    ("LISA, all but weights on host", {}, {"lisa_offload": "embed,head,rest,layers"}),
    ("LISA, embed+head drawn", {}, {"lisa_always_on": "rest"}),
    ("LISA, drawn, 8 bit", {}, {"lisa_always_on": "rest", "lisa_state_bits": "embed=8,head=8,layers=8"}),
    ("LISA, drawn, on host", {}, {"lisa_always_on": "rest", "lisa_offload": "embed,head,rest,layers"}),
    ("LISA, embed+head frozen", {}, {"lisa_always_on": "rest", "lisa_frozen": "embed,head"}),
)


def main() -> None:
    """Plan every arm for every model, length and checkpointing; print the peaks."""
    parser = parser_of(__doc__, "policies")
    parser.add_argument("--plot", type=Path, help="draw bars to this .png")
    arguments = parser.parse_args()
    figures = {}
    for model in MODELS:
        config = load_model_config(model)
        for seq_length, checkpointed in (
            (1024, config.num_hidden_layers),
            (1024, 0),
            (4096, config.num_hidden_layers),
            (4096, 0),
        ):
            of_all = {"deepspeed": "zero2", "seq_length": seq_length, "checkpointed_layers": str(checkpointed)}
            of_all["loss"] = "chunked"
            for name, plan_flags, settings in ARMS:
                plan = make_plans(config, PlanArguments(model, **of_all | plan_flags), LisaConfig(**settings))[0]
                cell = f"{model}, {seq_length} tokens, {checkpointed} checkpointed"
                figures[f"{cell}, {name}"] = plan.to_dict()
            figures[f"{cell}, QLoRA r16"] = {"gpu": qlora(figures[f"{cell}, LoRA r16"]["gpu"], config)}
    write_results(arguments.results, figures)
    show("policies", figures)
    if arguments.plot:
        plot(figures, arguments.plot)


def qlora(lora: dict, config: PretrainedConfig) -> dict[str, int]:
    """Peaks of LoRA with the layers' matrices as NF4 codes, from its plan in bf16: a pass makes one matrix whole."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = find_blocks(model).layers
    weights = [module.weight for layer in layers for module in linear_modules(model, layer).values()]
    saved = sum(weight.nbytes for weight in weights) - held_bytes((weight.numel() for weight in weights), bits=4)
    backward = lora["peak_backward"] - saved + max(weight.nbytes for weight in weights)
    step = lora["peak_step"] - saved
    return {"peak_backward": backward, "peak_step": step, "peak": max(backward, step)}


def plot(figures: dict, path: Path) -> None:
    """Bars of a GPU's peak in rows of 1024 tokens without checkpointing, for each model; full training is cut off."""
    from matplotlib.figure import Figure

    shown = ("full", "LoRA r16", "QLoRA r16", "LISA as published", "LISA, always on, 6 bytes", "LISA, factored")
    shown += ("LISA, factored, frozen 8 bits", "LISA, factored, frozen 4 bits", "LISA, drawn, 6 bytes")
    shown += ("LISA, states on host",)
    colors = {"full": "#9ca3af", "LoRA r16": "#d9580d", "QLoRA r16": "#d9580d"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS, strict=True):
        peaks = [figures[f"{model}, 1024 tokens, 0 checkpointed, {name}"]["gpu"]["peak"] / GIB for name in shown]
        limit = 1.25 * max(peaks[1:])
        axes.barh(shown, [min(peak, limit) for peak in peaks], color=[colors.get(name, "#2563eb") for name in shown])
        for row, peak in enumerate(peaks):
            inside = peak > limit
            place, color = (limit * 0.98, "white") if inside else (peak + limit / 100, "#374151")
            axes.text(place, row, f"{peak:.1f}", va="center", ha="right" if inside else "left", color=color)
        axes.set_xlim(0, limit)
        axes.set_title(model)
        axes.set_xlabel("GiB on one GPU, planned")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
