"""Which blocks a period trains: what the optimizer is built over, and policies of tied matrices."""

import pytest
from models import tiny_llama

from lisa_dist import LisaConfig
from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.core.selection import BlockSelection


def selection(tied: bool = False, **settings) -> BlockSelection:
    return BlockSelection(LisaConfig(**settings), find_blocks(tiny_llama(tied=tied), None))


def test_the_optimizer_is_built_over_a_layer_in_every_slot_and_every_sampled_block():
    rare = "embed=0.2,head=0.2"
    sampling = selection(lisa_always_on="rest", lisa_activated_layers=4, lisa_block_probability=rare)
    widest = sampling.widest(ActiveSet((1, 4), ("embed",)))
    assert widest == ActiveSet((0, 1, 2, 4), ("embed", "head"))
    assert sampling.widest(ActiveSet((0, 2, 3, 5))) == ActiveSet((0, 2, 3, 5), ("embed", "head"))


@pytest.mark.parametrize(
    "settings", [{"lisa_always_on": "embed,rest"}, {"lisa_always_on": "rest", "lisa_frozen": "head"}], ids=str
)
def test_tied_matrices_are_treated_as_one(settings):
    selection(**settings)
    with pytest.raises(ValueError, match="tied"):
        selection(tied=True, **settings)
