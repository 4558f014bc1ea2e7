"""The cases of the golden comparison: every ZeRO stage with every offload and every form of the optimizer.

Samplers, policies of states, tied matrices, accumulation and checkpointing are spread over the cases, each on several
stages, since a case for every combination of them would take hours.
"""

STEPS, INTERVAL, CUT = 12, 3, 7  # switches before steps 3, 6 and 9; saved and resumed one step into a period

EIGHT_BITS = {"lisa_state_bits": "embed=8,head=8,layers=8"}
ADAPTIVE = {"lisa_sampler": "adaptive", "lisa_activated_layers": 3}
WEIGHTED = {"lisa_sampler": "weighted", "lisa_weights_file": "weights.json"}
SAMPLED = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.4,head=0.4", "lisa_seed": 3}
BADAM = {"lisa_always_on": "", "lisa_frozen": "embed,head,rest", "lisa_activated_layers": 1}
NO_MASTER = {"lisa_master": "bf16_sr"}
ON_CPU = {"device": "cpu"}


def case(ds_config: str, optim: str, dtype: str = "bf16", **options) -> dict:
    """A case: `dtype` of the weights, settings of LISA by their names, and how the loop runs:

    ranks, tied, accumulation, checkpointing, clip (the largest gradient norm), zero (more of zero_optimization), and
    trainer, for LisaTrainer in place of a loop.
    """
    name = " ".join([ds_config, optim, dtype, *(f"{key}={value}" for key, value in options.items())])
    lisa = {key: options.pop(key) for key in list(options) if key.startswith("lisa_")}
    defaults = {"ranks": 2, "tied": False, "accumulation": 1, "checkpointing": False, "clip": 0.5, "zero": {}}
    values = defaults | {"trainer": False} | options
    return {"name": name, "ds_config": ds_config, "optim": optim, "dtype": dtype, "lisa": lisa} | values


CASES = [
    case("zero1", "adamw_torch", "fp32", accumulation=2),
    case("zero2", "adamw_torch", "fp32", tied=True, lisa_state="keep", lisa_debug=True),
    case("zero3", "adamw_torch", "fp32", accumulation=2, checkpointing=True),
    case("zero1", "adamw_torch", tied=True, lisa_state="reset_all", lisa_sampler="reshuffle"),
    case("zero2", "adamw_torch", accumulation=2, checkpointing=True, **SAMPLED),
    case("zero3", "adamw_torch", tied=True, lisa_state="keep", **ADAPTIVE),
    case("zero1", "adamw_torch_fused", lisa_state="keep", **ADAPTIVE),
    case("zero2", "adamw_torch_fused", lisa_sampler="balanced"),
    case("zero3", "adamw_torch_fused", checkpointing=True, lisa_debug=True, **SAMPLED),
    case("zero1", "adamw_bnb_8bit", accumulation=2),
    case("zero2", "adamw_8bit", lisa_state="keep", lisa_activated_layers=3),
    case("zero3", "adamw_8bit", "fp32", checkpointing=True, lisa_state="reset_all"),
    case("zero1", "adamw_torch", lisa_state_bits="embed=8", lisa_state="keep", lisa_activated_layers=3),
    case("zero3", "adamw_8bit", lisa_state_bits="embed=32,head=32"),
    case("zero1", "lisa_adamw", "fp32", lisa_state="keep", lisa_activated_layers=3),
    case("zero2", "lisa_adamw", accumulation=2, lisa_lr_scale="embed=0.5,layers=2", **ADAPTIVE),
    case("zero3", "lisa_adamw", checkpointing=True, **SAMPLED),
    case("zero1", "lisa_adamw", lisa_state="reset_all", **EIGHT_BITS),
    case("zero2", "lisa_adamw", tied=True, lisa_state="keep", lisa_activated_layers=3, **EIGHT_BITS),
    case("zero3", "lisa_adamw", accumulation=2, checkpointing=True, **EIGHT_BITS, **ADAPTIVE),
    case("zero1", "lisa_adamw", accumulation=2, **NO_MASTER),
    case("zero2", "lisa_adamw", lisa_state="keep", **NO_MASTER, **ADAPTIVE),
    case("zero3", "lisa_adamw", tied=True, checkpointing=True, **NO_MASTER),
    case("zero1", "lisa_adamw", tied=True, lisa_state="keep", **NO_MASTER, **EIGHT_BITS),
    case("zero2", "lisa_adamw", checkpointing=True, **NO_MASTER, **EIGHT_BITS, **SAMPLED),
    case("zero3", "lisa_adamw", lisa_state="keep", lisa_activated_layers=3, **NO_MASTER, **EIGHT_BITS),
    # Optimizer states on the host, where DeepSpeed's own AdamW steps whatever --optim says; and weights too.
    case("zero1", "adamw_torch", zero={"offload_optimizer": ON_CPU}, accumulation=2),
    case("zero2_offload", "adamw_torch", "fp32", lisa_state="keep", lisa_activated_layers=3),
    case("zero2_offload", "lisa_adamw", accumulation=2, **ADAPTIVE),
    case("zero3", "adamw_torch", zero={"offload_optimizer": ON_CPU}, lisa_state="reset_all"),
    case("zero3_offload", "adamw_torch", "fp32", accumulation=2, checkpointing=True),
    case("zero3_offload", "adamw_torch_fused", tied=True, lisa_state="keep", **ADAPTIVE),
    # States of chosen blocks on the host.
    case("zero1", "lisa_adamw", lisa_offload="embed,head", lisa_state="keep"),
    case("zero2", "adamw_torch", "fp32", accumulation=2, lisa_offload="layers"),
    case("zero2", "lisa_adamw", lisa_offload="embed,layers", lisa_state_bits="head=8", **SAMPLED),
    case("zero3", "adamw_torch", checkpointing=True, lisa_offload="embed,head,rest,layers"),
    case("zero3", "lisa_adamw", "fp32", lisa_offload="layers", lisa_state="keep", **ADAPTIVE),
    # Nothing but a layer at a time, no layer at all, all layers; and no clipping of gradients.
    case("zero2", "adamw_torch", checkpointing=True, **WEIGHTED, **BADAM),
    case("zero3", "lisa_adamw", "fp32", checkpointing=True, lisa_sampler="reshuffle", **BADAM),
    case("zero3", "adamw_torch", lisa_activated_layers=0, clip=0.0),
    case("zero2", "adamw_torch", "fp32", lisa_sampler="fixed", lisa_activated_layers=6, clip=0.0),
    # One rank: nothing is cut, and other code of DeepSpeed's runs.
    case("zero1", "lisa_adamw", ranks=1, **NO_MASTER, **EIGHT_BITS),
    case("zero2", "adamw_8bit", ranks=1, accumulation=2, checkpointing=True, lisa_state="keep"),
    case("zero2_offload", "adamw_torch", ranks=1, tied=True),
    case("zero3", "adamw_torch", "fp32", ranks=1, checkpointing=True, **SAMPLED),
    # LisaTrainer on TRL; last, since Accelerate keeps one DeepSpeed config for a process.
    case("zero2", "adamw_torch", "fp32", trainer=True, accumulation=2, lisa_state="keep"),
    case("zero3", "lisa_adamw", "fp32", trainer=True, checkpointing=True),
]

SLICE = [CASES[index] for index in (4, 25, 28, 42)]  # stages 2 and 3, offload, one rank
