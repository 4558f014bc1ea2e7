"""`lisa-dist init`: a commented recipe for a model and a budget, with the plan that says it fits."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lisa_dist.commands import exit_on_error, writing
from lisa_dist.commands.plan import HELP as HELP_OF_PLAN
from lisa_dist.commands.plan import tell
from lisa_dist.config import LisaConfig
from lisa_dist.core.blocks import number_of_decoder_layers
from lisa_dist.data.sources import count_rows
from lisa_dist.flags import FlagParser
from lisa_dist.memory.plan import learning_rate, load_model_config, preset_settings, with_accumulation
from lisa_dist.memory.planner import first_that_fits
from lisa_dist.presets import PRESETS
from lisa_dist.run.recipe import InitArguments, format_recipe, steps_of_recipe, with_interval

USAGE = "lisa-dist init --model llama3.1-8b [--gpus N] [--gpu_memory 24GiB] [--any_flag value ...]"
# The screen of --help; what is not here is in --help_all.
_OF_PLAN = {name: what for flags in HELP_OF_PLAN.values() for name, what in flags.items()}
_OF_PLAN |= {"dataset_name": "files, folders, or datasets of the hub"}
_ASKED = "model dataset_name seq_length micro_batch_size gradient_accumulation_steps"
_ASKED += " gpus gpu_memory host_memory gpus_per_host"
_CHOSEN = "lisa_preset lisa_activated_layers lisa_always_on lisa_state_bits lisa_offload checkpointed_layers"
HELP = {
    "What is trained, on what": {name: _OF_PLAN[name] for name in _ASKED.split()},
    "What is chosen if left out": {name: _OF_PLAN[name] for name in _CHOSEN.split()},
    "What is written": {
        "recipe": "the file; by default it is printed",
        "output_dir": "of the run, by default under runs/",
    },
}
ARGUMENTS = (InitArguments, LisaConfig)
_WITHOUT_GPU = "No GPU was found, so this is planned for one"


def main(argv: Sequence[str]) -> None:
    """Choose and write the recipe."""
    with exit_on_error("lisa-dist init"):
        flags = FlagParser(ARGUMENTS, USAGE, HELP)
        arguments, lisa_config = flags.parse(argv)
        arguments.check_bounds()
        if arguments.takes_minutes:
            tell(f"planning {arguments.tokens} tokens on each of {arguments.gpus} GPUs takes minutes")
        given = flags.given(argv)
        if "gpu_memory" not in given:
            for_what = "This is planned for a GPU" if torch.cuda.is_available() else _WITHOUT_GPU
            tell(f"{for_what} with {arguments.gpu_memory}. Give --gpu_memory for another.")
        config = load_model_config(arguments.model)
        arguments, preset = with_accumulation(arguments, given), preset_settings(arguments, lisa_config, given)
        chosen = first_that_fits(config, arguments, lisa_config, preset, tell=tell)
        rows = count_rows(arguments.dataset_name)
        steps = None if rows is None else steps_of_recipe(chosen.arguments, rows)
        of_preset = PRESETS[str(lisa_config.lisa_preset)]
        if steps is not None and chosen.lisa_config.samples and "lisa_interval_steps" not in {*given, *of_preset}:
            chosen = with_interval(chosen, number_of_decoder_layers(config), steps)
        rate = learning_rate(arguments.model, config, chosen.lisa_config, arguments.task)
        text = format_recipe(chosen, argv, config, rate, steps)
        if arguments.recipe is None:
            print(text, end="")
            return
        with writing(f"--recipe {arguments.recipe}"):
            Path(arguments.recipe).write_text(text, encoding="utf-8")
        print(f"wrote {arguments.recipe}")
