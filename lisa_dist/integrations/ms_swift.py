"""LISA in ms-swift: `swift sft --external_plugins .../lisa_dist/integrations/ms_swift.py --tuner_type full ...`.

`python -m lisa_dist.integrations.ms_swift` prints this file's place. `--lisa_activated_layers` and
`--lisa_step_interval` are ms-swift's own; every other setting stands in YAML in the variable LISA_DIST, such as
LISA_DIST="{lisa_sampler: balanced, checkpointed_layers: none}". ms-swift's own callback is not attached.
"""

import os
from typing import Any

import yaml

from lisa_dist.errors import UserError
from lisa_dist.integrations.settings import arguments_of, check_host, one_line

VARIABLE = "LISA_DIST"


def settings_of(args: Any) -> dict[str, Any]:
    """What `LisaMixin` takes, of ms-swift's training arguments and the variable. Raises UserError."""
    if args.tuner_type != "full":
        raise UserError(f"--tuner_type {args.tuner_type}: LISA trains whole layers; give --tuner_type full.")
    try:
        settings = yaml.safe_load(os.environ.get(VARIABLE) or "{}")
    except yaml.YAMLError as error:
        raise UserError(f"{VARIABLE}: is not YAML ({error}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"{VARIABLE}: must hold names and values, such as {{lisa_sampler: balanced}}.")
    of_flags = {"lisa_interval_steps": args.lisa_step_interval}
    if args.lisa_activated_layers:
        of_flags["lisa_activated_layers"] = args.lisa_activated_layers
    if both := of_flags.keys() & settings.keys():
        raise UserError(f"{VARIABLE}: {', '.join(sorted(both))}: ms-swift has a flag for it; give it there.")
    return arguments_of(of_flags | settings, VARIABLE)


def _register() -> None:
    with one_line():
        check_host("ms-swift", ">=4.6,<4.7")  # before names that other versions may not have
    from swift.trainers.trainer_factory import TrainerFactory

    place = "lisa_dist.integrations.ms_swift_trainer"
    for task in TrainerFactory.TRAINING_ARGS_MAPPING.keys() - {"causal_lm"}:  # asked for before a model is loaded
        TrainerFactory.TRAINING_ARGS_MAPPING[task] = f"{place}.NotByLisa"
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{place}.LisaSeq2SeqTrainer"


if __name__ == "__main__":
    print(os.path.abspath(__file__))
else:
    _register()
