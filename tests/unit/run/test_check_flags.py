"""Arguments and recipes of a run that make no sense: one line, before a model is loaded."""

import json
import sys
from pathlib import Path

import pytest
from models import save_tiny_llama
from runs import flags_for, refused, save_tiny_run

from lisa_dist.errors import UserError
from lisa_dist.files import write_json
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.run import check_config, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("learning_rate", "nan", "--learning_rate: invalid float value: 'nan'."),
        ("learning_rate", "1e400", "--learning_rate: invalid float value: '1e400'."),
        ("learning_rate", "-1", "--learning_rate -1.0: 0 or more."),
        ("learning_rate", "1e30", "--learning_rate 1e+30: at most 1e9."),
        ("max_steps", "0", "--max_steps 0: 1 or more; -1 lets --num_train_epochs decide."),
        ("max_steps", "١٢", "--max_steps: invalid int value: '١٢'."),
        ("max_steps", str(2**63), f"--max_steps: invalid int value: '{2**63}'."),
        ("per_device_train_batch_size", "0", "--per_device_train_batch_size 0: 1 or more."),
        ("max_length", "-2", "--max_length -2: 1 or more; -1 is no limit."),
        ("adam_epsilon", "0", "--adam_epsilon 0.0: above 0."),
        ("save_steps", "0", "--save_steps 0.0: above 0."),  # no checkpoint would ever be written
        ("dataloader_prefetch_factor", "0", "--dataloader_prefetch_factor 0: 1 or more."),
        ("report_to", "azure_ml", "--report_to azure_ml: unknown, or its package is not installed; installed are "),
        ("seed", "-1", "--seed -1: from 0 to 4294967295."),
        ("adam_beta2", "1", "--adam_beta2 1.0: from 0 up to, not including, 1."),
        ("hang_timeout", "inf", "--hang_timeout: invalid float value: 'inf'."),
        # What the arguments of transformers and TRL say themselves.
        ("lr_scheduler_kwargs", "{", "Expecting property name enclosed in double quotes"),
        ("warmup_steps", "-1", "--warmup_steps -1.0: Got warmup_steps = -1.0, Expected value warmup_steps >= 0"),
        ("accelerator_config", "x", "--accelerator_config x: [Errno 2] No such file or directory: 'x'"),
        ("pad_token", "<none>", "--pad_token <none>: the tokenizer has no such token."),
        ("model_init_kwargs", "-5", '--model_init_kwargs -5: give an object in JSON, such as {"name": 1}.'),
        ("gradient_checkpointing_kwargs", "x", "--gradient_checkpointing_kwargs x: give an object in JSON"),
        ("report_to", "tensorboard,x", "--report_to x: unknown, or its package is not installed; installed are "),
        ("dtype", "@x", "--dtype @x: unknown; give auto or a name of torch's, such as bfloat16."),
        ("torch_compile_mode", "a\u2028b", "--torch_compile_mode a b: unknown; choose one of default"),
        ("method", "a\nb", "--method a b: unknown; choose one of lisa, full, lora."),
        ("pad_to_multiple_of", "x", "invalid literal for int() with base 10: 'x'"),
        # What transformers would trip over with a model loaded.
        ("report_to", "clearml", "--report_to clearml: unknown, or its package is not installed; installed are "),
        ("lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr with"),
        (
            "lr_scheduler_kwargs",
            '{"foo": 1}',
            "--lr_scheduler_kwargs {'foo': 1}: get_linear_schedule_with_warmup() got",
        ),
        ("model_init_kwargs", '{"foo": 1}', "--model_init_kwargs: LlamaForCausalLM.__init__() got an unexpected"),
        ("dataset_name", "json", "--dataset_name json: a kind of file and no name of a dataset; give the file itself."),
    ],
)
def test_numbers_that_make_no_sense(folder, tmp_path, flag, value, said):
    words = flags_for(folder, tmp_path / "out", **{flag: value})
    assert said in refused(lambda: run(parse_arguments(words)))


def test_a_value_that_argparse_takes_for_none(folder, tmp_path):
    words = [*flags_for(folder, tmp_path / "out"), "--layer_norms=--"]
    of_3_13 = "--layer_norms: invalid int value: '--'."  # whose argparse hands it on
    said = "--layer_norms=--: -- is no value." if sys.version_info < (3, 13) else of_3_13
    assert refused(parse_arguments, words) == said


@pytest.mark.parametrize("given", ["--max_length -1", "max_length: null", "max_length: -1"])
def test_no_limit_of_length_is_none(folder, tmp_path, given):
    (tmp_path / "recipe.yaml").write_text(f"{given}\n")
    words = flags_for(folder, tmp_path / "out")
    del words[(at := words.index("--max_length")) : at + 2]
    words += given.split() if given.startswith("--") else ["--config", str(tmp_path / "recipe.yaml")]
    config = parse_arguments(words)
    assert config.training.max_length is None
    check_config(config)
    config.training.packing = True
    assert "--packing true needs a --max_length" in refused(check_config, config)


# Aliases that double fifty times.
BILLION = "model_init_kwargs:\n  a0: &a0 [x, x]\n"
BILLION += "".join(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 50))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_steps: null", "max_steps: None: null is no value of this key"),
        ("max_steps: 3.0", "--max_steps: invalid int value: '3.0'"),
        ("max_steps: [1]", "max_steps: [1]: a list is no value"),
        ("max_steps: true", "max_steps: True: true or false is no value"),
        ("learning_rate: .nan", "--learning_rate: invalid float value: 'nan'"),
        ("output_dir: 2024-01-01", "output_dir: 2024-01-01: a date is no value of this key; put a text in quotes"),
        ("output_dir: {a: 1}", "output_dir: {'a': 1}: an object is no value"),
        ("dataset_name: [[a]]", "dataset_name: [['a']]: a list is no value"),
        ("dataset_name: [null]", "dataset_name: [None]: a list is no value"),
        ("dataset_weights: [1, x]", "dataset_weights: x: is no float"),
        ("lr_scheduler_type: 3", "lr_scheduler_type: 3: choose one of linear"),
        ("model_init_kwargs: {a: 2024-01-01}", "an object is no value"),
        ("max_steps: &a [*a]", "its aliases stand for more than 100000 values; write them out"),
        (BILLION, "its aliases stand for more than 100000 values; write them out"),
        ("model_init_kwargs: {a: 1, b: 2, a: 3}", "is not YAML (the key a is given twice, in the lines 1 and 1)"),
        ("seed: 1\nmax_steps: 2\nseed: 3", "is not YAML (the key seed is given twice, in the lines 1 and 3)"),
        ("a: &a {x: 1}\nb: &b {y: 2}\nmodel_init_kwargs: {<<: *a, <<: *b, y: 3, y: 4}", "(the key y is given twice"),
        ("learning_rate: !!python/object:os.system x", "is not YAML (could not determine a constructor"),
        ("learning_rate: 2024-13-45", "is not YAML (month must be in 1..12"),
        ("learning_rate: *b", "is not YAML (found undefined alias 'b'"),
        ("env: {A: [1]}", "env: A: [1]: a variable has a name, and a text or a number"),
        ("help: me", "help: no such key"),
    ],
)
def test_values_of_a_recipe_that_are_none(folder, tmp_path, line, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{line}\n")
    words = ["--model_name_or_path", str(folder / "model"), "--config", str(path)]
    message = refused(parse_arguments, words)
    assert said in message


def test_values_of_a_recipe_are_read_as_words_are(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = ["eval_strategy: no", "dataset_weights: 2", "checkpointed_layers: 4", "learning_rate: 1e-5", "bf16: false"]
    lines += ["resume_from_checkpoint: true", "report_to: [tensorboard]", "lr_scheduler_kwargs: {num_cycles: 2}"]
    path.write_text("\n".join(lines))
    words = flags_for(folder, tmp_path / "out", config=path)
    for flag in ("eval_strategy", "learning_rate", "report_to"):
        del words[(at := words.index(f"--{flag}")) : at + 2]
    config = parse_arguments(words)
    training = config.training
    assert (training.eval_strategy, training.learning_rate, training.bf16) == ("no", 1e-5, False)
    assert (training.resume_from_checkpoint, training.report_to) == ("true", ["tensorboard"])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert (config.data.dataset_weights, config.run.checkpointed_layers) == ([2.0], "4")


def test_an_evaluation_of_nothing(folder, tmp_path):
    config = parse_arguments(flags_for(folder, tmp_path / "out", eval_strategy="steps", eval_rows=0))
    assert "--eval_strategy steps: there are no rows to evaluate; give --eval_rows 100" in refused(check_config, config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train_micro_batch_size_per_gpu": 64},
            "differ: ds train_micro_batch_size_per_gpu=64 vs hf per_device_train_batch_size=2; make them equal",
        ),
        ({"train_batch_size": 7}, "differ: ds train_batch_size=7 vs hf train_batch_size (calculated)="),
        ({"gradient_clipping": 3.0}, "differ: ds gradient_clipping=3.0 vs hf max_grad_norm=1.0; make them equal"),
        ({"bf16": {"enabled": True}}, "differ: ds bf16.enabled=True vs hf bf16|bf16_full_eval=False"),
        ({"bf16": True}, 'has bf16 = true: give an object {"...": ...}'),
        ({"zero_optimization": 3}, 'has zero_optimization = 3: give an object {"...": ...}'),
        ({"zero_optimization": {"stage": 7}}, "has zero_optimization.stage = 7: give 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, 'has zero_optimization.stage = "2": give 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, "has zero_optimization.stage = true: give 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            'has zero_optimization.reduce_bucket_size = "big": give a number of elements, or "auto"',
        ),
    ],
)
def test_deepspeed_configs_that_make_no_sense(folder, tmp_path, changes, said):
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    write_json(tmp_path / "ds.json", auto | {"zero_optimization": {"stage": 2}} | changes)
    words = flags_for(folder, tmp_path / "out", deepspeed=tmp_path / "ds.json", bf16=False)
    assert said in refused(lambda: check_config(parse_arguments(words)))


@pytest.mark.parametrize(
    ("name", "flag"),
    [("attn_implementation", "attn_implementation"), ("torch_dtype", "dtype"), ("revision", "model_revision")],
)
def test_what_has_a_flag_is_not_taken_beside_it(tmp_path, name, flag):
    """It would win over the flag, without the flag's checks."""
    save_tiny_llama(tmp_path / "model")
    flags = flags_for(tmp_path, tmp_path / "out", model_init_kwargs=json.dumps({name: "eager"}))
    with pytest.raises(UserError, match=rf"^--model_init_kwargs {name}: give --{flag} in its place\.$"):
        check_config(parse_arguments(flags))
