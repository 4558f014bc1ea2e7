"""A resumed run goes on as if nothing had happened: N steps, resume, N steps are 2N steps, bit for bit.

Every resume begins from other initial weights than the run had, so that what is not restored is seen.
"""

import contextlib
import io
import json
import resource
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import STAGES, full
from engines import full_weights, train_step
from models import tiny_gpt2, tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.checkpoint import optimizer_states
from lisa_dist.checkpoint.folders import STATE_NAME, make_staging, rotate_checkpoints
from lisa_dist.checkpoint.resume import find_checkpoint, load_checkpoint, read_state
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.files import write_json

STEPS, INTERVAL = 8, 3
EIGHT_BITS = {"lisa_state_bits": "embed=8,head=8,layers=8"}
FACTORED = {"lisa_state_bits": "embed=factored,head=factored"}
DRAWN = {"lisa_always_on": "rest", "lisa_block_probability": "embed=0.4,head=0.4"}
ADAPTERS = {"lisa_adapters": 4}
ADAPTIVE = {"lisa_sampler": "adaptive", "lisa_activated_layers": 3}
# After the last step of a period, where the next one switches; after the first step of one; before its last.
CUTS = {"switch step": 3, "first step": 4, "last step": 5}

pytestmark = pytest.mark.usefixtures("cpu_ops")


def start(ds_config, dtype, options, model=None):
    build = tiny_gpt2 if options.get("tied") else tiny_llama
    return lisa_dist.initialize(
        (model or build()).to(dtype),
        ds_config,
        lisa_dist.LisaConfig(**{"lisa_interval_steps": INTERVAL, "lisa_debug": True} | options.get("lisa", {})),
        lr=1e-3,
        weight_decay=0.1,
        optim=options.get("optim", "adamw_torch"),
        gradient_accumulation_steps=options.get("accumulation", 1),
        max_grad_norm=options.get("clipping", 1.0),
        output_dir=options.get("output_dir"),
    )


def train(engine, lisa, until: int, options: dict, at_step=None) -> list[float]:
    """Train from the engine's step to `until`; the losses of the global batches."""
    losses = []
    batches = token_batches(STEPS, rows=4, micro_batches=options.get("accumulation", 1))
    for step in range(engine.global_steps, until):
        losses.append(train_step(engine, lisa, batches[step]))
        if at_step is not None:
            at_step(engine.global_steps)
    return losses


def everything(engine, lisa) -> dict[str, torch.Tensor]:
    """Copies of all weights, and of this rank's masters and optimizer states, those of sleeping layers included."""
    found = full_weights(engine)
    for key, state in lisa.saved_states()[0].items():
        for field, value in {"master": state.master, **state.optimizer_state}.items():
            found[f"{key}:{field}"] = torch.as_tensor(value).detach().clone()
    if lisa.selection.weights_now is not None:
        found["weights of the draw"] = torch.tensor(lisa.selection.weights_now)
    return found


def run_and_save(folder: str, ds_config: str, dtype: torch.dtype, options: dict) -> dict:
    """A run to the end that is saved at every cut on its way."""
    engine, lisa = start(ds_config, dtype, options)

    def save(step: int) -> None:
        if step == 2 and "fewer" in options:
            lisa.selection.sample_fewer(options["fewer"])
        if step in options.get("cuts", CUTS.values()):
            save_checkpoint(lisa, Path(folder) / f"checkpoint-{step}")

    return outcome_of(engine, lisa, train(engine, lisa, options.get("until", STEPS), options, save))


def resume(folder: str, cut: int, ds_config: str, dtype: torch.dtype, options: dict) -> dict:
    """The rest of that run, from a checkpoint and other initial weights."""
    build = tiny_gpt2 if options.get("tied") else tiny_llama
    engine, lisa = start(ds_config, dtype, options, build(seed=99))
    with patch.object(optimizer_states, "safe_open", wraps=optimizer_states.safe_open) as opened:
        load_checkpoint(lisa, Path(folder) / f"checkpoint-{cut}")
    outcome = outcome_of(engine, lisa, train(engine, lisa, options.get("until", STEPS), options))
    return outcome | {"opened": opened.call_count}


def outcome_of(engine, lisa, losses: list[float]) -> dict:
    outcome = {"losses": losses, "everything": everything(engine, lisa), "layers": lisa.active_layers}
    engine.destroy()
    return outcome | {"visits": lisa.visit_counts}


@pytest.mark.parametrize(
    ("ds_config", "dtype"),
    [(ds_config, torch.bfloat16) for ds_config in STAGES] + [full("zero3", torch.float32)],
)
def test_a_resumed_run_is_the_run(tmp_path, ds_config, dtype):
    check_resume(tmp_path, ds_config, dtype, {})


@pytest.mark.parametrize("cuts", [[CUTS["first step"]], full([CUTS["switch step"], CUTS["last step"]])])
@pytest.mark.parametrize(
    ("ds_config", "options"),
    [
        ("zero3", {"accumulation": 2, "tied": True, "lisa": {"lisa_state": "reset_all"}}),
        full("zero3", {"optim": "adamw_8bit"}),
        ("zero2", {"lisa": {"lisa_state": "keep", "lisa_activated_layers": 3, "lisa_state_bits": "embed=8"}}),
        full("zero3_offload", {"lisa": DRAWN | {"lisa_state": "keep", "lisa_activated_layers": 3}}),
        full("zero2", {"lisa": {"lisa_offload": "head,layers", "lisa_state": "keep", "lisa_activated_layers": 3}}),
        ("zero2", {"optim": "lisa_adamw", "lisa": EIGHT_BITS | {"lisa_offload": "rest", "lisa_state": "keep"}}),
        full("zero2", {"optim": "lisa_adamw", "lisa": EIGHT_BITS | {"lisa_master": "bf16_sr", "lisa_state": "keep"}}),
        full("zero3", {"optim": "lisa_adamw", "lisa": EIGHT_BITS | DRAWN | {"lisa_master": "bf16_sr"}}),
        full("zero2", {"optim": "lisa_adamw", "tied": True, "lisa": FACTORED}),
        ("zero3", {"optim": "lisa_adamw", "lisa": FACTORED | DRAWN | {"lisa_master": "bf16_sr", "lisa_state": "keep"}}),
        full("zero2", {"lisa": ADAPTIVE}),
        ("zero2", {"optim": "lisa_adamw", "lisa": ADAPTERS | {"lisa_frozen_bits": 4, "lisa_master": "bf16_sr"}}),
        full("zero2", {"lisa": ADAPTERS | {"lisa_frozen_bits": 8, "lisa_state": "keep"}}),
        ("zero3", {"accumulation": 2, "tied": True, "lisa": ADAPTERS | {"lisa_offload": "adapters"}}),
        ("zero2", {"lisa": {"lisa_sampler": "balanced", "lisa_lr_scale": "embed=0.5,layers=2"}}),
        full("zero3", {"lisa": {"lisa_sampler": "reshuffle", "lisa_lr_scale": "head=0.25", "lisa_state": "keep"}}),
        ("zero3", {"lisa": ADAPTIVE | {"lisa_state": "keep"}}),
    ],
)
def test_a_resumed_run_is_the_run_with(tmp_path, ds_config, options, cuts):
    check_resume(tmp_path, ds_config, torch.bfloat16, options | {"cuts": cuts})


@pytest.mark.parametrize(
    ("ds_config", "settings"),
    [("zero2_offload", {}), full("zero3_offload", {}), full("zero2_offload", DRAWN), ("zero3_offload", DRAWN)],
)
def test_a_resume_within_the_first_period_is_the_run(tmp_path, ds_config, settings):
    """All groups have stepped alike then, and the host's AdamW carries powers of the betas from step to step.

    Groups whose blocks are not sampled have placeholders, which step too.
    """
    check_resume(tmp_path, ds_config, torch.float32, {"lisa": {"lisa_interval_steps": 20} | settings, "cuts": [2, 5]})


@pytest.mark.parametrize(
    ("ds_config", "settings"),
    [
        ("zero2", {"lisa_state": "keep"}),
        full("zero2", {"lisa_frozen_bits": 8}),
        full("zero3", DRAWN),
        full("zero2_offload", {}),
        full("zero3_offload", {}),
    ],
)
def test_a_resumed_run_is_the_run_after_its_layers_were_lowered(tmp_path, ds_config, settings):
    """Between the measured step and the switch that lowers them, too; with clipping, by a norm over all groups."""
    options = {"fewer": 1, "lisa": {"lisa_activated_layers": 3} | settings, "clipping": 0.1}
    check_resume(tmp_path, ds_config, torch.bfloat16, options)


def check_resume(tmp_path, ds_config, dtype, options) -> None:
    options = options | {"until": 7}  # a step after the switch behind the last cut: all that it leaves is compared
    whole = run_ranks(run_and_save, 2, str(tmp_path), ds_config, dtype, options)
    for cut in options.get("cuts", CUTS.values()):
        resumed = run_ranks(resume, 2, str(tmp_path), cut, ds_config, dtype, options)
        for rank in (0, 1):
            assert resumed[rank]["losses"] == whole[rank]["losses"][cut:]
            assert resumed[rank]["opened"] == 1, "of as many ranks each has its own file"
            assert all(resumed[rank][name] == whole[rank][name] for name in ("layers", "visits"))
            assert resumed[rank]["everything"].keys() == whole[rank]["everything"].keys()
            for name, value in whole[rank]["everything"].items():
                assert torch.equal(value, resumed[rank]["everything"][name]), f"{name} after step {cut}, rank {rank}"


KEPT = {"lisa": {"lisa_state": "keep", "lisa_activated_layers": 3, "lisa_seed": 1}}
THEIRS, TORCHS = {"optim": "adamw_8bit", "lisa": {}}, {"optim": "adamw_torch", "lisa": {}}
LISA_ADAMW, OURS = {"optim": "lisa_adamw", "lisa": {}}, {"optim": "lisa_adamw", "lisa": EIGHT_BITS}
NO_MASTERS = {"optim": "lisa_adamw", "lisa": {"lisa_master": "bf16_sr"}}
BF16 = {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "cut", "before", "after", "tolerance"),
    [
        full({}, 5, ("zero2", 2), [("zero2", 1, {}), ("zero2", 4, {}), ("zero1", 2, {})], 1e-5),
        ({}, 5, ("zero3", 2), [("zero3", 1, {}), ("zero3", 4, {}), ("zero2", 2, {})], 1e-5),
        full({}, 5, ("zero2_offload", 4), [("zero3_offload", 2, {})], 1e-5),
        full({}, 5, ("zero1", 1), [("zero2", 2, {})], 1e-5),
        (KEPT, 5, ("zero2", 2), [("zero3", 4, {})], 1e-5),
        full(KEPT, 5, ("zero3", 2), [("zero1", 1, {})], 1e-5),
        # Quantized moments are cut anew: not bit for bit.
        full(THEIRS, 5, ("zero2", 2), [("zero2", 1, {}), ("zero3", 2, {}), ("zero2", 2, TORCHS)], 2e-3),
        # Where a period begins, other bits can be given, and another optimizer; masters whenever a run is resumed.
        full(OURS, 6, ("zero2", 2), [("zero3", 2, one) for one in (LISA_ADAMW, TORCHS, THEIRS, OURS)], 2e-3),
        full(THEIRS, 6, ("zero2", 2), [("zero3", 2, OURS)], 2e-3),
        (LISA_ADAMW | BF16, 5, ("zero2", 2), [("zero3", 2, NO_MASTERS)], 0.01),
        (NO_MASTERS | BF16, 5, ("zero2", 2), [("zero3", 2, LISA_ADAMW)], 0.01),
        full(
            BF16 | {"lisa": ADAPTERS | {"lisa_frozen_bits": 4}},
            5,
            ("zero2", 2),
            [("zero1", 1, {}), ("zero2", 4, {})],
            0.01,
        ),
        ({"lisa": ADAPTERS}, 5, ("zero2", 2), [("zero3", 1, {}), ("zero2", 4, {})], 1e-5),
    ],
)
def test_another_world_size_stage_and_form_go_on_with_the_same_losses(tmp_path, options, cut, before, after, tolerance):
    (ds_config, world_size), dtype = before, options.get("dtype", torch.float32)
    options = options | {"cuts": [cut]}
    whole = run_ranks(run_and_save, world_size, str(tmp_path), ds_config, dtype, options)[0]
    weights = dict(tiny_llama().named_parameters())
    for file in [*tmp_path.rglob(optimizer_states.state_file(0, world_size))]:
        file.with_name(optimizer_states.state_file(0, 64)).write_bytes(b"of a run of another world")
    for ds_config, world_size, changed in after:
        resumed = run_ranks(resume, world_size, str(tmp_path), cut, ds_config, dtype, options | changed)[0]
        assert resumed["losses"] == pytest.approx(whole["losses"][cut:], abs=tolerance), (ds_config, changed)
        assert resumed["layers"] == whole["layers"]
        for name in weights if tolerance == 1e-5 else ():
            found, expected = (outcome["everything"][name] for outcome in (resumed, whole))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # a step is 1e-3
    if options.get("lisa", {}).get("lisa_state") == "keep":
        forgetful = options | {"lisa": options["lisa"] | {"lisa_state": "reset"}}
        resumed = run_ranks(resume, world_size, str(tmp_path), cut, ds_config, dtype, forgetful)[0]
        assert resumed["losses"] != pytest.approx(whole["losses"][cut:], abs=1e-5), "does it matter at all?"


def test_factored_moments_go_on_on_another_world_size_and_stage(tmp_path):
    """Rows of the matrix are cut elsewhere; the losses are those of the run, and not those without the moments."""
    options = {"optim": "lisa_adamw", "tied": True, "cuts": [6], "lisa": FACTORED}
    whole = run_ranks(run_and_save, 4, str(tmp_path), "zero2", torch.float32, options)[0]
    for ds_config, world_size in (("zero3", 2), ("zero1", 1)):
        resumed = run_ranks(resume, world_size, str(tmp_path), 6, ds_config, torch.float32, options)[0]
        assert resumed["losses"] == pytest.approx(whole["losses"][6:], abs=1e-5)
    others = options | {"lisa": {}}  # where a period begins: moments of another form begin afresh
    afresh = run_ranks(resume, 2, str(tmp_path), 6, "zero2", torch.float32, others)[0]
    assert afresh["losses"][0] == pytest.approx(whole["losses"][6], abs=1e-5)
    assert afresh["losses"][1:] != pytest.approx(whole["losses"][7:], abs=1e-4)


def save_once(folder: str, model=None, steps: int = 2, ds_config: str = "zero2", output_dir=None, **settings):
    """A run of some steps, saved in checkpoint-<steps>; the engine and the controller."""
    engine, lisa = start(ds_config, torch.float32, {"lisa": settings, "output_dir": output_dir}, model)
    train(engine, lisa, steps, {})
    save_checkpoint(lisa, Path(folder) / f"checkpoint-{steps}")
    return engine, lisa


def damage_each_file(folder: str) -> list[str]:
    """What is said for each way of damaging each file of a checkpoint; the older one must be found instead."""
    engine, lisa = save_once(folder)
    train(engine, lisa, 3, {})
    newest = Path(folder) / "checkpoint-3"
    save_checkpoint(lisa, newest)
    assert find_checkpoint(folder)[0] == newest
    problems = []
    for name in sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()):
        path = newest / name
        whole = path.read_bytes()
        flipped = bytes([*whole[:-20], whole[-20] ^ 1, *whole[-19:]])
        for how, content in {"cut": whole[:-7], "empty": b"", "flip": flipped, "remove": None}.items():
            dist.barrier()
            if dist.get_rank() == 0:
                path.unlink()  # and no other checkpoint's, of which it may be a link
                if content is not None:
                    path.write_bytes(content)
            dist.barrier()
            with pytest.raises(ValueError, match=name) as error:
                load_checkpoint(lisa, newest)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert find_checkpoint(folder)[0] == newest.with_name("checkpoint-2"), (name, how)
            warning = f"warning: {newest} is passed over: {error.value}\n"
            assert printed.getvalue() == (warning if dist.get_rank() == 0 else "")
            problems.append(f"{name} {how}: {error.value}")
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(whole)
    dist.barrier()
    read_state(newest)
    engine.destroy()
    return problems


def test_every_damaged_file_is_named_and_the_older_checkpoint_found(tmp_path):
    problems, others = run_ranks(damage_each_file, 2, str(tmp_path))
    assert problems == others, "all ranks say the same"
    files = {problem.split()[0] for problem in problems}
    optimizer, model = "lisa_optimizer-00001-of-00002.safetensors", "model-00001-of-00009.safetensors"
    assert {STATE_NAME, model, "config.json", optimizer} <= files
    assert len(problems) == 4 * len(files)


def refused_checkpoints(folder: str) -> list[str]:
    engine, lisa = save_once(folder)
    short = tiny_llama()
    short.resize_token_embeddings(96)
    saved = Path(folder) / "checkpoint-2"
    state = json.loads((saved / STATE_NAME).read_text())
    said = []

    def expect(words: str, lisa, path=saved) -> None:
        before = everything(lisa.engine, lisa)
        with pytest.raises(ValueError, match=words) as error:
            load_checkpoint(lisa, path)
        for name, value in everything(lisa.engine, lisa).items():
            assert torch.equal(value, before[name]), f"{words}: {name} was changed"
        said.append(str(error.value))

    newer = Path(folder) / "newer"
    if dist.get_rank() == 0:
        shutil.copytree(saved, newer)
        del state["checksum"]
        write_json(newer / STATE_NAME, state | {"format": 99})
    dist.barrier()
    expect("has format 99, written by lisa_dist", lisa, newer)
    expect(f"{STATE_NAME} cannot be read", lisa, Path(folder) / "checkpoint-7")
    engine.destroy()
    for words, model, settings in (
        ("of a model with 6 decoder layers; this one has 5", tiny_llama(num_layers=5), {}),
        ("such as lm_head.weight is torch.float32 .128, 64., not torch.float32 .96, 64.", short, {}),
        ("--lisa_activated_layers 3 .it had 2.", tiny_llama(), {"lisa_activated_layers": 3}),
        ("--lisa_interval_steps 5 .it had 3.", tiny_llama(), {"lisa_interval_steps": 5}),
    ):
        engine, lisa = start("zero3", torch.float32, {"lisa": settings}, model)
        expect(words, lisa)
        engine.destroy()
    engine, lisa = start("zero2", torch.bfloat16, {})
    expect("is torch.float32", lisa)
    engine.destroy()
    return said


def test_checkpoints_of_other_runs_are_refused_before_anything_changes(tmp_path):
    mine, others = run_ranks(refused_checkpoints, 2, str(tmp_path))
    assert mine == others, "all ranks say the same"


def resume_with_other_settings(folder: str) -> None:
    """At the end of a period the next one may have other settings; what stays active keeps its states."""
    engine, lisa = save_once(folder, steps=6, output_dir=folder)
    before = full_weights(engine)
    kept = {key: state.master.clone() for key, state in lisa.partition_states().items()}
    engine.destroy()
    settings = {"lisa_activated_layers": 3, "lisa_interval_steps": 2, "lisa_sampler": "reshuffle"}
    options = {"lisa": settings, "output_dir": folder}
    engine, lisa = start("zero2", torch.float32, options, tiny_llama(seed=99))
    load_checkpoint(lisa, Path(folder) / "checkpoint-6")
    assert lisa.period == 3
    assert lisa.active_layers == (2, 4, 5)
    states = lisa.partition_states()
    for name, value in full_weights(engine).items():
        assert torch.equal(value, before[name]), name
    always_on, fresh = [key for key in kept if "layers" not in key[0]], states.keys() - kept
    assert len(always_on) == 3
    for key in always_on:
        assert torch.equal(states[key].master, kept[key])
        assert states[key].optimizer_state, "moments of always-on blocks go on"
    assert fresh
    assert not any(states[key].optimizer_state for key in fresh)
    assert {group["lr"] for group in engine.optimizer.param_groups} == {1e-3}, "the saved rate"
    assert len(train(engine, lisa, STEPS, {})) == 2
    lisa.close()
    moved = full_weights(engine)["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
    if dist.get_rank() == 0:
        (line,) = lisa.movement.lines
        assert line["blocks"]["embed"]["update"] == pytest.approx(moved.norm().item()), "since the resume alone"
    engine.destroy()
    dist.barrier()
    lines = (Path(folder) / "lisa_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 3, 6]


def test_other_settings_may_begin_with_a_period(tmp_path):
    run_ranks(resume_with_other_settings, 2, str(tmp_path))


def fill_disk(folder: str, largest_file: int | None) -> str:
    """The first checkpoint fits, the second does not."""
    engine, lisa = save_once(folder)
    train(engine, lisa, 3, {})
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match="could not be written") as error:
        save_checkpoint(lisa, Path(folder) / "checkpoint-3")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()  # rank 0 removes what was begun
    assert sorted(path.name for path in Path(folder).iterdir()) == ["checkpoint-2"]
    assert find_checkpoint(folder)[0] == Path(folder) / "checkpoint-2"
    train(engine, lisa, STEPS, {})  # the run can go on
    engine.destroy()
    return str(error.value)


def test_a_full_disk_keeps_the_older_checkpoint(small_disk):
    folder, largest_file = small_disk
    for said in run_ranks(fill_disk, 2, str(folder), largest_file):
        assert said.startswith(f"{folder}/checkpoint-3 could not be written (rank ")
        assert "No space left" in said or "File too large" in said


def go_back(folder: str) -> str:
    """Resume from step 2 though 4 was saved, save 2 anew and 3; which one `true` then takes."""
    engine, lisa = save_once(folder)
    train(engine, lisa, 4, {})
    save_checkpoint(lisa, Path(folder) / "checkpoint-4")
    load_checkpoint(lisa, Path(folder) / "checkpoint-2")
    train(engine, lisa, 3, {})
    if dist.get_rank() == 0:  # what killed saves and deletions leave behind
        for name in ("tmp-checkpoint-7", "tmp-deleted-checkpoint-6", "tmp-replaced-checkpoint-2"):
            shutil.copytree(Path(folder) / "checkpoint-2", Path(folder) / name)
    dist.barrier()
    save_checkpoint(lisa, Path(folder) / "checkpoint-3")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    dist.barrier()
    if dist.get_rank() == 0:  # killed between two renames, while checkpoint-3 was written anew
        (Path(folder) / "checkpoint-3").rename(Path(folder) / "tmp-replaced-checkpoint-3")
    dist.barrier()
    found, _ = find_checkpoint(folder)
    engine.destroy()
    return found.name


def test_a_run_that_went_back_goes_on_from_what_it_saved_last(tmp_path):
    assert run_ranks(go_back, 2, str(tmp_path)) == ["checkpoint-3", "checkpoint-3"]


def go_back_with_kept_states(folder: str) -> None:
    options = {"lisa": {"lisa_state": "keep", "lisa_seed": 1, "lisa_interval_steps": 1}}
    engine, lisa = start("zero2", torch.float32, options)
    train(engine, lisa, 2, {})
    save_checkpoint(lisa, Path(folder) / "checkpoint-2")
    losses = train(engine, lisa, 8, {})
    load_checkpoint(lisa, Path(folder) / "checkpoint-2")
    assert train(engine, lisa, 8, {}) == losses
    engine.destroy()


def test_a_run_that_goes_back_forgets_states_kept_since(tmp_path):
    run_ranks(go_back_with_kept_states, 2, str(tmp_path))


def test_a_rank_that_does_not_write_leaves_the_staging_folder_alone(tmp_path):
    """Another rank of the same file system may have begun to fill it."""
    staging = make_staging(tmp_path / "checkpoint-2", writes=False)
    assert not staging.exists()
    staging.mkdir()
    (staging / "model.safetensors").touch()
    make_staging(tmp_path / "checkpoint-2", writes=False)
    assert list(staging.iterdir())
    make_staging(tmp_path / "checkpoint-2", writes=True)
    assert not list(staging.iterdir())


def test_rotation_keeps_what_was_just_written_and_the_best(tmp_path):
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE_NAME).touch()
    rotate_checkpoints(tmp_path / "checkpoint-10", None)
    assert len(names()) == 5
    rotate_checkpoints(tmp_path / "checkpoint-8", 3, best=tmp_path / "checkpoint-2")
    assert names() == ["checkpoint-2", "checkpoint-6", "checkpoint-8"], "10 was left behind by a run that went back"
    for _ in range(2):
        rotate_checkpoints(tmp_path / "checkpoint-8", 1)
        assert names() == ["checkpoint-8"]
