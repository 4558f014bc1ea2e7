"""The table of overrides: complete, with tests that exist."""

import ast
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import GRADIENT_NAMES, ROW_NAMES, train_step, without
from models import tiny_llama, token_batches
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import lisa_dist
from lisa_dist import zero
from lisa_dist.errors import UserError
from lisa_dist.zero import stages, step

ROOT = Path(__file__).parents[3]
FOLDER = Path(zero.__file__).parent
# An entry begins with its names, in front of a colon, and goes on in indented lines.
ENTRIES = re.findall(r"^(\w[\w, ]*): \w+\.py.*\n((?:    .*\n)+)", zero.__doc__ or "", re.MULTILINE)
REASONS = re.compile(r"Wrong\s+without:|Peak:\s+[\d.]+\s+GiB\s+of|Counted:\s")


def overridden_names() -> set[str]:
    """Names given to `override`, and the keys of what modules give to it, read from the sources."""
    names = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}  # by `Stage.class_name`
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "override":
                names |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
            elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "replacements":
                assert isinstance(node.slice, ast.Constant)
                names.add(node.slice.value)
            elif isinstance(node, ast.Dict) and path.stem in ("step", "gradients", "embedding_rows"):
                names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return names


def test_every_override_is_in_the_table_and_has_a_reason():
    listed = [name for names, _ in ENTRIES for name in names.split(", ")]
    assert overridden_names() == set(listed)
    assert {*GRADIENT_NAMES, *ROW_NAMES} <= set(listed), "without one of these a comparison would be with itself"
    assert len(listed) == len(set(listed))
    assert [names for names, text in ENTRIES if not REASONS.search(text)] == []


def test_the_tests_of_the_table_exist():
    there = {name for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}  # fmt: skip
    for names, text in ENTRIES:
        named = set(re.findall(r"test_[a-z0-9_]+", text))
        assert named, names
        assert named <= there


class Copies(TorchDispatchMode):
    """Elements that are read and written without being computed with."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in ("aten::copy_", "aten::clone", "aten::div_"):
            self.found[name] += args[0].numel()
        return function(*args, **kwargs or {})


def copies_of_gradients(stage: str, left_out: list[str]) -> Counter:
    """Copies in the second period."""
    with without(*left_out):
        engine, lisa = lisa_dist.initialize(tiny_llama(), stage, lisa_dist.LisaConfig(lisa_interval_steps=1))
        first, last = token_batches(2, rows=2)
        train_step(engine, lisa, first)
        lisa.on_step_begin()
        loss = engine(input_ids=last[0], labels=last[0], use_cache=False).loss
        with Copies() as copies:
            engine.backward(loss)
    engine.destroy()
    return copies.found


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_gradient_of_one_rank_is_not_copied(stage):
    name = "reduce_independent_p_g_buckets_and_remove_grads"
    own, by_deepspeed = (run_ranks(copies_of_gradients, 1, stage, left_out)[0] for left_out in ([], [name]))
    assert own["aten::copy_"] == own["aten::div_"] == 0
    assert by_deepspeed["aten::copy_"] > by_deepspeed["aten::div_"] > 0
    assert own["aten::clone"] < by_deepspeed["aten::clone"]


def buckets_of_a_step(stage: str, settings: dict) -> list:
    """Whether there is a second bucket, and the weights after two periods of a step each."""
    config = lisa_dist.load_ds_config(stage, model=tiny_llama()) | settings
    model = tiny_llama().to(torch.bfloat16)
    engine, lisa = lisa_dist.initialize(model, config, lisa_dist.LisaConfig(lisa_interval_steps=1))
    for batch in token_batches(2, rows=2):
        lisa.on_step_begin()
        train_step(engine, lisa, batch)
    has_second_bucket = engine.optimizer.overlap_comm
    weights = [parameter.detach().float().sum().item() for parameter in model.parameters()]
    engine.destroy()
    return [has_second_bucket, weights]


@pytest.mark.parametrize("settings", [{}, {"data_types": {"grad_accum_dtype": "fp32"}}])
def test_one_rank_has_one_bucket(settings):
    bf16 = {"bf16": {"enabled": True}} | settings
    [(has_second_bucket, weights)] = run_ranks(buckets_of_a_step, 1, "zero2", bf16)
    assert not has_second_bucket
    [(_, without_overlap)] = run_ranks(
        buckets_of_a_step, 1, "zero2", bf16 | {"zero_optimization": {"stage": 2, "overlap_comm": False}}
    )
    assert weights == without_overlap


@pytest.mark.parametrize("clip_grad", [0.0, 0.3])
def test_the_scale_of_stage_3_is_deepspeeds(clip_grad):
    """DeepSpeed's own multiplies the gradient that it finds at the master of a sub-group."""
    master, norm = torch.nn.Parameter(torch.zeros(1)), torch.tensor(7.0)
    master.grad = torch.ones(1)
    zero3 = SimpleNamespace(loss_scale=4.0, clip_grad=clip_grad, fp32_partitioned_groups_flat=[master], device="cpu")
    stages.STAGE_3.optimizer_class.unscale_and_clip_grads(zero3, 0, norm)
    assert 0 < master.grad < 1
    assert torch.equal(step.gradient_scale(zero3, norm, master.device), master.grad)


def test_a_name_that_is_not_there_is_no_override():
    with pytest.raises(UserError, match=r"lacks object\.scaled_global_norm, which LISA needs to train under it: pip"):
        stages.override(object(), "scaled_global_norm", None)
