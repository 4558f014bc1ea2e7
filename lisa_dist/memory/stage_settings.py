"""The settings of a DeepSpeed config that decide on memory."""

from dataclasses import dataclass
from typing import Any

from lisa_dist.optim.build import LISA_ADAMW

# DeepSpeed's defaults, where a config leaves them to it. Elements.
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_REUSE_DISTANCE = 1_000_000_000
# Keys of a config by which gradients are added up otherwise.
_OTHER_SUMS = ("prescale_gradients", "gradient_predivide_factor", "communication_data_type")


@dataclass(frozen=True)
class StageSettings:
    """The settings of a DeepSpeed config that decide on memory. Sizes in elements."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    pins: bool  # what is offloaded of the optimizer
    reduce_bucket: int
    overlap_comm: bool
    persistence_threshold: int
    max_reuse_distance: int
    plain_sums: bool = True  # gradients are added up in the dtype of the weights, and divided by the ranks afterwards

    @classmethod
    def of(cls, ds_config: dict[str, Any], hidden_size: int) -> "StageSettings":
        """Read a config, with "auto" as the Hugging Face integration fills it in."""
        zero, data_types = ds_config["zero_optimization"], ds_config.get("data_types") or {}

        def elements(key: str, auto: int, default: int) -> int:
            value = zero.get(key, default)
            return auto if value == "auto" else int(value)

        def offloads(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            pins=bool((zero.get("offload_optimizer") or {}).get("pin_memory")),
            reduce_bucket=elements("reduce_bucket_size", hidden_size**2, _REDUCE_BUCKET),
            overlap_comm=bool(zero.get("overlap_comm")),
            persistence_threshold=elements(
                "stage3_param_persistence_threshold", 10 * hidden_size, _PERSISTENCE_THRESHOLD
            ),
            plain_sums=not any(ds_config.get(key) for key in _OTHER_SUMS) and not data_types.get("grad_accum_dtype"),
            max_reuse_distance=elements("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE, _MAX_REUSE_DISTANCE),
        )

    def reduces_rows(self, optim: str, method: str = "lisa") -> bool:
        """Whether the gradient of an embedding is of the rows that occur (`zero/embedding_rows.py`)."""
        fits = self.stage < 3 and not self.offload_optimizer and self.plain_sums
        return method == "lisa" and optim == LISA_ADAMW and fits
