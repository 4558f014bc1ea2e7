"""Adapters beside LISA's layers: what they are put on, what is saved and exported of them, what they cannot be."""

import functools
import json
from pathlib import Path

import deepspeed
import peft
import pytest
import torch
from cases import full
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_tokenizer, token_batches
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

import lisa_dist
from lisa_dist.checkpoint.export import export_checkpoint
from lisa_dist.checkpoint.resume import load_checkpoint, start_from_weights
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.checkpoint.weights import write_weights
from lisa_dist.commands.export import main as export_main
from lisa_dist.core.adapters import SCALE, loads_adapter, save_config, weight_of
from lisa_dist.core.controller import LisaController
from lisa_dist.eval.model import load_model
from lisa_dist.files import read_json, write_json
from lisa_dist.run_folder import ADAPTER_FILE

RANK = 4
BATCHES = token_batches(6, rows=4)

pytestmark = pytest.mark.usefixtures("cpu_ops")


def start(ds_config: str = "zero2", model=None, dtype=torch.float32, **settings):
    settings = {"lisa_interval_steps": 2, "lisa_adapters": RANK, "lisa_debug": True} | settings
    model = (model or tiny_llama()).to(dtype)
    return lisa_dist.initialize(model, ds_config, lisa_dist.LisaConfig.plain(**settings), lr=1e-3)


def end(engine, lisa) -> None:
    lisa.close()
    engine.destroy()


def test_they_are_on_the_linear_modules_of_the_layers_alone():
    model = tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    before = torch.get_rng_state()
    settings = {"lisa_adapters": RANK, "lisa_frozen": "embed,head", "lisa_always_on": "rest"}
    lisa = LisaController(model, lisa_dist.LisaConfig.plain(**settings))
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        names == {name for block in lisa.blocks for name in block.parameters} - lisa.blocks.adapters.parameters.keys()
    )
    matrices = {name for name in names if ".layers." in name and "norm" not in name}
    assert lisa.blocks.adapters.parameters.keys() == {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{matrix}.weight" for name in matrices for matrix in "AB"
    }
    trained = {id(value) for value in model.parameters() if value.requires_grad}
    expected = [lisa.blocks.adapters, lisa.blocks.rest, *(lisa.blocks.layers[layer] for layer in lisa.active_layers)]
    assert trained == {id(value) for block in expected for value in block.parameters.values()}


def test_a_rank_may_be_above_a_matrix_s_size():
    """As in PEFT: the default rank has to suit tiny models, and mixtures whose gates have few rows."""
    model = tiny_llama()
    LisaController(model, lisa_dist.LisaConfig(lisa_adapters=33))
    assert model.model.layers[0].self_attn.k_proj.lora_A["default"].weight.shape[0] == 33


def test_a_tied_matrix_may_have_a_rate_beside_adapters():
    lisa = LisaController(tiny_gpt2(), lisa_dist.LisaConfig.plain(lisa_adapters=RANK, lisa_lr_scale="embed=1"))
    assert lisa.config.lr_scales["embed"] == 1


def test_a_mixture_has_them_beside_its_experts():
    lisa = LisaController(tiny_qwen3_moe(), lisa_dist.LisaConfig.plain(lisa_adapters=RANK))
    assert {name.split(".")[5] for name in lisa.blocks.adapters.parameters} == {"self_attn"}


def train_and_export(folder: str, ds_config: str, build, dtype: torch.dtype, settings: dict) -> dict:
    """The logits of a run, of what is exported of its checkpoint in two ways, and of its final model, on rank 0."""
    engine, lisa = start(ds_config, build(), dtype, **settings)
    for batch in BATCHES[:5]:
        train_step(engine, lisa, batch)
    root = Path(folder)
    save_checkpoint(lisa, root / "checkpoint-5")
    (root / "final").mkdir(exist_ok=True)
    write_weights(engine, lisa.blocks, root / "final", dist.get_rank() == 0)
    engine.eval()
    tokens, logits = BATCHES[5][0], {}
    with torch.no_grad():
        if lisa.frozen_layers is None:
            logits["run"] = engine(input_ids=tokens).logits.clone()
        else:
            with lisa.frozen_layers.exact():
                logits["run"] = engine(input_ids=tokens).logits.clone()
    if dist.get_rank() == 0:
        engine.module.config.save_pretrained(root / "final")
    trained = {name: value.norm().item() for name, value in full_weights(engine).items() if ".lora_B" in name}
    assert min(trained.values()) > 0
    end(engine, lisa)
    return logits


@pytest.mark.parametrize(
    ("ds_config", "build", "dtype", "settings"),
    [
        ("zero2", tiny_llama, torch.float32, {}),
        ("zero3", tiny_gpt2, torch.float32, {}),  # whose matrices are the other way round
        full("zero1", tiny_qwen3_moe, torch.float32, {}),
        full("zero2", tiny_llama, torch.bfloat16, {"lisa_frozen_bits": 4}),
    ],
)
def test_what_is_exported_computes_what_the_run_does(capsys, tmp_path, ds_config, build, dtype, settings):
    expected = run_ranks(train_and_export, 2, str(tmp_path), ds_config, build, dtype, settings)[0]["run"]
    export_checkpoint(tmp_path / "checkpoint-5", tmp_path / "merged")
    with pytest.raises(SystemExit):
        export_main(str(tmp_path / "checkpoint-5"), str(tmp_path / "kept"), "--keep")
    assert "--keep: what may come after CHECKPOINT OUT is --keep_adapter" in capsys.readouterr().out
    export_main(str(tmp_path / "checkpoint-5"), str(tmp_path / "kept"), "--keep_adapter")
    tokens, within = BATCHES[5][0], 1e-5 if dtype == torch.float32 else 0.05
    found = {}
    for name in ("merged", "kept", "final"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype).eval()
        if name == "kept":
            with torch.no_grad():
                assert (model(input_ids=tokens).logits - expected).abs().max() > within, "without its adapter"
            model = peft.PeftModel.from_pretrained(model, tmp_path / name / "adapter").eval()
        with torch.no_grad():
            found[name] = model(input_ids=tokens).logits
        torch.testing.assert_close(found[name].float(), expected.float(), rtol=0, atol=within)
    assert not (tmp_path / "merged" / "adapter").exists()


def train_and_save(folder: Path) -> dict[str, torch.Tensor]:
    engine, lisa = start()
    for batch in BATCHES[:3]:
        train_step(engine, lisa, batch)
    save_checkpoint(lisa, folder)
    weights = full_weights(engine)
    end(engine, lisa)
    return weights


def begin_from_other_folders(checkpoint: Path, saved: dict[str, torch.Tensor]) -> list[str]:
    """A run from a plain model's weights, and from those with an adapter beside them; runs of another rank."""
    for name in ("merged", "kept"):
        engine, lisa = start(model=tiny_llama(seed=9))
        start_from_weights(lisa, checkpoint.with_name(name))
        found = full_weights(engine)
        for key, value in saved.items():
            if name == "kept":
                assert torch.equal(found[key], value), key
            elif ".lora_B" in key:
                assert not found[key].any(), key
        end(engine, lisa)
    said = []
    for rank in (None, 2 * RANK):
        engine, lisa = start(model=tiny_llama(), lisa_adapters=rank)
        with pytest.raises(ValueError, match="lisa_adapters") as error:
            load_checkpoint(lisa, checkpoint)
        said.append(str(error.value))
        end(engine, lisa)
    return said


def test_a_run_begins_from_weights_with_and_without_them_and_resumes_with_their_rank(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    saved = run_ranks(train_and_save, 2, checkpoint)[0]
    for name in ("merged", "kept"):
        export_checkpoint(checkpoint, tmp_path / name, keep_adapter=name == "kept")
    said = run_ranks(begin_from_other_folders, 2, checkpoint, saved)[0]
    assert [one.split(";")[0] for one in said] == [
        f"--lisa_adapters {rank}: the run saved at step 3 had {RANK}" for rank in (None, 2 * RANK)
    ]
    config = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (RANK, 2 * RANK, False)
    places = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert not places.keys() & load_file(checkpoint / ADAPTER_FILE).keys()


def use_a_model_twice() -> None:
    model = tiny_llama()
    engine, lisa = start(model=model)
    train_step(engine, lisa, BATCHES[0])
    end(engine, lisa)
    before = full_weights(engine)
    with pytest.raises(ValueError, match=r"has adapters \(peft\)"):
        start(model=model, lisa_adapters=None)
    engine, lisa = start(model=model)
    assert all(torch.equal(value, before[name]) for name, value in full_weights(engine).items())
    train_step(engine, lisa, BATCHES[1])
    after = full_weights(engine)
    assert all(not torch.equal(after[name], before[name]) for name in lisa.blocks.adapters.parameters)
    end(engine, lisa)


def test_a_model_goes_on_with_them_in_a_second_run():
    run_ranks(use_a_model_twice, 1)


def groups_of(model) -> dict[str, list[tuple[int, ...]]]:
    of_trainer = functools.partial(Trainer.get_decay_parameter_names, None)
    lisa = LisaController(model, lisa_dist.LisaConfig.plain(lisa_adapters=RANK), of_trainer)
    return {group["lisa_group"]: [tuple(one.shape) for one in group["params"]] for group in lisa.param_groups(0.1)}


def test_a_second_run_has_the_groups_of_the_first():
    model = tiny_llama()
    first = groups_of(model)
    assert {group for group in first if group.startswith("adapters")} == {"adapters/decay"}
    assert groups_of(model) == first


def test_a_state_dict_has_them_merged(tmp_path):
    """So that whoever saves the model without us loses nothing."""
    model = tiny_llama()
    lisa = LisaController(model, lisa_dist.LisaConfig.plain(lisa_adapters=RANK))
    with torch.no_grad():
        for value in lisa.blocks.adapters.parameters.values():
            value.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    model.eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits, expected = (one(input_ids=BATCHES[0][0]).logits for one in (loaded, model))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "ends"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, {"gate_proj", "down_proj"}),
        ("qwen2_moe", {"decoder_sparse_step": 1}, {"gate_proj", "up_proj", "down_proj", "q_proj"}),
    ],
)
def test_a_mixture_has_them_on_dense_and_shared_modules_under_their_own_names(tmp_path, kind, changes, ends):
    """peft would rename those of whole models, after the experts' own; a gate of one row has none."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"vocab_size": 128, "num_hidden_layers": 2, "shared_expert_intermediate_size": 16, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes))
    linear = {
        name
        for name, one in model.model.layers.named_modules()
        if isinstance(one, torch.nn.Linear) and min(one.weight.shape) > 1
    }
    lisa = LisaController(model, lisa_dist.LisaConfig(lisa_adapters=2, lisa_activated_layers=1))
    names = {weight_of(name).removeprefix("model.layers.") for name in lisa.blocks.adapters.parameters}
    assert names == {f"{name}.weight" for name in linear}
    save_file({name: value.detach() for name, value in lisa.blocks.adapters.parameters.items()}, tmp_path / "weights")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "weights").rename(tmp_path / ADAPTER_FILE)
    save_config(model, tmp_path)
    assert loads_adapter(AutoModelForCausalLM.from_config(model.config), tmp_path) == (kind != "deepseek_v3")
    assert ends <= {name.rpartition(".")[2] for name in linear}


def save_twice(folder: Path) -> None:
    engine, lisa = start()
    train_step(engine, lisa, BATCHES[0])
    for name in ("checkpoint-1", "again"):
        save_checkpoint(lisa, folder / name)
    end(engine, lisa)


def test_two_saves_at_one_step_and_what_is_evaluated_of_them(tmp_path):
    run_ranks(save_twice, 1, tmp_path)
    one, other = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("checkpoint-1", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "merged")
    evaluated = load_model(str(tmp_path / "again"))[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(evaluated.state_dict()[name], value, rtol=0, atol=1e-6)
    plain = tmp_path / "checkpoint-1" / "adapter" / "adapter_config.json"
    state = read_json(tmp_path / "checkpoint-1" / "lisa_state.json")
    del state["files"]["adapter/adapter_config.json"]
    write_json(tmp_path / "checkpoint-1" / "lisa_state.json", state)
    with pytest.raises(ValueError, match=f"does not list {plain.relative_to(tmp_path / 'checkpoint-1')}"):
        export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "unlisted")


def train_beside_peft() -> tuple[list[float], list[float]]:
    """On a rank: losses of 20 steps with embedding, head and adapters, by LISA and by peft's `modules_to_save`."""
    tokens = torch.randint(0, 128, (2, 4, 16), generator=torch.Generator().manual_seed(5))
    batches = [tokens[step % 2] for step in range(20)]
    losses: dict[str, list[float]] = {}

    def train(engine, lisa) -> list[float]:
        return [train_step(engine, lisa, [batch]) for batch in batches]

    config = lisa_dist.LisaConfig.plain(
        lisa_activated_layers=0,
        lisa_adapters=4,
        lisa_always_on="embed,head",
        lisa_frozen="rest",
        lisa_lr_scale="embed=1,head=1,adapters=1",
    )
    model = tiny_llama()
    engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=3e-3, micro_batch_size=4)
    initial = {name: value.clone() for name, value in adapter_state(model).items()}
    losses["lisa"] = train(engine, lisa)
    lisa.close()

    ours = peft.LoraConfig(
        r=4,
        lora_alpha=4 * SCALE,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(tiny_llama(), ours)
    adapters = {name: value for name, value in adapted.named_parameters() if ".lora_" in name}
    assert len(adapters) == len(initial) > 0
    for name, value in adapters.items():
        value.data.copy_(initial[name.removeprefix("base_model.model.").replace(".default", "")])
    ds_config = lisa_dist.load_ds_config("zero2", model=adapted, micro_batch_size=4)
    trained = [value for value in adapted.parameters() if value.requires_grad]
    optimizer = lisa_dist.build_optimizer([{"params": trained, "weight_decay": 0.0}], "adamw_torch", lr=3e-3)
    engine, *_ = deepspeed.initialize(model=adapted, optimizer=optimizer, config=ds_config)
    engine.train()
    losses["peft"] = train(engine, None)
    return losses["lisa"], losses["peft"]


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapters of a model that LISA trains, by the names that peft gives them without the adapter's own."""
    found = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    return {name.replace(".default", ""): value.detach() for name, value in found.items()}


def test_adapters_with_embedding_and_head_train_as_peft_trains_them():
    """LoRA with `modules_to_save` and LISA without a sampled layer are the same method."""
    ((ours, theirs),) = run_ranks(train_beside_peft, 1)
    assert ours[-1] < ours[0] - 0.1, "it learns"
    assert ours == pytest.approx(theirs, abs=1e-4)
