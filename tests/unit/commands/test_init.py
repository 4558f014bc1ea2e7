"""`lisa-dist init`: a recipe that fits and that a run takes as it is."""

import re
import shlex
import sys

import pytest
import yaml
from cases import full
from transformers import LlamaConfig

from lisa_dist import cli
from lisa_dist.commands import plan as plan_command
from lisa_dist.commands.init import main
from lisa_dist.config import LisaConfig, UserError
from lisa_dist.memory.plan import learning_rate, load_model_config, preset_settings
from lisa_dist.memory.planner import FALLBACKS, Chosen, first_that_fits, make_plans, possible_fallbacks
from lisa_dist.model_names import HUB_IDS, shipped_model_configs
from lisa_dist.run.arguments import parse_arguments
from lisa_dist.run.recipe import InitArguments


def choose(arguments: InitArguments, lisa_config: LisaConfig) -> Chosen:
    return first_that_fits(load_model_config(arguments.model), arguments, lisa_config)


def test_the_recipe_is_one_that_a_run_takes(tiny, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    asked = ["--model", tiny, "--gpus", "16", "--gpu_memory", "4GiB", "--lisa_interval_steps", "7"]
    asked += ["--precision", "fp32", "--gradient_accumulation_steps", "2", "--dataset_name", "rows.jsonl"]
    asked += ["--loss", "chunked"]
    main([*asked, "--recipe", str(path)])
    assert capsys.readouterr().out == f"wrote {path}\n"
    run_args, data_args, training_args, model_args, lisa_config = parse_arguments(["--config", str(path)])
    assert (run_args.method, run_args.checkpointed_layers, run_args.gpu_memory) == ("lisa", "auto", "1.50GiB")
    assert data_args.dataset_name == ["rows.jsonl"]
    assert data_args.eval_rows == 0.02
    assert model_args.model_name_or_path == tiny
    assert (lisa_config.lisa_interval_steps, lisa_config.lisa_activated_layers) == (7, 2), "K asks for sampling"
    assert (training_args.output_dir, training_args.global_batch_size) == ("runs/model", 32), "16 GPUs, two each"
    assert training_args.bf16 is False
    assert run_args.loss == "chunked"
    text = path.read_text()
    assert f"lisa-dist train {path} --gpus 8" in text
    assert "docs/clusters.md" in text, "16 GPUs are on two hosts"


@pytest.mark.parametrize(
    ("has_gpu", "said"), [(False, "No GPU was found, so this is planned for one"), (True, "This is planned for a GPU")]
)
def test_the_memory_that_is_assumed_is_said(tiny, capsys, monkeypatch, has_gpu, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    main(["--model", tiny])
    assert f"{said} with 80GiB. Give --gpu_memory for another.\n" in capsys.readouterr().err
    main(["--model", tiny, "--gpu_memory", "4GiB"])
    assert "--gpu_memory" not in capsys.readouterr().err


def test_a_recipe_of_another_task(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    asked = ["--task", "dpo", "--precompute_ref_log_probs", "true", "--beta", "0.2"]
    main(["--model", tiny, "--gpu_memory", "4GiB", "--precision", "fp32", *asked, "--recipe", str(path)])
    run_args, _, training_args, _, _ = parse_arguments(["--config", str(path)])
    assert (run_args.task, run_args.checkpointed_layers, run_args.gpu_memory) == ("dpo", "auto", "2.50GiB")
    assert type(training_args).__name__ == "LisaDPOConfig"
    assert training_args.precompute_ref_log_probs
    assert training_args.beta == 0.2
    assert "packing" not in path.read_text()
    with pytest.raises(UserError, match="--micro_batch_size 1 with --task kto: it compares the rows of a batch"):
        InitArguments(tiny, task="kto")
    with pytest.raises(UserError, match="--task grpo: init writes no recipe of it"):
        InitArguments(tiny, task="grpo", micro_batch_size=8)
    with pytest.raises(UserError, match="--loss logits with --task dpo: it is for --task sft"):
        InitArguments(tiny, task="dpo", loss="logits")


def test_modules_need_no_number_of_layers(tiny, tmp_path):
    """Nor are embeddings sampled like layers for them: where nothing else fits, what is lacking is said."""
    path = tmp_path / "recipe.yaml"
    asked = ["--model", tiny, "--lisa_unit", "module", "--lisa_budget", "10%"]
    main([*asked, "--gpu_memory", "4GiB", "--recipe", str(path)])
    assert "lisa_activated_layers" not in path.read_text()
    *_, lisa_config = parse_arguments(["--config", str(path)])
    assert (lisa_config.lisa_unit, lisa_config.lisa_budget) == ("module", "10%")
    least = InitArguments(tiny, gpu_memory="1MiB", reserve="0", checkpointed_layers="all", loss="chunked")
    with pytest.raises(UserError, match="nothing fits"):
        choose(least, LisaConfig(lisa_unit="module", lisa_budget="10%"))


def test_the_plan_it_names_is_the_plan(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lisa-dist", "init", "--model", tiny, "--gpu_memory", "4GiB"])
    cli.main()
    recipe = capsys.readouterr().out
    (line,) = (line for line in recipe.splitlines() if line.startswith("# The parts of it: "))
    plan_command.main(shlex.split(line.partition(": ")[2])[2:])
    planned = capsys.readouterr().out
    assert "fits" in planned
    assert f"--deepspeed {yaml.safe_load(recipe)['deepspeed']} " in planned


@pytest.mark.full
def test_nothing_is_given_up_without_need(tmp_path):
    """With just enough memory for a fallback it is the first that fits."""
    config = LlamaConfig(vocab_size=32000, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    asked = {"model": str(tmp_path), "checkpointed_layers": "all", "seq_length": 64}
    needs = {}
    for fallback in FALLBACKS:
        asked_so = InitArguments(**asked | ({} if fallback.optim is None else {"optim": fallback.optim}))
        plans = make_plans(config, asked_so, LisaConfig.plain(**fallback.settings))
        needs[fallback.name] = min(
            one.gpu.needed for one in plans if one.ds_config.endswith("_offload") == fallback.offloads
        )
    reached = set()
    for need in needs.values():
        chosen = choose(InitArguments(**asked, gpu_memory=f"{need + (3 << 29)}B"), LisaConfig.plain())
        assert chosen.fallback.name == next(name for name, theirs in needs.items() if theirs <= need)
        assert chosen.plan.gpu.needed <= need
        assert chosen.lisa_config == LisaConfig.plain(**chosen.fallback.settings)
        assert chosen.arguments.optim == (chosen.fallback.optim or "adamw_torch_fused")
        reached.add(chosen.fallback.name)
    assert len(reached) > 4, needs


def test_plan_and_init_have_one_default_and_one_batch(tiny, tmp_path, capsys):
    """A run's default is in run/test_settle.py."""
    path = tmp_path / "recipe.yaml"
    main(["--model", tiny, "--gpu_memory", "4GiB", "--recipe", str(path)])
    tried = capsys.readouterr().err.splitlines()
    assert tried[0].startswith("trying zero1, zero2: moments in 8 bits or by row and column")
    assert len(tried) == 1, "the first that fits"
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["lisa_preset"], recipe["global_batch_size"], recipe["learning_rate"]) == ("adapters", 16, 1e-3)
    assert not {"lisa_activated_layers", "lisa_interval_steps"} & recipe.keys(), "nothing is sampled"
    plan_command.main(["--model", tiny, "--gpu_memory", "4GiB"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--gradient_accumulation_steps 16 " in command
    states = "--lisa_state_bits embed=factored,head=factored,layers=8 --lisa_master bf16_sr"
    assert f"{states} --lisa_preset adapters --learning_rate 0.001" in command
    plan_command.main(["--model", tiny, "--gpu_memory", "4GiB", "--lisa_adapters", "8"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert f"--lisa_adapters 8 {states} --lisa_preset adapters" in command
    for preset, layers in (("none", 2), ("paper", 2)):
        plan_command.main(["--model", tiny, "--gpu_memory", "4GiB", "--lisa_preset", preset])
        command = capsys.readouterr().out.splitlines()[-1]
        assert "--optim adamw_torch_fused --bf16 True " in command
        assert (f"--lisa_activated_layers {layers} " in command) == (preset == "none")
        assert ("--lisa_preset paper" in command) == (preset == "paper")


def test_a_rate_is_for_lisa_alone(tiny, capsys):
    plan_command.main(["--model", tiny, "--gpu_memory", "4GiB", "--method", "lora"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--method lora " in command
    assert "--learning_rate" not in command


def test_paper_begins_with_states_in_32_bits(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    main(["--model", tiny, "--gpu_memory", "4GiB", "--lisa_preset", "paper", "--recipe", str(path)])
    assert "AdamW in 32 bits, as published" in path.read_text()
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["optim"], recipe["lisa_preset"]) == ("adamw_torch_fused", "paper")
    assert "lisa_state" not in recipe, "the preset has it"
    assert "lisa_state_bits" not in recipe


def test_what_a_rung_has_of_a_preset():
    """adapters has small states, on the GPU alone; paper has all fallbacks, each with new states in a period."""
    tried, arguments = {}, InitArguments("llama3.1-8b")
    for name in ("adapters", "paper"):
        config = LisaConfig(lisa_preset=name)
        tried[name] = [*possible_fallbacks(arguments, config, preset_settings(arguments, config, ("lisa_preset",)))]
    assert [fallback for fallback, *_ in tried["paper"]] == [*FALLBACKS]
    for fallback, asked, settings in tried["paper"]:
        assert (settings.lisa_state, asked.optim) == ("reset_all", fallback.optim or "adamw_torch_fused")
        assert {name: getattr(settings, name) for name in fallback.settings} == fallback.settings, fallback.name
    assert [fallback for fallback, *_ in tried["adapters"]] == [
        one for one in FALLBACKS if (one.optim or one.offloads) and "lisa_always_on" not in one.settings
    ]
    for fallback, asked, settings in tried["adapters"]:
        assert (settings.lisa_master == "bf16_sr") == (asked.optim == "lisa_adamw") == (not fallback.offloads), (
            fallback.name
        )
        assert (settings.lisa_activated_layers, settings.lisa_adapters) == (0, 32)


def test_full_training_is_called_so(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    main(["--model", tiny, "--gpu_memory", "4GiB", "--lisa_activated_layers", "6", "--recipe", str(path)])
    assert "lisa_activated_layers: 6            # of 6 decoder layers, which are all: full training" in path.read_text()


@pytest.mark.parametrize(
    ("model", "task", "rate"),
    [
        ("llama3.1-8b", "sft", 2e-5),
        ("meta-llama/Llama-3.1-8B-Instruct", "sft", 1e-5),
        ("models/Qwen3-8B", "sft", 1e-5),
        ("models/Qwen3-8B-Base", "sft", 2e-5),
        ("models/Llama-3.1-8B-Instruct/config.json", "sft", 1e-5),
        ("llama3.1-8b", "reward", 2e-5),
        ("google/gemma-2-9b-it", "dpo", 1e-6),
    ],
)
def test_the_rate_is_of_the_model_and_the_task(model, task, rate):
    config = load_model_config("llama3.1-8b")
    assert learning_rate(model, config, LisaConfig(lisa_activated_layers=2), task) == pytest.approx(rate)
    of_adapters = 2e-4 if task in ("sft", "reward") else 2e-5
    assert learning_rate(model, config, LisaConfig(), task) == pytest.approx(of_adapters)


def test_settings_that_are_given_stay(tiny):
    arguments = InitArguments(tiny, gpu_memory="4GiB")
    chosen = choose(arguments, LisaConfig(lisa_activated_layers=4))
    assert chosen.lisa_config == LisaConfig(lisa_activated_layers=4)
    assert not any(chosen.plan.lacks(arguments))
    with pytest.raises(UserError, match="nothing fits"):
        choose(InitArguments(tiny, gpu_memory="1GiB"), LisaConfig.plain(lisa_offload="embed,head"))


@pytest.mark.parametrize("form", ["16", "fp8"])
def test_frozen_layers_on_the_host_are_in_the_recipe(tiny, tmp_path, form):
    flags = ["--lisa_offload", "frozen", "--lisa_frozen_bits", form]
    main(["--model", tiny, "--gpu_memory", "4GiB", *flags, "--recipe", str(tmp_path / "one.yaml")])
    recipe = yaml.safe_load((tmp_path / "one.yaml").read_text())
    assert (recipe["lisa_offload"], str(recipe.get("lisa_frozen_bits", 16))) == ("frozen", form)


def test_no_rung_changes_what_is_given(tiny):
    """With moments of layers in 8 bits and too little memory for that alone, blocks are sampled: their bits stay."""
    given = {"lisa_state_bits": "layers=8", "lisa_activated_layers": 1}
    common = {"model": tiny, "reserve": "0", "seq_length": 512, "checkpointed_layers": "all"}
    config = load_model_config(tiny)
    peaks = [
        min(
            one.gpu.needed
            for one in make_plans(config, InitArguments(**common), LisaConfig.plain(**settings), ["zero2"])
        )
        for settings in (given, given | {"lisa_always_on": "rest"})
    ]
    assert peaks[1] < peaks[0]
    chosen = choose(InitArguments(**common, gpu_memory=f"{peaks[1]}B"), LisaConfig.plain(**given))
    assert chosen.lisa_config == LisaConfig(**given, lisa_always_on="rest")


def test_shipped_models_have_their_place_on_the_hub():
    assert sorted(HUB_IDS) == shipped_model_configs()


@pytest.mark.parametrize(
    "value",
    [
        "a: b",
        "a #b",
        "null",
        "2024-01-01",
        "yes",
        "1:30",
        "1e5",
        "",
        '"',
        "{a: 1}",
        "a\nb",
        "\u2028",
        "x" * 200,
    ],
)
def test_a_recipe_gives_back_what_it_was_given(tiny, tmp_path, value):
    path = tmp_path / "recipe.yaml"
    given = {"dataset_name": value or "x", "output_dir": str(tmp_path / (value[:20] or "x"))}
    words = [f"--{name}={one}" for name, one in given.items()]
    main(["--model", tiny, "--gpu_memory", "4GiB", "--recipe", str(path), *words])
    recipe = yaml.safe_load(path.read_text())
    assert {name: recipe[name] for name in given} == given
    config = parse_arguments(["--config", str(path)])
    assert config.data.dataset_name == [given["dataset_name"]]
    assert config.training.output_dir == given["output_dir"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        full(
            ["--model", "TINY", "--gpu_memory", "1GiB", "--checkpointed_layers", "all"],
            "--gpu_memory 1GiB on 1 GPU(s): nothing fits beside the 1.50GiB of each that are kept for CUDA",
        ),
        (["--model", "llama2-7b", "--method", "lora"], "--method lora: init writes recipes of LISA"),
        (["--model", "llama2-7b", "--json", "plans.json"], "--json plans.json: it is for lisa-dist plan"),
        (["--model", "no-such-model"], "--model no-such-model: no such folder"),
        (["--model", "llama2-7b", "--recipe", __file__], f"--recipe {__file__}: is there already"),
        (["--model", "llama2-7b", "--gpu_memry", "24GiB"], "--gpu_memry: no such flag; did you mean --gpu_memory?"),
    ],
)
def test_what_cannot_be_done_is_one_line(tiny, flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main([tiny if word == "TINY" else word for word in flags])
    assert ended.value.code == 2
    assert f"lisa-dist init: {said}" in capsys.readouterr().out


LAYERS = ["--lisa_activated_layers", "3"]


@pytest.mark.parametrize(
    ("rows", "flags", "interval", "said"),
    [
        (3000, LAYERS, 20, "10 periods in 184 steps; 6 of 6 layers"),
        (300, ["--lisa_activated_layers", "2"], 5, "4 periods in 19 steps; 4.8 of 6 layers"),
        (800, LAYERS, 16, "4 periods in 49 steps; 5.6 of 6 layers"),
        (100, LAYERS, 5, "2 periods in 7 steps; 4.5 of 6 layers"),  # 1 would be better, but has no momentum
        (100, [*LAYERS, "--lisa_interval_steps", "20"], 20, "1 period in 7 steps; 3 of 6 layers"),
        (100, ["--lisa_preset", "paper"], 20, "1 period in 7 steps; 2 of 6 layers"),
        (100, [*LAYERS, "--lisa_sampler", "reshuffle"], 6, "2 periods in 7 steps; 6 of 6 layers"),
    ],
)
def test_k_is_chosen_by_the_rows_of_a_local_file(tiny, tmp_path, capsys, rows, flags, interval, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * rows)
    main(["--model", tiny, "--gpu_memory", "4GiB", "--dataset_name", str(path), *flags])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lisa_interval_steps: "))
    assert re.match(rf"lisa_interval_steps: {interval} +# {re.escape(said)}", line), line


def test_k_is_20_where_rows_are_not_counted(tiny, tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("a text\n" * 9)
    for name in (str(tmp_path / "rows.txt"), "openai/gsm8k"):
        main(["--model", tiny, "--gpu_memory", "4GiB", "--dataset_name", name, *LAYERS])
        assert "\nlisa_interval_steps: 20\n" in capsys.readouterr().out
