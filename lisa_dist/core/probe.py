"""What each layer is worth, found by trying (`--lisa_probe_steps`): before a run's first step some layers at a time
train for a few steps from the same weights, and the held-out loss after each try sets the sampling weights.

The decoder is cut into up to 8 stretches of neighbouring layers, and of each the layers in the middle are tried, at
most gamma of them, so that a try needs no more of a device's memory than a step of the run. Copies of the weights that
it trains are on the host meanwhile; at its end they are put back, bit for bit.

Norms of gradients may rank layers otherwise than long runs that train them do, where the held-out loss after some steps
ranks them alike: docs/comparing.md has what was measured. The batches are the same for all tries, and scores are told
from noise by how held-out batches differ among themselves: where stretches differ no more, layers stay alike.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
from torch import distributed as dist

from lisa_dist.core.controller import LisaController
from lisa_dist.core.importance import weights_of_scores
from lisa_dist.core.sampling import ActiveSet
from lisa_dist.errors import UserError
from lisa_dist.zero.parameters import is_partitioned
from lisa_dist.zero.stage3 import drop_prefetched

MOST_STRETCHES = 8
COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of DeepSpeed's engine


@dataclass(frozen=True)
class Stretch:
    """Neighbouring decoder layers, and those of them that are tried for all."""

    layers: range
    tried: range


def stretches(num_layers: int, num_active: int) -> list[Stretch]:
    """The stretches of a model, all with as many layers tried: at most `num_active`."""
    count = min(MOST_STRETCHES, num_layers)
    width = min(num_active, num_layers // count)
    cuts = [number * num_layers // count for number in range(count + 1)]
    firsts = [begin + (end - begin - width) // 2 for begin, end in itertools.pairwise(cuts)]
    return [
        Stretch(range(begin, end), range(first, first + width))
        for (begin, end), first in zip(itertools.pairwise(cuts), firsts, strict=True)
    ]


def probe_layers(
    lisa: LisaController, train_step: Callable[[int], object], held_out_losses: Callable[[], Sequence[float]]
) -> list[float]:
    """Set the layers' sampling weights by what training them does; returns each stretch's held-out loss.

    Call it before the first step, on all ranks. `train_step(step)` takes an optimizer step of the engine, without
    `on_step_begin`, on this rank's share of a batch: of the same batch whenever it gets the same number, which is below
    --lisa_probe_steps. `held_out_losses()` gives this rank's losses of at least two batches that are not trained on,
    always the same. Weights, counts of steps and what the optimizer knows are left as they were; random generators are
    not.

    Raises ValueError without --lisa_probe_steps, after the first step, and for losses of which there are too few or
    that are not finite; the engine is then to be thrown away.
    """
    engine, config = lisa.engine, lisa.config
    if not config.lisa_probe_steps:
        raise UserError("probe_layers: the settings have no lisa_probe_steps; give a number of steps, such as 10.")
    if engine.global_steps or lisa.records:
        raise UserError(f"probe_layers: {engine.global_steps} steps are over; layers are probed before the first.")
    losses: list[list[float]] = []
    for stretch in stretches(len(lisa.blocks.layers), config.lisa_activated_layers):
        with _leaving_no_trace(lisa, ActiveSet(tuple(stretch.tried))):
            for step in range(config.lisa_probe_steps):
                lisa.period = step // config.lisa_interval_steps  # or a switch would seem to be missed
                train_step(step)
                lisa.check_finite()
            losses.append(_mean_of_ranks(held_out_losses(), engine.device))
        _check_losses(losses[-1], stretch, config.lisa_probe_steps)
    lisa.sample_by(_by_layer(lisa, scores(losses)))
    return [sum(of_batches) / len(of_batches) for of_batches in losses]


def _check_losses(losses: Sequence[float], stretch: Stretch, probe_steps: int) -> None:
    flag = f"--lisa_probe_steps {probe_steps}"
    if len(losses) < 2:
        raise UserError(f"{flag}: stretches are compared by two held-out batches or more, and there is {len(losses)}.")
    if not all(map(math.isfinite, losses)):
        first, last = stretch.tried[0], stretch.tried[-1]
        raise UserError(
            f"{flag}: after steps of layers {first} to {last} the held-out loss is {sum(losses) / len(losses)}; lower "
            "the learning rate, or look at the held-out examples."
        )


@contextlib.contextmanager
def _leaving_no_trace(lisa: LisaController, active: ActiveSet) -> Iterator[None]:
    """Let these layers train; afterwards weights, counts and rates are what they were, and no moments are left."""
    engine, optimizer = lisa.engine, lisa.partitions.optimizer
    counts = {name: getattr(engine, name) for name in COUNTS}
    scheduler, engine.lr_scheduler = engine.lr_scheduler, None
    rates, counters = [group["lr"] for group in optimizer.param_groups], lisa.partitions.counters()
    lisa.activate_from_weights(active)
    trained = [list(block.parameters.values()) for block in lisa.selection.trained(active)]
    kept = []
    for parameters in trained:  # one block at a time is whole under ZeRO-3, and rank 0 keeps it for all
        with deepspeed.zero.GatheredParameters(parameters):
            kept.append([one.detach().to("cpu", copy=True) for one in parameters if _keeps(one)])
    try:
        yield
    finally:  # what is this rank's own; after an error the weights stay as they are
        vars(engine).update(counts)
        engine.lr_scheduler, lisa.period = scheduler, 0
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    drop_prefetched(engine)
    for parameters, weights in zip(trained, kept, strict=True):
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
            for one, weight in zip(filter(_keeps, parameters), weights, strict=True):
                one.copy_(weight)
    lisa.partitions.load_counters(counters)


def _keeps(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank keeps a parameter that is whole now."""
    return dist.get_rank() == 0 or not is_partitioned(parameter)


def _by_layer(lisa: LisaController, found: Sequence[float]) -> list[float]:
    """Weights of layers by the scores of their stretches, rank 0's."""
    config = lisa.config
    cut = stretches(len(lisa.blocks.layers), config.lisa_activated_layers)
    of_layers = [score / config.lisa_importance_temperature for stretch, score in zip(cut, found, strict=True)
                 for _ in stretch.layers]  # fmt: skip
    weights = weights_of_scores(of_layers, config.lisa_importance_floor)
    message = torch.tensor(weights, dtype=torch.float64, device=lisa.engine.device)
    dist.broadcast(message, src=0)
    return message.tolist()


def scores(losses: Sequence[Sequence[float]]) -> list[float]:
    """How much better than the mean each stretch is, in standard deviations of stretches, less what is noise.

    `losses` has a row of batches' losses for each stretch. What all J stretches share of a batch is taken off; what is
    left of a stretch's batches around their mean is noise, of variance e in the mean. The mean over stretches that was
    taken off has 1/J of it, for which e is made larger by J / (J - 1). Of the variance s^2 of the stretches' means the
    part e is noise too, and scores are shrunk to max(0, 1 - e / s^2) of theirs.

    Source: James and Stein, "Estimation with quadratic loss", 1961, the positive part.
    """
    table = torch.tensor(losses, dtype=torch.float64)
    better = table.mean(dim=0) - table
    means = better.mean(dim=1)
    if len(means) < 2 or not (spread := means.var().item()):
        return [0.0] * len(means)
    noise = (better.var(dim=1) / better.shape[1]).mean().item() * len(means) / (len(means) - 1)
    return (means / math.sqrt(spread) * max(0.0, 1 - noise / spread)).tolist()


def _mean_of_ranks(losses: Sequence[float], device: torch.device) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()
