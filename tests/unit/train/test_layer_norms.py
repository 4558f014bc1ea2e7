"""Norms of blocks against whole copies of the weights, on any stage, and of adapters against peft's own merge."""

import copy
import csv
import json
import re
from pathlib import Path

import deepspeed
import pytest
import torch
from cells import full
from datasets import Dataset
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from models import save_tiny_llama, tiny_gpt2, tiny_llama, token_batches
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from runs import ROOT, run_alone
from torch import distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from lisa_dist import LisaConfig, LisaMixin, cli
from lisa_dist.run.arguments import RunArguments
from lisa_dist.run_folder import write_run
from lisa_dist.train.layer_norms import LayerNorms
from lisa_dist.zero.parameters import local_shard

STEPS, RATE = 4, 1e-2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADER = ["block", "weight_norm", "update_norm", "moved_norm"]


class LisaPlain(LisaMixin, Trainer): ...


def block_of(name: str) -> str:
    """The block of a parameter of a Llama or a GPT-2, by its name in the model without adapters."""
    layer = re.search(r"\.(?:layers|h)\.(\d+)\.", f".{name}")
    if layer:
        return f"layers.{layer[1]}"
    outer = {"embed_tokens": "embed", "wte": "embed", "wpe": "embed", "lm_head": "head"}
    return next((block for part, block in outer.items() if part in name), "rest")


class Copies(TrainerCallback):
    """The weights of the whole model after each step, by block, as one vector in fp64; of adapters merged by peft."""

    def __init__(self, merged: bool = False):
        self._merged, self.seen = merged, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(self._copy(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(self._copy(model))

    def _copy(self, model) -> dict[str, torch.Tensor]:
        if self._merged:
            assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
            model = copy.deepcopy(model).double().merge_and_unload()
        named = list(model.named_parameters())
        with deepspeed.zero.GatheredParameters([one for _, one in named if hasattr(one, "ds_id")]):
            blocks = {}
            for name, parameter in named:
                blocks.setdefault(block_of(name), []).append(parameter.detach().double().view(-1).clone())
        return {block: torch.cat(parts) for block, parts in blocks.items()}

    def norms(self, every: int = 1) -> dict[str, list[float]]:
        """The columns of each block: mean weight norm, mean norm of a step, norm of all of them."""
        steps = range(every, len(self.seen), every)
        return {
            block: [
                sum(self.seen[step][block].norm().item() for step in steps) / len(steps),
                sum((self.seen[step][block] - self.seen[step - 1][block]).norm().item() for step in steps) / len(steps),
                (self.seen[-1][block] - first).norm().item(),
            ]
            for block, first in self.seen[0].items()
        }


class FilledPadding(TrainerCallback):
    """Makes what fills up the last rank's part of a parameter under ZeRO-3 large: it is no weight."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if hasattr(parameter, "ds_tensor"):
                share = parameter.ds_tensor.numel()
                parameter.ds_tensor[max(0, parameter.ds_numel - dist.get_rank() * share) :] = 1e3


def rows_to_train() -> Dataset:
    tokens = token_batches(STEPS, rows=4).flatten(0, 2).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])


def train(model, folder, kind=Trainer, every: int = 1, callbacks=(), resume=None, **settings) -> None:
    """A run of STEPS steps of four rows on all ranks together."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    own = {name: settings.pop(name) for name in ("lisa_config",) if name in settings}
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // ranks,
        "learning_rate": RATE,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    } | settings
    trainer = kind(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows_to_train(),
        callbacks=[*callbacks, LayerNorms(every)],
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)


def read(folder) -> tuple[list[str], dict[str, list[float]]]:
    with open(Path(folder) / "lisa_norms.csv", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    return header, {block: [float(value) for value in values] for block, *values in lines}


def check_against_copies(ds_config: str, method: str, folder: str) -> None:
    """On each rank, of which rank 0 compares."""
    copies = Copies()
    how = {"deepspeed": str(ROOT / "ds_configs" / f"{ds_config}.json"), "callbacks": [copies, FilledPadding()]}
    if method == "lisa":
        how |= {"kind": LisaPlain, "lisa_config": LisaConfig(lisa_interval_steps=2)}
    model = tiny_llama()
    model.score = torch.nn.Parameter(torch.ones(3))  # in rest, and padded on two ranks
    train(model, folder, every=2, **how)
    if dist.get_rank() == 0:
        header, found = read(folder)
        assert header == HEADER
        assert list(found) == ["embed", *(f"layers.{layer}" for layer in range(6)), "head", "rest"]
        expected = copies.norms(every=2)
        for block, norms in expected.items():
            assert found[block] == pytest.approx(norms, rel=1e-6), block
        still = [block for block, norms in expected.items() if norms[2] == 0]
        assert bool(still) == (method == "lisa")  # in two periods some layers have slept


@pytest.mark.usefixtures("cpu_ops")
@pytest.mark.parametrize(("ds_config", "method"), [full("zero2", "full"), full("zero3", "full"), ("zero3", "lisa")])
def test_norms_are_those_of_whole_copies(tmp_path, ds_config, method):
    run_ranks(check_against_copies, 2, ds_config, method, str(tmp_path))


def with_adapters(tied: bool, gpt2: bool = False, **settings):
    """A model with adapters whose product is large beside its weights, so that a mistake in either is seen."""
    model = tiny_gpt2(num_layers=2) if gpt2 else tiny_llama(num_layers=2, tied=tied)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM", **settings))


def product_norms(model) -> dict[str, float]:
    """The norm of what the adapters of each block add, by peft."""
    squares = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "scaling", {}):
            block = block_of(f"{name}.")
            delta = module.get_delta_weight("default").detach().double()
            squares[block] = squares.get(block, 0.0) + delta.square().sum().item()
    return {block: square**0.5 for block, square in squares.items()}


class Products(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(product_norms(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"tied": False, "target_modules": "all-linear"},
        {"tied": False, "target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
        {"tied": False, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"tied": True, "gpt2": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ],
    ids=["linear", "ends", "copies", "transposed"],
)
def test_norms_of_adapters_are_those_of_the_merged_model(tmp_path, settings):
    copies, products = Copies(merged=True), Products()
    train(with_adapters(**settings), tmp_path, callbacks=[copies, products])
    header, found = read(tmp_path)
    assert header == [*HEADER, "product_norm"]
    for block, norms in copies.norms().items():
        mean = sum(seen.get(block, 0.0) for seen in products.seen) / STEPS
        assert found[block] == pytest.approx([*norms, mean], rel=1e-4), block
    assert found["layers.0"][3] > 0
    if "modules_to_save" in settings or "embed_tokens" in settings["target_modules"]:
        assert min(found["embed"][2], found["head"][2]) > 0
    else:
        assert found["embed"][1:] == [0, 0, 0]


@pytest.mark.parametrize("at", ["embed_tokens", "lm_head"])
def test_a_tied_matrix_with_an_adapter_at_one_end_is_two(tmp_path, at):
    """There embedding and head are different matrices as they act, which no merge can write down."""
    model = with_adapters(tied=True, target_modules=["q_proj", at])
    train(model, tmp_path, learning_rate=RATE)
    _, found = read(tmp_path)
    base = model.get_base_model().model.embed_tokens
    base = (base.base_layer if at == "embed_tokens" else base).weight.detach()
    adapted, other = ("embed", "head") if at == "embed_tokens" else ("head", "embed")
    assert found[other] == pytest.approx([base.norm().item(), 0, 0, 0], rel=1e-5)
    assert found[adapted][2] == pytest.approx(product_norms(model)[adapted], rel=1e-4)
    assert found[adapted][0] > 1.01 * base.norm().item()


def train_adapters(ds_config: str, folder: str) -> None:
    model = with_adapters(tied=False, target_modules=[*LINEAR, "embed_tokens", "lm_head"], lora_dropout=0.0)
    train(model, folder, deepspeed=str(ROOT / "ds_configs" / f"{ds_config}.json"))


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_norms_of_adapters_are_the_same_on_every_stage(tmp_path):
    for ds_config in ("zero2", "zero3"):
        run_ranks(train_adapters, 2, ds_config, str(tmp_path / ds_config))
    header, whole = read(tmp_path / "zero2")
    assert header == [*HEADER, "product_norm"]
    for block, norms in read(tmp_path / "zero3")[1].items():
        assert norms == pytest.approx(whole[block], rel=1e-4), block
    assert whole["head"][3] > 0


def test_a_cut_run_leaves_what_it_has_seen(tmp_path):
    copies = Copies()

    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama(num_layers=2), tmp_path, callbacks=[copies, Cut()], save_strategy="steps", save_steps=2)
    copies.seen = copies.seen[:3]  # until the save
    _, found = read(tmp_path)
    for block, norms in copies.norms().items():
        assert found[block] == pytest.approx(norms, rel=1e-6), block


def test_a_resumed_run_begins_anew(tmp_path):
    train(tiny_llama(num_layers=2), tmp_path, save_strategy="steps", save_steps=3)
    whole, copies = read(tmp_path)[1], Copies()
    train(tiny_llama(num_layers=2), tmp_path, callbacks=[copies], resume=str(tmp_path / "checkpoint-3"))
    assert len(copies.seen) == 2
    _, found = read(tmp_path)
    for block, norms in copies.norms().items():
        assert found[block] == pytest.approx(norms, rel=1e-6), block
        assert found[block][2] < whole[block][2], block


def test_norms_of_another_run_do_not_stay(tmp_path):
    leave(tmp_path / "run", GOOD)
    write_run(tmp_path / "run", {"method": "full"}, resumes=True)
    assert (tmp_path / "run" / "lisa_norms.csv").exists()
    write_run(tmp_path / "run", {"method": "full"})
    assert not (tmp_path / "run" / "lisa_norms.csv").exists()


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--layer_norms 5: the run has 4 steps, so none would be looked at; give at"):
        train(tiny_llama(num_layers=2), tmp_path, every=5)
    with pytest.raises(ValueError, match=r"--layer_norms: .*lora_magnitude_vector.* is of an adapter whose norms are"):
        train(with_adapters(tied=False, target_modules=["q_proj"], use_dora=True), tmp_path)
    with pytest.raises(ValueError, match="--layer_norms -1: looks at every N-th step"):
        RunArguments(layer_norms=-1)
    absent = torch.nn.Parameter(torch.zeros(4))
    absent.ds_tensor = torch.zeros(2, dtype=torch.int8)
    absent.ds_tensor.status = type("Status", (), {"name": "AVAILABLE"})
    with pytest.raises(ValueError, match="keeps weights on NVMe"):
        local_shard(absent)


# The verb

GOOD = "block,weight_norm,update_norm,moved_norm\nembed,50,0.1,1\nlayers.0,2,0.5,2\nlayers.1,4,0.7,3\nrest,1,0,0\n"
LORA = (
    "block,weight_norm,update_norm,moved_norm,product_norm\nembed,50,0,0,0\nlayers.0,2,0.25,2,1.5\n"
    "layers.1,4,0.35,3,2.5\nhead,40,7,8,9\nrest,1,0,0,0\n"
)


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(cli.sys, "argv", ["lisa-dist", "norms", *map(str, words)])
    cli.main()


def leave(folder: Path, text: str, method: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "lisa_norms.csv").write_text(text)
    if method:
        (folder / "lisa_run.json").write_text(json.dumps({"method": method}))
    return folder


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    full, lora = leave(tmp_path / "a=1", GOOD, "full"), leave(tmp_path / "b", LORA, "lora")
    leave(tmp_path / "c", GOOD)
    words = [full, lora, f"wide={lora}", tmp_path / "b" / "lisa_norms.csv", tmp_path / "c"]
    call(monkeypatch, *words, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "norms.csv").read_text().splitlines()
    of_lora = [f"{label}.{name}" for label in ("lora", "wide", "lora_2") for name in (*HEADER[1:], "product_norm")]
    of_full = [f"{label}.{name}" for label in ("full", "c") for name in HEADER[1:]]
    assert lines[0] == ",".join(["block", *of_full[:3], *of_lora, *of_full[3:]])
    assert lines[2] == "layers.0," + ",".join(["2.0,0.5,2.0", *["2.0,0.25,2.0,1.5"] * 3, "2.0,0.5,2.0"])
    assert lines[4] == "head," + ",".join([",,", *["40.0,7.0,8.0,9.0"] * 3, ",,"])
    assert [line.split(",")[0] for line in lines[1:]] == ["embed", "layers.0", "layers.1", "head", "rest"]
    said = capsys.readouterr().out
    assert re.search(r"^weight norm w\(l\) +full +50 +3 +- +16\.7 +-$", said, re.M)
    assert re.search(r"^update of a step +wide +0 +0\.3 +7 +0 +23\.3$", said, re.M)
    assert re.search(r"^adapter product +lora_2 +0 +2 +9 +0 +4\.5$", said, re.M)
    assert f"wrote {tmp_path / 'out' / 'norms.csv'}" in said


def test_the_figure_has_every_run_in_every_panel(tmp_path, monkeypatch):
    runs = leave(tmp_path / "a", GOOD, "full"), leave(tmp_path / "b", LORA, "lora")
    call(monkeypatch, *runs, "--out", tmp_path / "out")
    picture = imread(tmp_path / "out" / "norms.png")[..., :3]
    assert picture.shape[:2] == (960, 1440)
    below = 60  # the legend, which has the colours too
    rows, columns = (slice(below, 500), slice(500, None)), (slice(720), slice(720, None))
    panels = [picture[row, column] for row in rows for column in columns]
    seen = [
        [int((abs(panel - to_rgb(colour)) < 0.02).all(axis=2).sum()) for panel in panels] for colour in ("C0", "C1")
    ]
    # The weights of both are the same, so that only the last can be seen, and one has no adapters.
    assert [count > 200 for count in seen[0]] == [False, True, True, False]
    assert [count > 200 for count in seen[1]] == [True] * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; give the lisa_norms.csv of a run that was trained with --layer_norms 1."),
        ("layer,norm\n0,1\n", "begins with 'layer,norm', not with block,weight_norm,update_norm,moved_norm"),
        (GOOD.splitlines()[0] + "\n", "has no decoder layer; give"),
        (GOOD.replace("50,", ""), "line 2 does not have 3 numbers"),
        (GOOD.replace("50,", "many,"), "line 2 does not have 3 numbers"),
        (GOOD.replace("50,", "nan,"), "line 2 has a norm that is negative or not finite"),
        (GOOD.replace("layers.1", "layers.0"), "line 4 begins with 'layers.0', which is not a block, or is repeated"),
        (GOOD.replace("layers.1", "layer 1"), "line 4 begins with 'layer 1', which is not a block"),
        ("\n", "is empty"),
        (GOOD.replace("layers.1,4,0.7,3\n", ""), "1 decoder layers, but 2 in"),
        (None, "there is no lisa_norms.csv in"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, text, said):
    good, bad = leave(tmp_path / "good", GOOD, "full"), tmp_path / "bad"
    bad.mkdir() if text is None else leave(bad, text)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, good, bad, "--out", tmp_path / "out")
    assert ended.value.code == 2
    line = capsys.readouterr().out
    assert line.startswith("lisa-dist norms: ")
    assert str(bad) in line
    assert said in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_words_are_named(tmp_path, monkeypatch, capsys):
    run = leave(tmp_path / "run", GOOD, "full")
    (tmp_path / "file").write_text("")
    broken = leave(tmp_path / "broken", GOOD)
    (broken / "lisa_run.json").write_text("{")
    for words, said in (
        ([run], "the following arguments are required: --out"),
        (["--out", tmp_path], "the following arguments are required: RUN"),
        ([f"a/b={run}", "--out", tmp_path], "a label may contain letters, digits, _ and - only"),
        ([f"a={run}", f"a={run}", "--out", tmp_path], "the label a is given twice"),
        ([tmp_path / "nowhere", "--out", tmp_path], "nowhere: no such file or folder."),
        ([tmp_path, "--out", tmp_path], "there is no lisa_norms.csv in"),
        ([tmp_path / "no.csv", "--out", tmp_path], "no.csv: no such file or folder."),
        ([broken, "--out", tmp_path], "lisa_run.json: cannot be read"),
        ([run, "--out", tmp_path / "file"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_run_with_the_flag_writes_norms(tmp_path, monkeypatch, capsys):
    save_tiny_llama(tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "method": "lora",
        "max_steps": 2,
        "max_length": 32,
        "report_to": "none",
        "layer_norms": 1,
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    status, said = run_alone(flags, tmp_path / "said.txt")
    assert status == 0, said[-3000:]
    call(monkeypatch, tmp_path / "out", "--out", tmp_path / "norms")
    assert re.search(r"^adapter product +lora +0 ", capsys.readouterr().out, re.M)
