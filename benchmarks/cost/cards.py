"""What does `lisa-dist init` choose for models and cards, and how fast is it by arithmetic? By plan, nothing measured.

python -m benchmarks.cost.cards

Tokens a second: SHARE of a card's bf16 peak over the FLOPs of a token: products of forward and backward pass, of the
gradients of the matrices that train, of layers that are computed again, and causal attention. Not in it: the optimizer,
the network, coding and decoding of layers in fewer bits, and what a short row leaves of a card idle.
"""

from benchmarks.common.methods import Method
from benchmarks.common.results import parser_of, write_results
from benchmarks.common.runs import flops_of_step, shrunk_config
from benchmarks.tables.rows import show
from lisa_dist import LisaConfig
from lisa_dist.errors import UserError
from lisa_dist.memory.plan import PlanArguments, learning_rate, load_model_config, preset_settings, with_accumulation
from lisa_dist.memory.planner import first_that_fits

SHARE = 0.4  # of the peak
# Peak of a card in bf16 with sums in fp32, dense, by its memory: RTX 4090, L40S, H100 SXM, as their makers say.
PEAKS = {"24GiB": 165e12, "48GiB": 362e12, "80GiB": 989e12}
MODELS = {
    (1, "24GiB"): ("llama3.2-1b", "llama3.1-8b", "qwen3-14b"),
    (1, "48GiB"): ("llama3.1-8b", "qwen3-14b", "qwen3-32b"),
    (1, "80GiB"): ("llama3.1-8b", "qwen3-14b", "qwen3-32b", "llama3.3-70b"),
    (8, "80GiB"): ("llama3.1-8b", "qwen3-32b", "llama3.3-70b"),
}


def figures_of(model: str, gpus: int, gpu_memory: str) -> dict:
    """What `lisa-dist init` chooses for a model on so many cards."""
    config = load_model_config(model)
    arguments = with_accumulation(PlanArguments(model, gpus=gpus, gpu_memory=gpu_memory), ())
    preset = preset_settings(arguments, LisaConfig(), ())
    try:
        chosen = first_that_fits(config, arguments, LisaConfig(), preset)
    except UserError as error:
        return {"not_fitting": str(error)}
    plan, lisa_config = chosen.plan, chosen.lisa_config
    settings = {"lisa_always_on": lisa_config.lisa_always_on, "lisa_adapters": lisa_config.lisa_adapters}
    layers = range(lisa_config.lisa_activated_layers)
    length, again = plan.workload.seq_length, plan.workload.checkpointed_layers
    flops = flops_of_step(shrunk_config(model), Method("lisa", "lisa", settings), 1, length, layers, again)
    return {
        "ds_config": plan.ds_config,
        "layers": lisa_config.lisa_activated_layers,
        "adapters": lisa_config.lisa_adapters,
        "num_layers": config.num_hidden_layers,
        "checkpointed": plan.workload.checkpointed_layers,
        "frozen_bits": lisa_config.frozen_form,
        "global_batch": gpus * arguments.gradient_accumulation_steps,
        "learning_rate": learning_rate(model, config, lisa_config),
        "peak": plan.gpu.needed,
        "host": plan.host_bytes * gpus,
        "tokens_per_second": gpus * SHARE * PEAKS[gpu_memory] / flops,
    }


def main() -> None:
    """Plan each, and print the table."""
    arguments = parser_of(__doc__, "cards").parse_args()
    figures = {}
    for (gpus, gpu_memory), models in MODELS.items():
        for model in models:
            figures[f"{gpus} x {gpu_memory}, {model}"] = figures_of(model, gpus, gpu_memory)
    write_results(arguments.results, figures)
    show("cards", figures)


if __name__ == "__main__":
    main()
