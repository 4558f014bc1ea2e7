"""How do steps scale? 1 to 8 gloo ranks measured, strong and weak; 8 to 512 GPUs by a model of counted traffic.

python -m benchmarks.cost.scaling

The model, and what it assumes, is in step_model.py: no second of the steps that it predicts goes into it.
"""

import argparse
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace

import torch
from torch import distributed as dist
from transformers import PretrainedConfig

from benchmarks.common.arms import FULL, LISA, Arm, Run, parse, shrunk_config
from benchmarks.common.ranks import RankGroup, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.cost.communication import CollectiveCounter
from benchmarks.cost.step_model import (
    KINDS,
    LARGE,
    SMALL,
    Gloo,
    Gpus,
    Memory,
    Sent,
    SingleRank,
    Traffic,
    blocks_of,
    step_here,
    step_on_gpus,
    work_of,
)
from benchmarks.cost.traffic import CONTROL
from benchmarks.tables.show import show
from lisa_dist.config import UserError
from lisa_dist.ds_config import read_ds_config
from lisa_dist.memory.plan import load_model_config
from lisa_dist.text import parse_bytes

ARMS = (FULL, LISA)
CONFIGS = ("zero2", "zero3")
NARROWER = 32  # is the model on which a large one's traffic is counted
# DeepSpeed's, of what depends on the size of a model and is not in every config. Elements.
DEFAULTS = {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9, "allgather_bucket_size": 5 * 10**8}
RESERVE = 2**30  # of a GPU, as `lisa-dist plan` leaves it


# What is measured


class ScaledRun(Run):
    """A rank that takes steps of any number of rows, and counts what it says to the others."""

    def measure(self, steps: int, rows: int, length: int) -> list[dict[str, float]]:
        """Seconds of the phases of some steps, and CPU seconds of this rank in each, after a warm-up."""
        self._rows = rows
        self.steps(2, length)  # DeepSpeed's stage 3 records its order in the first
        found = []
        for _ in range(steps):
            began = time.process_time()
            found.append(self.step(length))
            found[-1]["cpu"] = time.process_time() - began
        return found

    def state_bytes(self) -> int:
        """Bytes of masters and moments."""
        live = self.live_bytes()
        return live["masters"] + live["moments"]

    def traffic(self, length: int) -> Traffic:
        """Count a step's collectives, after a warm-up. Raises ValueError for one that the model does not know."""
        self.steps(3, length)
        with CollectiveCounter() as counter:
            self.step(length)
        kinds = [kind for kind in counter.calls if not kind.startswith(CONTROL)]
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"DeepSpeed has issued {', '.join(unknown)}; the model knows {', '.join(KINDS)}")
        return {kind: Sent(counter.calls[kind], counter.bytes[kind] / torch.float32.itemsize) for kind in kinds}


class Ranks:
    """What a rank does: it times collectives, and takes steps of one arm after another."""

    def __init__(self):
        dist.barrier()  # a rank that is ready takes away what another's start may still look for
        self._run: ScaledRun | None = None

    def seconds(self, kind: str, elements: int, times: int = 30) -> float:
        """Median of one collective, as DeepSpeed issues it; of `elements` in all, in fp32."""
        whole, mine = torch.zeros(elements), torch.zeros(elements // dist.get_world_size())
        tensors = {"all_reduce": (whole,), "reduce_scatter_tensor": (mine, whole)}.get(kind, (whole, mine))
        found = []
        for _ in range(times):
            dist.barrier()
            began = time.perf_counter()
            getattr(dist, kind)(*tensors)
            found.append(time.perf_counter() - began)
        return statistics.median(found[times // 5 :])

    def begin(self, arm: Arm, config: PretrainedConfig, ds_config: str | dict) -> None:
        """Have an arm in the place of the one before."""
        if self._run is not None:
            self._run.engine.destroy()
            self._run = None
            gc.collect()
        self._run = ScaledRun(arm, config, ds_config)

    def do(self, name: str, *args):
        """Call a method of the arm."""
        return getattr(self._run, name)(*args)


def calibrate_gloo(pair: RankGroup, cores: int) -> Gloo:
    """Time collectives of two ranks."""
    of_kinds = {kind: {size: max(pair.call("seconds", kind, size)) for size in (SMALL, LARGE)} for kind in KINDS}
    return Gloo.of(cores, of_kinds)


def calibrate_single(groups: Sequence[RankGroup], rows: int, steps: int, length: int) -> SingleRank:
    """Steps of single ranks, all at the same time, each on a core: of one row and of `rows`."""

    def medians(of_rows: int) -> tuple[float, float]:
        with ThreadPoolExecutor(len(groups)) as pool:  # of threads that wait; each group is told by its own
            found = list(pool.map(lambda one: one.call("do", "measure", steps, of_rows, length)[0], groups))
        taken = [step for of_group in found for step in of_group]
        computing = statistics.median(step["begin"] + step["forward"] + step["backward"] for step in taken)
        return computing, statistics.median(step["optimizer"] for step in taken)

    (one, optimizer), (many, optimizer_again) = medians(1), medians(rows)
    of_a_row = (many - one) / (rows - 1)
    return SingleRank(max(one - of_a_row, 0.0), of_a_row, (optimizer + optimizer_again) / 2)


def measure_step(group: RankGroup, ranks: int, rows: int, steps: int, length: int) -> dict[str, float]:
    """Medians of a step of all ranks: seconds of the slowest, CPU seconds of all, tokens a second."""
    found = list(zip(*group.call("do", "measure", steps, rows, length), strict=True))
    seconds = statistics.median(max(rank["step"] for rank in of_step) for of_step in found)
    cpu = statistics.median(sum(rank["cpu"] for rank in of_step) for of_step in found)
    tokens = ranks * rows * length
    return {
        "ranks": ranks,
        "rows_a_rank": rows,
        "seconds": seconds,
        "spread": max(max(rank["step"] for rank in of_step) for of_step in found) / seconds - 1,
        "tokens_per_second": tokens / seconds,
        "cpu_seconds": cpu,
        "cpu_seconds_a_token": cpu / tokens,
    }


def measure(arguments: argparse.Namespace, pair: RankGroup) -> dict:
    """All points on this machine, each with what the model says of it."""
    config = shrunk_config(arguments.model, arguments.shrink, arguments.num_layers)
    cores = len(os.sched_getaffinity(0))
    gloo = calibrate_gloo(pair, cores)
    length, steps, rows = arguments.small_length, arguments.steps, arguments.strong_rows
    sides = {f"{ds_config} {arm.name}": (arm, config, ds_config) for ds_config in arguments.configs for arm in ARMS}
    counts, found = {}, {}
    for name, side in sides.items():
        pair.call("begin", *side)
        counts[name] = pair.call("do", "traffic", length)[0]
    for ranks in arguments.ranks:
        with RankGroup(ranks, Ranks) as group:
            for name, side in sides.items():
                group.call("begin", *side)
                strong = measure_step(group, ranks, rows // ranks, steps, length)
                weak = strong if rows == ranks else measure_step(group, ranks, 1, steps, length)
                found[name, ranks] = {"strong": strong, "weak": weak}, max(group.call("do", "state_bytes"))
    singles = {}
    with contextlib.ExitStack() as stack:
        others = min(cores, max(arguments.ranks)) - 1
        alone = [stack.enter_context(RankGroup(1, Ranks)) for _ in range(1 + others)]
        for name, side in sides.items():
            for group in alone:
                group.call("begin", *side)
            singles[name] = calibrate_single(alone, rows, steps, length)
    points = []
    for name, (arm, _, ds_config) in sides.items():
        for ranks in arguments.ranks:
            by_kind, states = found[name, ranks]
            for kind, point in by_kind.items():
                predicted = step_here(gloo, singles[name], counts[name], ranks, point["rows_a_rank"])
                about = {"ds_config": ds_config, "arm": arm.name, "kind": kind, "predicted": predicted}
                points.append(
                    about | {"off": predicted / point["seconds"] - 1} | point | {"memory": {"states": states}}
                )
    return {
        "cores": cores,
        "gloo": asdict(gloo),
        "single_rank": {name: one._asdict() for name, one in singles.items()},
        "counted": counts,
        "points": points,
    }


def count_large(pair: RankGroup, model: str, arm: Arm, ds_config: str) -> Traffic:
    """The collectives of a step of a large model, counted on small ones and drawn out to its depth and widths."""
    config, checkpointed = load_model_config(model), replace(arm, checkpointed="all")
    depths, counts = depths_of(config), []
    for depth in depths:
        pair.call("begin", checkpointed, narrowed(model, NARROWER, depth), scaled_config(ds_config, NARROWER**2))
        counts.append(pair.call("do", "traffic", 16)[0])
    return drawn_out(*counts, depths, config.num_hidden_layers, NARROWER**2)


def depths_of(config: PretrainedConfig) -> tuple[int, int]:
    """Two depths from which on every further layer sends as much.

    In fewer layers there is nothing but what stage 3 keeps at the turn from forward to backward, and what trains.
    """
    kept = -(-DEFAULTS["stage3_max_reuse_distance"] // blocks_of(config).layers[0].numel)
    first = kept + LISA.config.lisa_activated_layers
    return first, first + 2


def scaled_config(ds_config: str, by: int) -> dict:
    """A shipped config whose thresholds are so many times smaller; those that are "auto" follow a model's width."""
    scaled = read_ds_config(ds_config)
    zero = DEFAULTS | scaled["zero_optimization"]
    for key, value in zero.items():
        if type(value) is int and key != "stage":
            zero[key] = value // by // 2 * 2  # DeepSpeed wants some of them even
    return scaled | {"zero_optimization": zero}


def drawn_out(first: Traffic, second: Traffic, depths: tuple[int, int], depth: int, scale: int) -> Traffic:
    """The line through two depths, at another depth, its elements times `scale`."""
    along = (depth - depths[0]) / (depths[1] - depths[0])

    def at_depth(start: float, end: float) -> float:
        return start + (end - start) * along

    return {
        kind: Sent(at_depth(one.calls, second[kind].calls), scale * at_depth(one.elements, second[kind].elements))
        for kind, one in first.items()
    }


def narrowed(model: str, by: int, num_layers: int) -> PretrainedConfig:
    """A config with every width but the number of heads divided, so that each matrix has by**2 fewer elements."""
    config = load_model_config(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.head_dim = max(2, head // by)
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        setattr(config, name, getattr(config, name) // by)
    config.num_hidden_layers = num_layers
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def model_large(arguments: argparse.Namespace, pair: RankGroup) -> dict:
    """Steps and memory of the large model for every number of GPUs."""
    gpus, config, points = gpus_of(arguments), load_model_config(arguments.large), []
    budget = parse_bytes("--gpu_memory", arguments.gpu_memory) - RESERVE
    counts = {ds: {arm.name: count_large(pair, arguments.large, arm, ds) for arm in ARMS} for ds in arguments.configs}
    length = arguments.length
    for arm in ARMS:
        memory, work = Memory(config, arm, length), work_of(config, arm, length)
        for ds_config in arguments.configs:
            for count in arguments.gpus:
                step = step_on_gpus(gpus, work, counts[ds_config][arm.name], count, length)
                about = {"ds_config": ds_config, "arm": arm.name, "length": length, "gpus": count}
                more = {"tokens_per_second": count * length / step["seconds"]}
                more["peak_bytes"] = memory.peak(ds_config, count)
                points.append(about | step | more | {"fits": more["peak_bytes"] <= budget})
    return {"counted": counts, "points": points}


def gpus_of(arguments: argparse.Namespace) -> Gpus:
    """The GPUs that the flags describe."""
    return Gpus(**{field.name: getattr(arguments, field.name) for field in fields(Gpus)})


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = parser_of(__doc__, "scaling")
    add = parser.add_argument
    add("--model", default="llama2-7b", help="that is measured: a shipped config, folder or hub id")
    add("--shrink", type=positive, default=16, help="its widths and vocabulary are divided by this")
    add("--num_layers", type=positive, default=8, help="of it")
    add("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    add("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    add("--strong_rows", type=int, default=8, help="rows of a strong step, of all ranks together")
    add("--small_length", type=positive, default=192, help="tokens of a row that is measured")
    add("--steps", type=positive, default=5, help="that a median is of, after a warm-up")
    add("--large", default="llama2-70b", help="whose steps are calculated by the model")
    add("--gpus", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    add("--length", type=positive, default=2048, help="tokens of a row, one a GPU")
    add("--gpu_memory", default="80GB", help="of a GPU; 1 GiB of it stays free")
    for field in fields(Gpus):
        add(f"--{field.name}", type=float, default=field.default, help=field.metadata["help"])
    return parser


def main() -> None:
    """Measure, calculate the large model's steps, and write all of it."""
    run_on_cpu()
    parser = make_parser()
    arguments = parse(parser)
    for field in fields(Gpus):
        if getattr(arguments, field.name) < 0 or (not getattr(arguments, field.name) and "_us" not in field.name):
            parser.error(f"--{field.name} {getattr(arguments, field.name):g}: must be more than 0")
    try:
        parse_bytes("--gpu_memory", arguments.gpu_memory)
    except UserError as error:
        parser.error(str(error))
    if unfit := [ranks for ranks in arguments.ranks if arguments.strong_rows % ranks]:
        parser.error(f"--strong_rows {arguments.strong_rows}: not divisible by --ranks {unfit[0]}")
    if arguments.strong_rows < 2:
        parser.error(f"--strong_rows {arguments.strong_rows}: at least 2, for seconds of a row")
    with RankGroup(2, Ranks) as pair:
        figures = {"here": measure(arguments, pair), "large": model_large(arguments, pair)}
    write_results(arguments.results, figures)
    show("scaling", figures)


if __name__ == "__main__":
    main()
