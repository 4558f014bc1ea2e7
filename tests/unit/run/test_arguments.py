"""Flags and recipes that are parsed, and those that are refused then."""

from pathlib import Path

import pytest
from runs import ROOT

from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.task_configs import accumulation_steps


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    alone = ["--sequence_parallel", "1"]
    run_args, _, training_args, model_args, lisa_config = parse_arguments(["--config", str(recipe), *alone])
    assert run_args.method == "lisa"
    assert model_args.model_name_or_path
    assert lisa_config.lisa_activated_layers == "auto" or lisa_config.lisa_activated_layers >= 1
    assert Path(training_args.deepspeed).is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--method magic", "--method magic: unknown; choose one of lisa, full, lora"),
        ("--method lora --lora_r 0", "--lora_r 0: the rank of an adapter is at least 1"),
        ("--dataset_name=", "--dataset_name is missing"),
        ("--eval_rows -1", "--eval_rows -1"),
        ("--eval_rows 3 --eval_dataset_name x.jsonl", "give one of them"),
        ("--checkpointed_layers 3 --method full", "a number of layers is for --method lisa; give none or all"),
        ("--gpu_memory 22GiB", "--gpu_memory 22GiB: only --checkpointed_layers auto and"),
        ("--lisa_activated_layers most", "--lisa_activated_layers: invalid int value: 'most'"),
        ("--lisa_frozen_bits 5", "--lisa_frozen_bits 5: frozen layers have one of 16, 8, 4, fp8"),
        ("--lisa_frozen_store /tmp", "--lisa_frozen_store /tmp: frozen layers of 16 bits have no originals"),
        ("--method lora --lora_alpha 0", "--lora_alpha 0: adapters are scaled by it over the rank"),
        ("--method lora --lora_dropout 1", "--lora_dropout 1.0: a probability from 0 up to"),
        ("--method lora --lora_target_modules lm_head", "--lora_target_modules lm_head: TRL computes the"),
        ("--global_batch_size 12", "--global_batch_size 12: must be a multiple of 8, which --per_device_train"),
        ("--global_batch_size 16 --gradient_accumulation_steps 4", "4: give one of them; on 1 ranks it is 2"),
        ("--optim adamw", "--optim adamw: unknown; choose lisa_adamw or one of adamw_torch,"),
        ("--use_peft True", "--use_peft True"),
        ("--model_name_or_path llama3.1-8b", "that init and plan know; the model is meta-llama/Llama-3.1-8B"),
        ("--lerning-rate 3", "--lerning-rate: no such flag; did you mean --learning_rate?"),
        ("--fsdp true", "--fsdp true: training is sharded by DeepSpeed's ZeRO"),
        ("--xyzzy", "--xyzzy: no such flag; --help_all lists them"),
        ("--dataset_weights 1 2", "--dataset_weights 1 2: give one for each of the 1 sources"),
        ("--dataset_weights 0", "--dataset_weights 0 of rows.jsonl: must be above 0"),
        ("--dataset_columns answer", "--dataset_columns answer: give the format's name of a column"),
        ("--loss nll", "--loss nll: unknown"),
        ("--long_examples chop", "--long_examples chop: unknown"),
        ("--eval_rows 1.5", "--eval_rows 1.5: give a number of examples, or a fraction below 1"),
        ("--load_in_8bit True", "--load_in_8bit True: it is not supported; give --load_in_4bit"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, said):
    words = ["--model_name_or_path", "m", "--dataset_name", "rows.jsonl", "--output_dir", "out", *flags.split()]
    with pytest.raises(ValueError, match="--") as error:
        parse_arguments(words)
    assert said in str(error.value)


@pytest.mark.parametrize(("world_size", "steps"), [(1, 6), (2, 3), (6, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(world_size, steps):
    assert accumulation_steps(24, micro_batch_size=4, given=1, world_size=world_size) == steps
