"""The log of periods alone; and every storage that lives is counted once, and nothing that has no memory."""

import gc
import json

import pytest
import torch

from lisa_dist.core import live_bytes
from lisa_dist.core.live_bytes import live_storages, live_tensor_bytes
from lisa_dist.core.period_log import PeriodLog, PeriodRecord
from lisa_dist.run_folder import LOG_NAME


@pytest.fixture(autouse=True)
def _nothing_else_goes():
    """What other tests of this process have left would go when the garbage collector comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_views_share_a_storage_and_gradients_count():
    before = live_tensor_bytes()
    weight = torch.zeros(1000, requires_grad=True)
    view = weight.detach()[:10]
    assert live_tensor_bytes() - before == 4000
    weight.grad = torch.zeros(1000)
    assert live_tensor_bytes() - before == 8000
    assert view.untyped_storage().data_ptr() in {storage.data_ptr() for storage in live_storages()}


def test_tensors_of_a_compiler_have_no_memory():
    """They stay until the garbage collector comes by."""
    behind = torch.zeros(4)
    before = live_tensor_bytes()
    functional = torch._to_functional_tensor(behind)
    assert live_tensor_bytes() == before
    del functional


def test_nothing_is_collected_meanwhile(monkeypatch):
    collects = []
    monkeypatch.setattr(live_bytes.gc, "get_objects", lambda: collects.append(gc.isenabled()) or [])
    gc.enable()
    live_storages()
    assert collects == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        live_storages()
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()  # other tests of the process need it


def test_an_object_without_a_tensor_behind_it_has_no_bytes():
    """As torch 2.9 leaves some, now and then; a call of their methods fails."""

    def fail(_):
        raise RuntimeError("cannot call get_autograd_meta() on undefined tensor")

    before = live_tensor_bytes()
    kind = type("Undefined", (torch.Tensor,), {"device": property(fail), "is_leaf": property(fail)})
    undefined = torch.Tensor._make_subclass(kind, torch.zeros(4))
    assert live_tensor_bytes() == before
    del undefined


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"step": 0}\n{"step": 3}\n{"step": 6, "lay')
    log = PeriodLog()
    log.write_to(str(tmp_path))
    log.resumed = True
    log.open(PeriodRecord(3, 9, [0], [], 0.0, 0, 0, 0))
    log.close(10, lambda: {"live_bytes": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()] == [0, 3, 9]
