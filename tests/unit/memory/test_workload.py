"""What is planned of a period."""

import lisa_dist
from lisa_dist.core.selection import sampled_blocks
from lisa_dist.memory.plan import load_model_config
from lisa_dist.memory.trace import FakeRun
from lisa_dist.memory.workload import Trained, Workload, widest_periods


def test_the_worst_period_is_planned():
    config = lisa_dist.LisaConfig(lisa_always_on="rest", lisa_activated_layers=2)
    run = FakeRun(load_model_config("llama3.1-8b"), Workload(128))
    periods = widest_periods(config, run.blocks, sampled_blocks(config, run.blocks))
    assert periods == [
        Trained((0, 1), ("rest",)),
        Trained((), ("rest",), ("embed",)),  # as large as two layers and more
        Trained((), ("rest",), ("head",)),
    ]
