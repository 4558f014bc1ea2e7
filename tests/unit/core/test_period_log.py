"""The log of periods; how far weights move, against whole copies, and over a resume on other ranks and stages."""

import json

import deepspeed
import numpy
import pytest
import torch
from cases import full
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch import distributed as dist

import lisa_dist
from lisa_dist.checkpoint.resume import load_checkpoint
from lisa_dist.checkpoint.save import save_checkpoint
from lisa_dist.core.blocks import Block
from lisa_dist.core.period_log import SAMPLE, PeriodLog, PeriodRecord, _BlockSample
from lisa_dist.run_folder import LOG_NAME, MOVEMENT_LOG

INTERVAL, LR = 3, 1e-3

pytestmark = pytest.mark.usefixtures("cpu_ops")


def start(ds_config: str, output_dir: str | None = None, **settings):
    config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, **settings)
    # Its embedding and head have 32,768 elements, twice a sample; layers are measured whole under 16,384.
    model = tiny_llama(vocab_size=512)
    return lisa_dist.initialize(model, ds_config, config, lr=LR, weight_decay=0.1, output_dir=output_dir)


def weights_of_blocks(engine, lisa) -> dict[str, torch.Tensor]:
    """Each block's weights as one vector in fp64, gathered where ZeRO-3 has cut them."""
    blocks = {block.name: list(block.parameters.values()) for block in lisa.blocks if block.parameters}
    cut = [parameter for parameters in blocks.values() for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut):
        return {name: torch.cat([one.detach().view(-1).double() for one in each]) for name, each in blocks.items()}


def train(engine, lisa, until: int) -> None:
    for (tokens,) in token_batches(until, rows=4)[engine.global_steps :]:
        lisa.on_step_begin()
        rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()


def check_against_copies(ds_config: str, folder: str) -> list[dict]:
    engine, lisa = start(ds_config, folder)
    first = before = weights_of_blocks(engine, lisa)
    expected = []
    for period in range(3):
        train(engine, lisa, INTERVAL * (period + 1))
        now = weights_of_blocks(engine, lisa)
        trained = {"embed", "head", "rest", *(f"layers.{layer}" for layer in lisa.active_layers)}
        moved = {name: (now[name] - first[name]).norm().item() for name in trained}
        expected.append(
            {
                name: {
                    "update": (now[name] - before[name]).norm().item(),
                    "moved": moved[name],
                    "relative": moved[name] / first[name].norm().item(),
                }
                for name in trained
            }
        )
        before = now
    lisa.close()
    assert [line["step"] for line in lisa.movement.lines] == ([3, 6, 9] if dist.get_rank() == 0 else [])
    for line, exact in zip(lisa.movement.lines, expected, strict=dist.get_rank() == 0):
        assert line["blocks"].keys() == exact.keys()
        for name, figures in exact.items():
            assert min(figures.values()) > 0
            assert line["blocks"][name] == pytest.approx(figures, rel=1e-5 if name == "rest" else 0.03), name
    return lisa.movement.lines


def test_the_sample_of_a_large_block_has_no_period():
    """A period of the sample's would meet one of the matrix's width."""
    block = Block("embed", {"weight": torch.nn.Parameter(torch.empty(512, 4 * SAMPLE // 512))})
    (positions,) = _BlockSample(block).positions
    assert len(positions) == SAMPLE
    assert (positions // 4 == numpy.arange(SAMPLE)).all()  # one of every four
    assert len(set(numpy.diff(positions))) > 4


def test_the_norm_of_a_sample_is_that_of_the_block():
    whole = {"bias": torch.linspace(-1, 1, 7), "weight": torch.full((512, 4 * SAMPLE // 512), 0.5)}
    sample = _BlockSample(Block("embed", whole))
    expected = torch.cat([value.view(-1) for value in whole.values()]).norm().item()
    assert sample.norm(sample.of(list(whole.values()), rank=0).numpy()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ds_config", [full("zero2"), "zero3"])
def test_movement_is_that_of_whole_copies(tmp_path, ds_config):
    lines = run_ranks(check_against_copies, 2, ds_config, str(tmp_path))[0]
    written = [json.loads(line) for line in (tmp_path / MOVEMENT_LOG).read_text().splitlines()]
    assert written == lines


def run(folder: str, ds_config: str, until: int = 9, resumes: bool = False, saves: bool = False) -> list[dict]:
    engine, lisa = start(ds_config, folder)
    if resumes:
        load_checkpoint(lisa, f"{folder}/checkpoint-4")
    if saves:
        train(engine, lisa, 4)
        save_checkpoint(lisa, f"{folder}/checkpoint-4")
    train(engine, lisa, until)
    lisa.close()
    return lisa.movement.lines


@pytest.mark.parametrize(("ds_config", "ranks"), [full("zero2", 2), ("zero3", 1)])
def test_a_resumed_run_moves_from_where_the_run_began(tmp_path, ds_config, ranks):
    undisturbed = run_ranks(run, 2, str(tmp_path / "whole"), "zero2")[0]
    # A line of a period that has not ended, which the resumed run writes over.
    run_ranks(run, 2, str(tmp_path / "cut"), "zero2", 5, False, True)
    run_ranks(run, ranks, str(tmp_path / "cut"), ds_config, 9, True)
    written = [json.loads(line) for line in (tmp_path / "cut" / MOVEMENT_LOG).read_text().splitlines()]
    assert [line["step"] for line in written] == [3, 6, 9]
    for mine, theirs in zip(written, undisturbed, strict=True):
        assert mine["blocks"].keys() == theirs["blocks"].keys()
        for name, figures in theirs["blocks"].items():
            assert mine["blocks"][name] == pytest.approx(figures, rel=1e-4), (mine["step"], name)


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"step": 0}\n{"step": 3}\n{"step": 6, "lay')
    log = PeriodLog()
    log.path, log.resumed = tmp_path / LOG_NAME, True
    log.open(PeriodRecord(3, 9, [0], [], 0.0, 0, 0, 0))
    log.close(10, lambda: {"live_bytes": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()] == [0, 3, 9]
