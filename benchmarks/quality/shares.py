"""What does a share of the layers take of a GPU? Peaks of a step of 2,048 tokens by plan, at 8B and 70B.

python -m benchmarks.quality.shares

A share is of the decoder layers, as whole layers, one at least. No layer is checkpointed; 70B is on 8 GPUs by ZeRO-3.
LISA has the small states of its default preset, in bf16.
"""

from fractions import Fraction

from benchmarks.common.methods import ADAPTERS, ADAPTERS_8, modules_of
from benchmarks.common.results import parser_of, write_results
from lisa_dist import LisaConfig
from lisa_dist.memory.plan import PlanArguments, load_model_config
from lisa_dist.memory.planner import Planner
from lisa_dist.memory.trace import FakeRuns
from lisa_dist.memory.workload import CHUNKED
from lisa_dist.presets import SMALL_STATES

MODELS = {"llama3.1-8b": (1, "zero2"), "llama3.3-70b": (8, "zero3")}  # GPUs and DeepSpeed config of each
SHARES = ("1/15", "1/8", "1/6", "1/3", "1/2", "1")
LENGTH = 2048  # tokens of the one row of a rank


def peaks_of(model: str) -> dict[str, int]:
    """Bytes of a GPU by method and share."""
    (gpus, ds_config), config = MODELS[model], load_model_config(model)
    runs, layers = FakeRuns(config), config.num_hidden_layers

    def peak(settings: dict, optim: str = "lisa_adamw", **changes) -> int:
        asked = PlanArguments(
            model, gpus=gpus, seq_length=LENGTH, optim=optim, checkpointed_layers="none", reserve="0", **changes
        )
        return Planner(config, asked, LisaConfig.plain(**settings), runs=runs).peak(ds_config, CHUNKED)

    found = {f"lora r{rank}": peak({}, "adamw_torch_fused", method="lora", lora_r=rank) for rank in (16, 64)}
    found["full"] = peak({}, "adamw_torch_fused", method="full")
    for share in SHARES:
        of_layers = {"lisa_activated_layers": max(1, round(layers * Fraction(share)))} | SMALL_STATES
        found[f"lisa {share}"] = peak(of_layers)
        found[f"adapters {share}"] = peak(of_layers | ADAPTERS)
        if gpus == 1:  # ZeRO-3 quantizes nothing
            found[f"adapters r32, frozen 8 bits {share}"] = peak(of_layers | ADAPTERS_8)
        found[f"modules {share}"] = peak(modules_of(Fraction(share)) | SMALL_STATES)
    return found


def main() -> None:
    """Plan all and write them, for the table of losses by share."""
    arguments = parser_of(__doc__, "shares").parse_args()
    write_results(arguments.results, {model: peaks_of(model) for model in MODELS})


if __name__ == "__main__":
    main()
