"""What do LISA's policies take of memory, against LoRA and full training? By plan: one GPU, bf16, one row.

python -m benchmarks.cost.policies
"""

import torch
from transformers import PretrainedConfig

from benchmarks.common.methods import EIGHT
from benchmarks.common.results import parser_of, write_results
from benchmarks.common.runs import model_of
from benchmarks.tables.pictures import draw_memory
from benchmarks.tables.rows import show
from lisa_dist import LisaConfig
from lisa_dist.core.blocks import find_blocks
from lisa_dist.memory.plan import Plan, PlanArguments, load_model_config
from lisa_dist.memory.planner import make_plans

LORA, OURS = {"method": "lora", "lora_r": 16}, {"optim": "lisa_adamw"}
NO_MASTERS, DRAWN = {"lisa_master": "bf16_sr"}, {"lisa_always_on": "rest"}
FACTORED = NO_MASTERS | {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
ON_HOST = {"lisa_offload": "embed,head,rest,layers"}
FLAGS = ("--optim lisa_adamw --lisa_master bf16_sr", "--lisa_state_bits embed=factored,head=factored,layers=8")
FLAGS += ("--lisa_offload embed,head,rest,layers",)
QLORA = "QLoRA, rank 16 (by its layers' codes)"
# Name; arguments of the plan; settings of LISA.
POLICIES = (
    ("full training", {"method": "full"}, {}),
    ("LoRA, rank 16", LORA, {}),
    (QLORA, LORA, {}),
    ("LISA as published: embed and head always trained", {}, {}),
    ("their moments in 8 bits", {}, {"lisa_state_bits": "embed=8,head=8,rest=8"}),
    ("embed and head sampled", {}, DRAWN),
    ("sampled, all moments in 8 bits", {}, DRAWN | EIGHT),
    (f"always trained, no masters, moments in 8 bits (`{FLAGS[0]}`)", OURS, NO_MASTERS | EIGHT),
    (f"the same, embed and head factored (`{FLAGS[1]}`)", OURS, FACTORED),
    ("the same, frozen layers in 8 bits (`--lisa_frozen_bits 8`)", OURS, FACTORED | {"lisa_frozen_bits": 8}),
    ("the same, frozen layers in 4 bits", OURS, FACTORED | {"lisa_frozen_bits": 4}),
    ("embed and head sampled, no masters, moments in 8 bits", OURS, NO_MASTERS | EIGHT | DRAWN),
    ("all states on the host (`--deepspeed zero2_offload`)", {"deepspeed": "zero2_offload"}, {}),
    (f"sampled (`--lisa_always_on rest`), all states on the host (`{FLAGS[2]}`)", {}, DRAWN | ON_HOST),
)


def peak_of_qlora(lora: Plan, config: PretrainedConfig) -> int:
    """The peak of LoRA with the layers' matrices as NF4 codes, from its plan in bf16: a pass makes one matrix whole."""
    layers = find_blocks(model_of(config, torch.bfloat16)).layers
    weights = [one for layer in layers for one in layer.parameters.values() if one.ndim > 1]
    # Of 16 bits an element has 4, a 64th of a scale in 8 bits, and of each 256 scales one in fp32.
    saved = sum(weight.nbytes - weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256)) for weight in weights)
    backward = lora.gpu.peak_backward - saved + max(weight.nbytes for weight in weights)
    return round(max(backward, lora.gpu.peak_step - saved))


def main() -> None:
    """Plan every policy for two models, two lengths, without and with checkpointing; print and draw the peaks."""
    arguments = parser_of(__doc__, "policies").parse_args()
    rows = [[name] for name, *_ in POLICIES]
    for model in ("llama2-7b", "llama3.1-8b"):
        config = load_model_config(model)
        for checkpointed, length in (("none", 1024), ("none", 4096), ("all", 1024), ("all", 4096)):
            how = {"deepspeed": "zero2", "loss": "chunked", "seq_length": length, "checkpointed_layers": checkpointed}
            for row, (name, more, settings) in zip(rows, POLICIES, strict=True):
                (plan,) = make_plans(config, PlanArguments(model, **how | more), LisaConfig(**settings))
                row.append(peak_of_qlora(plan, config) if name == QLORA else plan.gpu.peak)
    write_results(arguments.results, {"rows": rows})
    show("policies", {"rows": rows})
    draw_memory({"rows": rows})


if __name__ == "__main__":
    main()
