"""Every storage that lives is counted once, and nothing that has no memory."""

import gc

import pytest
import torch

from lisa_dist.core import live_bytes
from lisa_dist.core.live_bytes import live_storages, live_tensor_bytes


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


def test_what_has_no_memory_is_not_counted():
    """Tensors of a compiler, until they are collected, and objects that torch 2.9 leaves without a tensor."""

    def fail(_):
        raise RuntimeError("cannot call get_autograd_meta() on undefined tensor")

    behind = torch.zeros(4)
    before = live_tensor_bytes()
    kind = type("Undefined", (torch.Tensor,), {"is_leaf": property(fail)})
    without_memory = [torch._to_functional_tensor(behind), torch.Tensor._make_subclass(kind, torch.zeros(4))]
    assert live_tensor_bytes() == before
    del without_memory


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
