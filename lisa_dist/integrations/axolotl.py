"""LISA in Axolotl: `plugins: [lisa_dist.integrations.axolotl.LisaPlugin]` in its configuration.

Settings have the names that they have in a recipe of lisa_dist, `lisa_activated_layers: 2` and so on, with
`checkpointed_layers`, `gpu_memory`, `hang_timeout`, `save_async` and `eval_frozen_bits`.
"""

from typing import Any

from lisa_dist.errors import UserError
from lisa_dist.integrations.settings import KEYS, arguments_of, check_host, one_line

with one_line():
    check_host("axolotl", ">=0.19,<0.22")  # before names that other versions may not have

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin

from lisa_dist.removed import REMOVED
from lisa_dist.train.trainer import LisaMixin

# Keys of Axolotl that ask for other trainers, or for adapters.
_NOT_WITH = ("adapter", "rl", "reward_model", "process_reward_model", "relora", "unfrozen_parameters", "trainer_cls")


class LisaPlugin(BasePlugin):
    """Trains Axolotl's own examples, by its own trainer, by LISA. Ends by one line for keys that do not go with it."""

    def register(self, cfg: dict) -> None:
        """Look at the keys, which Axolotl shows here first: its data and its model take minutes."""
        with one_line():
            _arguments(cfg)

    def get_input_args(self) -> str:
        """Where the keys are."""
        return "lisa_dist.integrations.settings.LisaArgs"

    def get_trainer_cls(self, cfg: Any) -> type:
        """Axolotl's trainer, by LISA with the settings of a configuration."""
        of_mixin = _arguments(cfg)

        class LisaAxolotlTrainer(LisaMixin, AxolotlTrainer):
            """Axolotl's trainer by LISA."""

            def __init__(self, *args: Any, **kwargs: Any):
                with one_line():
                    super().__init__(*args, **of_mixin, **kwargs)

        return LisaAxolotlTrainer


def _arguments(cfg: Any) -> dict[str, Any]:
    """What LisaMixin takes, of a configuration. Raises UserError for keys that do not go with it."""
    if cfg.lisa_n_layers or cfg.lisa_step_interval:
        raise UserError(
            "lisa_n_layers, lisa_step_interval: they attach Axolotl's own LISA; give lisa_activated_layers and "
            "lisa_interval_steps."
        )
    if given := [name for name in _NOT_WITH if cfg[name]]:
        raise UserError(f"{given[0]}: {cfg[given[0]]}: LISA trains whole layers, supervised; leave it out.")
    settings = {name: cfg[name] for name in (*KEYS, *REMOVED) if cfg[name] is not None}
    return arguments_of(settings, "the configuration")
