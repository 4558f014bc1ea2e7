"""What do LISA's policies take of memory, against LoRA and full training? By plan: one GPU, bf16, one row.

python -m benchmarks.cost.policies
"""

from benchmarks.common.methods import EIGHT
from benchmarks.common.results import parser_of, write_results
from benchmarks.tables.pictures import draw_memory
from benchmarks.tables.rows import show
from lisa_dist import LisaConfig
from lisa_dist.memory.plan import PlanArguments, load_model_config
from lisa_dist.memory.planner import make_plans

LORA, OURS = {"method": "lora", "lora_r": 16}, {"optim": "lisa_adamw"}
NO_MASTERS, DRAWN = {"lisa_master": "bf16_sr"}, {"lisa_always_on": "rest"}
FACTORED = NO_MASTERS | {"lisa_state_bits": "embed=factored,head=factored,layers=8"}
ON_HOST = {"lisa_offload": "embed,head,rest,layers"}
FLAGS = ("--optim lisa_adamw --lisa_master bf16_sr", "--lisa_state_bits embed=factored,head=factored,layers=8")
FLAGS += ("--lisa_offload embed,head,rest,layers",)
SAVED = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
NO_LAYERS = {"lisa_activated_layers": 0, "lisa_adapters": 16, "lisa_state_bits": "embed=factored,head=factored"}
# Name; arguments of the plan; settings of LISA.
POLICIES = (
    ("full training", {"method": "full"}, {}),
    ("LoRA, rank 16", LORA, {}),
    ("QLoRA, rank 16 (`--load_in_4bit`)", LORA | {"load_in_4bit": True}, {}),
    ("LoRA, embed and head trained (`--lora_modules_to_save embed_tokens lm_head`)", LORA | SAVED, {}),
    ("adapters, rank 16, embed and head trained with small states, no sampled layers", OURS, NO_MASTERS | NO_LAYERS),
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


def main() -> None:
    """Plan every policy for two models, two lengths, without and with checkpointing; print and draw the peaks."""
    arguments = parser_of(__doc__, "policies").parse_args()
    rows = [[name] for name, *_ in POLICIES]
    for model in ("llama2-7b", "llama3.1-8b"):
        config = load_model_config(model)
        for checkpointed, length in (("none", 1024), ("none", 4096), ("all", 1024), ("all", 4096)):
            how = {"deepspeed": "zero2", "loss": "chunked", "seq_length": length, "checkpointed_layers": checkpointed}
            for row, (_, more, settings) in zip(rows, POLICIES, strict=True):
                (plan,) = make_plans(config, PlanArguments(model, **how | more), LisaConfig.plain(**settings))
                row.append(plan.gpu.peak)
    write_results(arguments.results, {"rows": rows})
    show("policies", {"rows": rows})
    draw_memory({"rows": rows})


if __name__ == "__main__":
    main()
