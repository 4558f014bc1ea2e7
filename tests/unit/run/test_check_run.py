"""Arguments, files and models of a run that cannot be used: one line, before a model is loaded."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from huggingface_hub.errors import StrictDataclassError
from models import save_tiny_llama, tiny_llama
from ranks import run_ranks, stop_ranks
from runs import flags_for, refused, save_tiny_run
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lisa_dist import LisaConfig
from lisa_dist.commands.verbs import look_for_files
from lisa_dist.core.controller import LisaController
from lisa_dist.errors import UserError
from lisa_dist.eval.model import load_model
from lisa_dist.files import describe_file, write_json
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.check_run import check_config, check_resume
from lisa_dist.run.inputs import load_tokenizer
from lisa_dist.run.run import run
from lisa_dist.run_folder import write_run


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
        ("lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr with"),
        (
            "lr_scheduler_kwargs",
            '{"foo": 1}',
            "--lr_scheduler_kwargs {'foo': 1}: get_linear_schedule_with_warmup() got",
        ),
        ("model_init_kwargs", '{"foo": 1}', "--model_init_kwargs: LlamaForCausalLM.__init__() got an unexpected"),
        # What has a flag is not taken beside it: it would win over the flag, without the flag's checks.
        ("model_init_kwargs", '{"revision": "x"}', "--model_init_kwargs revision: give --model_revision in its place."),
        ("model_init_kwargs", '{"torch_dtype": "x"}', "--model_init_kwargs torch_dtype: give --dtype in its place."),
        (
            "model_init_kwargs",
            '{"attn_implementation": "eager"}',
            "--model_init_kwargs attn_implementation: give --attn_implementation in its place.",
        ),
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


def flags_without(folder: Path, output_dir: Path, *names: str, **changes) -> list[str]:
    words = flags_for(folder, output_dir, **changes)
    for name in names:
        del words[(at := words.index(f"--{name}")) : at + 2]
    return words


@pytest.mark.parametrize("given", ["--max_length -1", "max_length: null", "max_length: -1"])
def test_no_limit_of_length_is_none(folder, tmp_path, given):
    (tmp_path / "recipe.yaml").write_text(f"{given}\n")
    words = given.split() if given.startswith("--") else ["--config", str(tmp_path / "recipe.yaml")]
    config = parse_arguments(flags_without(folder, tmp_path / "out", "max_length") + words)
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
        ("- 3", "must hold keys and values, such as learning_rate: 1.0e-5"),
        ("sequence_len: 3", "sequence_len: no such key; here it is max_length: docs/coming_from"),
        ("env: 3", "env must hold variables and their values"),
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
    left_out = ("eval_strategy", "learning_rate", "report_to")
    config = parse_arguments(flags_without(folder, tmp_path / "out", *left_out, config=path))
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


_SCHEDULER = {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("WarmupLR", _SCHEDULER | {"warmup_max_lr": 0.5}, "ds scheduler.params.warmup_max_lr=0.5 vs hf learning_rate"),
        (
            "WarmupLR",
            _SCHEDULER | {"warmup_num_steps": 3},
            "ds scheduler.params.warmup_num_steps=3 vs hf warmup_steps=1",
        ),
        (
            "WarmupDecayLR",
            _SCHEDULER | {"total_num_steps": 7},
            "ds scheduler.params.total_num_steps=7 vs hf max_steps=5",
        ),
        ("WarmupDecayLR", _SCHEDULER, "missing 1 required positional argument: 'total_num_steps'. Correct scheduler."),
        ("Nothing", {}, "has scheduler.type = Nothing, which is unknown. Use one of LRRangeTest, OneCycle, WarmupLR"),
    ],
)
def test_schedulers_of_deepspeed_that_cannot_be_used(folder, tmp_path, kind, settings, said):
    ds_config = {"zero_optimization": {"stage": 1}, "scheduler": {"type": kind, "params": settings}}
    config = parse_arguments(flags_for(folder, tmp_path / "out", deepspeed=json.dumps(ds_config)))
    assert said in refused(check_config, config)


@pytest.fixture
def fresh_rank():
    """Ranks of this test alone: a whole run initializes and destroys process groups."""
    stop_ranks()
    yield
    stop_ranks()


def outcome_of_run(words: list[str]) -> str:
    """Run in a rank, where a process group may be left behind. Return the error message or the output folder."""
    try:
        return str(run(parse_arguments(words)))
    except UserError as error:
        return str(error)


@pytest.mark.usefixtures("fresh_rank")
def test_a_scheduler_of_deepspeed_for_another_number_of_steps(folder, tmp_path):
    settings = _SCHEDULER | {"total_num_steps": 7}
    ds_config = {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupDecayLR", "params": settings}}
    words = flags_for(folder, tmp_path / "out", deepspeed=json.dumps(ds_config), max_steps=-1)
    (said,) = run_ranks(outcome_of_run, 1, words)
    assert "ds scheduler.params.total_num_steps=7 vs hf num_training_steps" in said


@pytest.mark.usefixtures("fresh_rank")
def test_a_deepspeed_config_without_a_batch_size_takes_that_of_the_flags(folder, tmp_path):
    words = flags_for(folder, tmp_path / "out", deepspeed='{"zero_optimization": {"stage": 1}}', max_steps=1)
    assert run_ranks(outcome_of_run, 1, words) == [str(tmp_path / "out")]


@pytest.mark.usefixtures("fresh_rank")
def test_sub_groups_that_are_smaller_than_a_block(folder, tmp_path):
    ds_config = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}}
    words = flags_for(folder, tmp_path / "out", deepspeed=json.dumps(ds_config), max_steps=1)
    (said,) = run_ranks(outcome_of_run, 1, words)
    assert "If the DeepSpeed config has zero_optimization.sub_group_size, leave it out or" in said
    assert len(said.splitlines()) == 1


def test_fp16_where_the_device_has_none(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    config = parse_arguments(flags_for(folder, tmp_path / "out", fp16=True))
    assert "--fp16 True: this device does not compute in fp16. Use --bf16 true" in refused(check_config, config)


def test_pickled_weights_that_would_run_something(folder, tmp_path, capsys):
    class Touches:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    model = tmp_path / "model"
    shutil.copytree(folder / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"lm_head.weight": Touches()}, model / "pytorch_model.bin")
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model))
    assert "torch refuses to load pytorch_model.bin (UnpicklingError). The file is" in refused(check_config, config)
    assert "torch refuses to load its pickled weights" in refused(load_model, str(model))
    assert not (tmp_path / "was_run").exists()


def test_pickled_weights_that_are_whole_are_taken(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "model" / "model.safetensors"), model / "pytorch_model.bin")
    check_config(parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "file is no folder; give another"),
        ("file/below", "nothing can be written there (Not a directory)"),
        ("link", "link is no folder"),
        ("x" * 300, "nothing can be written there (File name too long)"),
        ("/proc/self/x", "nothing can be written there"),
    ],
)
def test_output_folders_in_which_nothing_can_be_written(folder, tmp_path, name, said):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    config = parse_arguments(flags_for(folder, tmp_path / name))
    assert said in refused(check_config, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def without(*names: str):
    return lambda model: [path.unlink() for name in names for path in model.glob(name)]


def writing(name: str, content: str):
    return lambda model: (model / name).write_text(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "there is no config.json in it; give the folder of a model"),
        (without("tokenizer*"), "there is no tokenizer in it"),
        (without("*.safetensors"), "there are no weights in it, such as model.safetensors"),
        (writing("config.json", "{"), "config.json: cannot be read"),
        (writing("config.json", "[]"), "config.json: is damaged: it holds no object"),
        (writing("config.json", "{}"), "its config.json is of no model that can be trained"),
        (writing("config.json", '{"model_type": "llama", "num_attention_heads": -4}'), "(num_attention_heads -4)"),
        (writing("tokenizer_config.json", "{"), "tokenizer_config.json: cannot be read"),
        (writing("tokenizer.json", "{"), "its tokenizer cannot be loaded"),
        (writing("tokenizer.json", '{"added_tokens": "x"}'), "its tokenizer cannot be loaded"),
        (writing("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
        (writing("model.safetensors", ""), "model.safetensors is damaged"),
        (lambda model: os.truncate(model / "model.safetensors", 5000), "model.safetensors is damaged"),
        (
            lambda model: (
                (model / "model.safetensors").unlink(),
                (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            ),
            "model.safetensors.index.json names gone.safetensors, and there is no such file",
        ),
        (lambda model: (shutil.rmtree(model), model.touch()), "is a file; give the folder of a model"),
    ],
)
def test_a_model_that_is_not_whole(folder, tmp_path, damage, said):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    damage(model)
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model))

    def until_the_model():
        check_config(config)
        load_tokenizer(config)

    assert said in refused(until_the_model)


@pytest.mark.parametrize(
    ("flag", "place", "said"),
    [
        ("dataset_name", "pipe.jsonl", "pipe.jsonl: is neither a file nor a folder, but a pipe or a device"),
        ("chat_template_path", "pipe.jinja", "pipe.jinja: cannot be read (it is a folder, a pipe or a device"),
        ("config", "pipe.yaml", "pipe.yaml: cannot be read (it is a folder, a pipe or a device"),
        ("dataset_name", "x" * 300, "cannot be read (File name too long)"),
        ("lisa_weights_file", "pipe.json", "pipe.json: cannot be read (it is a folder, a pipe or a device"),
    ],
)
def test_what_is_no_file_is_not_opened(folder, tmp_path, flag, place, said):
    if place.startswith("pipe"):
        os.mkfifo(tmp_path / place)
    weighted = {"lisa_sampler": "weighted"} if flag == "lisa_weights_file" else {}
    words = flags_for(folder, tmp_path / "out", **{flag: tmp_path / place}, **weighted)
    assert said in refused(lambda: run(parse_arguments(words)))


def checkpoint(folder: Path, **changes: object) -> None:
    """The small files of a LISA checkpoint that a trainer saved."""
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "scheduler.pt"):
        (folder / name).write_text("{}")
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    state = {"format": 1, "saved_at": 1.0, "world_size": 1, "lisa": {"config": {}}, "versions": {"lisa_dist": "0"}}
    state |= {"files": files} | changes
    write_json(folder / "lisa_state.json", {name: value for name, value in state.items() if value != "missing"})


@pytest.mark.parametrize(
    ("method", "wanted", "changes", "said"),
    [
        ("full", True, {}, "checkpoint-2 with --method full: it is a checkpoint of --method lisa, which resumes it"),
        ("lora", "CHECKPOINT", {}, "checkpoint-2 with --method lora: it is a checkpoint of --method lisa"),
        ("lisa", True, {"files": {}}, "there is no trainer_state.json in it: it was saved in a loop of one's own"),
        ("lisa", "CHECKPOINT", {"files": {}}, "there is no trainer_state.json in it: it was saved in a loop"),
        ("lisa", "CHECKPOINT", {"lisa": []}, "lisa_state.json is damaged, or not of a LISA run: lisa is not an object"),
        ("lisa", True, {"saved_at": "missing"}, "or not of a LISA run: saved_at is no number"),
        ("lisa", "auto", {"files": {"a": {"bytes": -1}}}, "or not of a LISA run: files.a.bytes is no whole number"),
        ("lisa", "absent", {}, "--resume_from_checkpoint absent: no such folder."),
        ("full", "absent", {}, "--resume_from_checkpoint absent with --method full: no such folder."),
    ],
)
def test_checkpoints_that_cannot_be_resumed(tmp_path, method, wanted, changes, said):
    checkpoint(tmp_path / "checkpoint-2", **changes)
    wanted = tmp_path / "checkpoint-2" if wanted == "CHECKPOINT" else wanted
    assert said in refused(check_resume, wanted, tmp_path, method)


def test_checkpoints_that_can_be_resumed(tmp_path):
    checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "lisa_state.json").write_text("{")  # which the trainer passes over
    for wanted in (True, "auto", tmp_path / "checkpoint-2"):
        check_resume(wanted, tmp_path, "lisa")
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-2")
    check_resume(tmp_path / "latest", tmp_path, "lisa")
    check_resume("auto", tmp_path / "absent", "lisa")
    (tmp_path / "full" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "full" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    check_resume(True, tmp_path / "full", "full")
    (tmp_path / "full" / "lisa_run.json").write_text(json.dumps([]))
    assert "lisa_run.json: is damaged" in refused(check_resume, True, tmp_path / "full", "full")


def test_the_newest_checkpoint_of_other_methods_is_one_with_a_state(tmp_path):
    """Which a run writes last: without it a checkpoint of an older release is not whole."""
    check_resume("auto", tmp_path / "absent", "lora")
    (tmp_path / "checkpoint-3").mkdir()
    assert "there is no whole checkpoint" in refused(check_resume, True, tmp_path, "full")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    write_json(tmp_path / "checkpoint-2" / "lisa_checkpoint.json", {"saved_at": 1.0, "world_size": 3, "files": {}})
    for wanted in (True, "auto", tmp_path / "checkpoint-2"):
        said = refused(check_resume, wanted, tmp_path, "full")
        assert "checkpoint-2 with --method full: its run had 3 ranks, and this one has 1. " in said
    write_json(tmp_path / "checkpoint-2" / "lisa_checkpoint.json", {"saved_at": 1.0, "world_size": 1, "files": {}})
    check_resume("auto", tmp_path, "full")


@pytest.mark.parametrize("method", ["lisa", "full"])
def test_nothing_to_resume(tmp_path, method):
    assert "--resume_from_checkpoint true: there is no" in refused(check_resume, True, tmp_path, method)


@pytest.mark.parametrize("wanted", [None, False, "auto", "ELSEWHERE"])
def test_a_folder_with_a_model_or_checkpoints_is_not_written_over(tmp_path, wanted):
    """But where it is asked for, or where the run that begins has left logs alone."""
    out, elsewhere = tmp_path / "out", tmp_path / "other" / "checkpoint-1"
    checkpoint(elsewhere)
    wanted = elsewhere if wanted == "ELSEWHERE" else wanted
    out.mkdir()
    (out / "lisa_run.json").write_text("{}")
    (out / "training_args.bin").touch()
    check_resume(wanted, out, "lisa")
    (out / "model.safetensors").touch()
    said = f"--output_dir {out}: has model.safetensors, which this run would write over; give another folder, or "
    assert f"{said}--overwrite_output_dir true." in refused(check_resume, wanted, out, "lisa")
    (out / "model.safetensors").unlink()
    checkpoint(out / "checkpoint-2")
    given = {"output_dir": str(out), "resume_from_checkpoint": str(wanted).lower()}
    if wanted == "auto":
        check_resume(wanted, out, "lisa")
    else:
        said = f"--output_dir {out}: has checkpoint-2, which this run would write over; give another folder, --resume"
        assert said in refused(check_resume, wanted, out, "lisa")
        assert said in refused(look_for_files, "train", given), "also before torch is imported"
    check_resume(wanted, out, "lisa", overwrites=True)
    look_for_files("train", given | {"overwrite_output_dir": True})
    (out / "checkpoint-9").symlink_to(elsewhere)  # as to another disk
    check_resume(out / "checkpoint-9", out, "lisa")


def test_a_run_that_writes_over_another_one_leaves_none_of_its_checkpoints(tmp_path):
    checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-notes.txt").touch()
    (tmp_path / "checkpoint-4.tar").touch()
    write_run(tmp_path, {}, resumes=True)
    assert (tmp_path / "checkpoint-2").is_dir()
    write_run(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {"lisa_run.json", "checkpoint-notes.txt", "checkpoint-4.tar"}


@pytest.mark.parametrize("name", ["tmp-lisa_log.jsonl", "lisa_steps.jsonl", "lisa_run.json"])
@pytest.mark.parametrize("wanted", [None, "auto"])
def test_a_folder_in_the_place_of_a_log_is_refused(tmp_path, name, wanted):
    """Rank 0 alone would meet it in a step, while the others wait for it."""
    (tmp_path / name).mkdir()
    said = f"--output_dir {tmp_path}: {name} is a folder, and the run writes a file of that name. Remove it, or give "
    assert said in refused(check_resume, wanted, tmp_path, "lisa")


def test_a_module_to_save_that_the_model_lacks(folder, tmp_path):
    """peft would train no copy of it, without a warning."""
    flags = flags_for(folder, tmp_path / "out", method="lora", lora_modules_to_save="embed_tokens,head_lm")
    assert "--lora_modules_to_save head_lm: LlamaForCausalLM has no module" in refused(
        check_config, parse_arguments(flags)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora", "deepspeed": "zero3"}, "--load_in_4bit with ZeRO-3: it cannot partition weights in 4 bits"),
        ({"method": "full"}, "--load_in_4bit with --method full: weights in 4 bits cannot train. Use `--method lora`."),
        ({"method": "lisa"}, "weights in 4 bits cannot train. Use `--method lora` or `--lisa_frozen_bits 4`."),
    ],
)
def test_weights_in_4_bits_that_cannot_be(folder, tmp_path, changes, said):
    flags = flags_for(folder, tmp_path / "out", load_in_4bit=True, **changes)
    assert said in refused(check_config, parse_arguments(flags))


@pytest.mark.parametrize(
    ("changes", "rank", "said"),
    [
        (
            {"layer_norms": 1},
            "4",
            "--layer_norms with --lisa_adapters 4: it records weights without their adapters. Give --lisa_preset none",
        ),
        (
            {"method": "full"},
            "16",
            "--lisa_adapters 16 with --method full: they are beside layers of --method lisa; leave it out, or",
        ),
    ],
)
def test_adapters_that_cannot_be(folder, tmp_path, changes, rank, said):
    config = parse_arguments(flags_for(folder, tmp_path / "out", lisa_adapters=rank, **changes))
    assert said in refused(check_config, config)


def test_a_model_with_an_adapter_beside_it_is_not_taken_without(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "one")
    (tmp_path / "one" / "adapter").mkdir()
    (tmp_path / "one" / "adapter" / "adapter_model.safetensors").touch()
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=tmp_path / "one"))
    assert "its adapter is beside it; give what lisa-dist export makes of its checkpoint" in refused(
        check_config, config
    )


def test_an_adapter_is_no_model(folder, tmp_path):
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "one")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "model" / name, tmp_path / "one" / name)
    flags = flags_for(folder, tmp_path / "out", model_name_or_path=tmp_path / "one", lisa_adapters=4)
    said = refused(check_config, parse_arguments(flags))
    assert "there is no config.json in it; it holds an adapter; merge it into its model first" in said


QUANTIZED = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("lisa", {"architectures": ["LlamaForSequenceClassification"]}, "is a reward model, which scores texts and wr"),
        ("lisa", {"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM: LISA trains causal language models"),
        (
            "lisa",
            {"is_encoder_decoder": True, "architectures": ["BartForConditionalGeneration"]},
            "is a BartForConditionalGeneration, an encoder-decoder: LISA trains causal language models",
        ),
        (
            "lisa",
            QUANTIZED,
            "its weights are quantized (quant_method fp8), and they are what trains; give a model in b",
        ),
        ("full", QUANTIZED, "its weights are quantized (quant_method fp8)"),
        ("lora", QUANTIZED, None),
    ],
)
def test_models_that_cannot_be_trained(folder, tmp_path, method, changes, said):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | changes))
    config = parse_arguments(flags_for(folder, tmp_path / "out", model_name_or_path=model, method=method))
    if said is None:
        check_config(config)
    else:
        assert said in refused(check_config, config)


def test_the_config_of_every_architecture_is_taken_or_refused_in_one_line(tmp_path):
    """Some have sizes that differ by layer, as a list, or as attributes of single layers; some have no layers."""
    save_tiny_llama(tmp_path / "model")
    taken = 0
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            model_config = AutoConfig.for_model(model_type)
        except (StrictDataclassError, ValueError):  # one that cannot be made without sizes
            continue
        try:
            has_layers = hasattr(model_config.get_text_config(), "num_hidden_layers")
        except ValueError:  # of two text models
            has_layers = False
        model_config.save_pretrained(tmp_path / "model")
        config = parse_arguments(flags_for(tmp_path, tmp_path / "out"))
        with contextlib.nullcontext() if has_layers else pytest.raises(UserError, match=r"^[^\n]+$"):
            check_config(config)
            taken += 1
    assert taken > 200


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused_in_any_loop(dtype):
    model = tiny_llama()
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is (int8|float8_e4m3fn): LISA trains"):
        LisaController(model, LisaConfig.plain())
