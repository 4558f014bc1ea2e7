"""How do steps scale? 1 to 8 gloo ranks measured, strong and weak; 8 to 512 GPUs by a model of counted traffic.

python benchmarks/scaling.py

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
from dataclasses import asdict, replace
from pathlib import Path

import torch
from arms import FULL, LISA, Arm, Run, parsed, shrunk_config
from bench import positive, print_table, run_on_cpu, write_results
from communication import CollectiveCounter
from rank_group import RankGroup
from step_model import (
    KINDS,
    LARGE,
    PHASES,
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
from torch import distributed as dist
from traffic import CONTROL
from transformers import PretrainedConfig

from lisa_dist.config import UserError
from lisa_dist.core.live_bytes import live_tensor_bytes
from lisa_dist.ds_config import read_ds_config
from lisa_dist.memory.planner import load_model_config
from lisa_dist.memory.trace import Workload
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

    def memory(self, rows: int, length: int) -> dict[str, int]:
        """Live bytes between steps, those of states among them, and the most in a step."""
        self._rows = rows
        live = self.live_bytes()
        states = live["masters"] + live["moments"]
        return {"live": live["total"], "states": states, "peak": self.peak_bytes(length)}

    def traffic(self, length: int) -> Traffic:
        """Count a step's collectives by phase, after a warm-up."""
        self.steps(3, length)
        tokens = self._next_tokens(length)
        self.begin()
        with CollectiveCounter() as forward:
            loss = self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        with CollectiveCounter() as backward:
            self.engine.backward(loss)
        with CollectiveCounter() as step:
            self.engine.step()
        return {phase: _sent(one) for phase, one in zip(PHASES, (forward, backward, step), strict=True)}


def _sent(counter: CollectiveCounter) -> dict[str, Sent]:
    """What a phase in fp32 has sent. Raises ValueError for a collective that the model does not know."""
    kinds = [kind for kind in counter.calls if not kind.startswith(CONTROL)]
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"DeepSpeed has issued {', '.join(unknown)}; the model knows {', '.join(KINDS)}")
    return {kind: Sent(counter.calls[kind], counter.bytes[kind] / torch.float32.itemsize) for kind in kinds}


class Ranks:
    """What a rank does: it times collectives, and takes steps of one arm after another."""

    def __init__(self):
        dist.barrier()  # a rank that is ready takes away what another's start may still look for
        self._run: ScaledRun | None = None
        self._of_others = 0

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
        self._of_others = live_tensor_bytes()  # what the arms before have left
        self._run = ScaledRun(arm, config, ds_config)

    def do(self, name: str, *args):
        """Call a method of the arm."""
        return getattr(self._run, name)(*args)

    def memory(self, rows: int, length: int) -> dict[str, int]:
        """Live bytes between steps, those of states among them, and the most in a step."""
        found = self._run.memory(rows, length)
        return {name: size - (0 if name == "states" else self._of_others) for name, size in found.items()}


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
    counts, layers, found = {}, {}, {}
    for name, side in sides.items():
        pair.call("begin", *side)
        counts[name] = pair.call("do", "traffic", length)[0]
        layers[name] = pair.call("do", "get", "active_layers")[0]
    for ranks in arguments.ranks:
        with RankGroup(ranks, Ranks) as group:
            for name, side in sides.items():
                group.call("begin", *side)
                strong = measure_step(group, ranks, rows // ranks, steps, length)
                weak = strong if rows == ranks else measure_step(group, ranks, 1, steps, length)
                of_ranks = group.call("memory", 1, length)
                memory = {key: max(one[key] for one in of_ranks) for key in of_ranks[0]}
                found[name, ranks] = {"strong": strong, "weak": weak}, memory
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
        workload = Workload(length, 1, torch.float32, fused_head=False)
        plans = Memory(config, arm, workload, layers[name], on_cpu=True)
        for ranks in arguments.ranks:
            by_kind, memory = found[name, ranks]
            parts = plans.plan(ds_config, ranks)
            states = parts.always_on_states + parts.active_states
            planned = {"planned_states": states, "planned_live": parts.static, "planned_peak": parts.peak}
            for kind, point in by_kind.items():
                told = step_here(gloo, singles[name], counts[name], ranks, point["rows_a_rank"])
                of_point = {"ds_config": ds_config, "arm": arm.name, "kind": kind, "predicted": told}
                points.append(of_point | {"off": told / point["seconds"] - 1} | point | {"memory": memory | planned})
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
    return {
        phase: {
            kind: Sent(
                *(
                    size * (start + (end - start) * along)
                    for size, start, end in zip((1, scale), first[phase][kind], second[phase][kind], strict=True)
                )
            )
            for kind in first[phase]
        }
        for phase in PHASES
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
    for length in arguments.length:
        for arm in ARMS:
            workload = Workload(
                length, arguments.rows, torch.bfloat16, config.num_hidden_layers, padded=arguments.rows > 1
            )
            memory, work = Memory(config, arm, workload), work_of(config, arm, length)
            for ds_config in arguments.configs:
                for count in arguments.gpus:
                    peak = memory.plan(ds_config, count).peak
                    accumulated = max(1, arguments.batch_rows // (count * arguments.rows))
                    args = (gpus, work, counts[ds_config][arm.name], count, arguments.rows * length)
                    weak, strong = step_on_gpus(*args), step_on_gpus(*args, accumulated)
                    tokens = count * arguments.rows * length
                    about = {"ds_config": ds_config, "arm": arm.name, "length": length, "gpus": count}
                    more = {
                        "tokens_per_second": tokens / weak["seconds"],
                        "tokens_per_second_with_overlap": tokens / weak["with_overlap"],
                        "batch_seconds": strong["seconds"],
                        "batch_rows": accumulated * count * arguments.rows,
                        "peak_bytes": peak,
                        "fits": peak <= budget,
                    }
                    points.append(about | weak | more)
    return {"counted": counts, "points": points}


def gpus_of(arguments: argparse.Namespace) -> Gpus:
    """The GPUs that the flags describe."""
    return Gpus(
        arguments.flops,
        arguments.mfu,
        arguments.memory_gbs * 1e9,
        arguments.intra_gbs * 1e9,
        arguments.inter_gbs * 1e9,
        arguments.gpus_per_node,
        arguments.call_us / 1e6,
        arguments.intra_hop_us / 1e6,
        arguments.inter_hop_us / 1e6,
    )


# What is told


def apart(points: Sequence[dict]) -> list[dict]:
    """Points without those that stand for strong and weak scaling both: one row a rank is measured once."""
    return list({(one["ds_config"], one["arm"], one["ranks"], one["rows_a_rank"]): one for one in points}.values())


def tell_here(measured: dict, strong_rows: int) -> None:
    """Print points of this machine, and what follows from them."""
    points = measured["points"]
    rows = [
        [
            point["ds_config"],
            point["arm"],
            point["kind"],
            str(point["ranks"]),
            str(point["rows_a_rank"]),
            f"{point['seconds']:.3f}",
            f"{point['spread']:+.0%}",
            f"{point['predicted']:.3f}",
            f"{point['off']:+.0%}",
            f"{point['tokens_per_second']:.0f}",
            f"{1e3 * point['cpu_seconds_a_token']:.3f}",
        ]
        for point in points
    ]
    print(f"{measured['cores']} cores: more ranks than these share them, and add no speed")
    header = ["ds_config", "arm", "", "ranks", "rows a rank", "s/step", "longest", "model", "off"]
    print_table([*header, "tokens/s", "CPU ms/token"], rows)
    memory = [
        [
            *(point["ds_config"], point["arm"], str(point["ranks"])),
            *(
                f"{point['memory'][key] / 1e6:.1f}"
                for name in ("states", "live", "peak")
                for key in (name, f"planned_{name}")
            ),
        ]
        for point in points
        if point["kind"] == "weak"
    ]
    planned = [word for name in ("states", "live", "peak") for word in (f"{name} MB", "planned")]
    print_table(["ds_config", "arm", "ranks", *planned], memory)
    for ranks in sorted({point["ranks"] for point in points}):
        off = [abs(point["off"]) for point in apart(points) if point["ranks"] == ranks]
        print(f"{ranks} ranks: the model is {statistics.median(off):.0%} off (median), {max(off):.0%} at most")
    most = max(point["ranks"] for point in points)
    for name, alone in measured["single_rank"].items():
        of_ranks = {
            point["ranks"]: point["cpu_seconds_a_token"]
            for point in points
            if f"{point['ds_config']} {point['arm']}" == name and point["kind"] == "strong"
        }
        least = min(of_ranks)
        once = alone["of_a_row"] * strong_rows + alone["optimizer"]
        work = (most * alone["fixed"] + once) / (least * alone["fixed"] + once)
        told = f"{of_ranks[most] / of_ranks[least]:.2f} times those of {least}, {work:.2f} of it without communication"
        print(f"{name}, strong: CPU seconds of a token on {most} ranks are {told}")


def tell_large(arguments: argparse.Namespace, large: dict) -> None:
    """Print steps and memory of the large model, of every way that fits somewhere."""
    rows, crossings = [], []
    for name, points in curves(large["points"]).items():
        if not any(point["fits"] for point in points):
            least = min(point["peak_bytes"] for point in points) / 2**30
            crossings.append(f"{name}: fits nowhere; {least:.0f} GiB at least")
            continue
        crossing = next((str(one["gpus"]) for one in points if one["communication"] > one["compute"]), "none of these")
        crossings.append(f"{name}: communication takes more than compute from {crossing} GPUs")
        for point in points:
            seconds = (point[key] for key in ("compute", "communication", "optimizer", "seconds", "with_overlap"))
            speeds = (point["tokens_per_second"], point["tokens_per_second_with_overlap"])
            rows.append(
                [
                    *(name, str(point["gpus"])),
                    *(f"{one:.2f}" for one in seconds),
                    *(f"{one:.0f}" for one in speeds),
                    f"{point['batch_seconds']:.1f}",
                    f"{point['peak_bytes'] / 2**30:.1f}",
                    "yes" if point["fits"] else "no",
                ]
            )
    print(f"{arguments.large}, {arguments.rows} rows a GPU; without overlap, with")
    header = ["", "GPUs", "compute s", "comm. s", "AdamW s", "s/step", "with", "tokens/s", "with"]
    print_table([*header, f"s of {arguments.batch_rows} rows", "GiB", "fits"], rows)
    print("\n".join(crossings))


def curves(points: Sequence[dict]) -> dict[str, list[dict]]:
    """Points of the large model by what they have in common, in the order of GPUs."""
    found: dict[str, list[dict]] = {}
    for point in points:
        found.setdefault(f"{point['ds_config']} {point['arm']} {point['length']}", []).append(point)
    return found


def plot(measured: dict, large: dict, arguments: argparse.Namespace) -> None:
    """Above: this machine, measured and by the model. Below: the large model's steps, tokens and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    (strong, weak, memory), (seconds, tokens, peak) = figure.subplots(2, 3)
    for number, name in enumerate(measured["single_rank"]):
        color, of_name = f"C{number}", [one for one in measured["points"] if f"{one['ds_config']} {one['arm']}" == name]
        for kind, axes in {"strong": strong, "weak": weak}.items():
            of_kind = [point for point in of_name if point["kind"] == kind]
            ranks = [point["ranks"] for point in of_kind]
            axes.plot(ranks, [point["seconds"] for point in of_kind], "o-", color=color, label=name)
            axes.plot(ranks, [point["predicted"] for point in of_kind], "x--", color=color)
        for key, style in {"live": "o-", "planned_live": "x--"}.items():
            memory.plot(ranks, [point["memory"][key] / 1e6 for point in of_kind], style, color=color)
    strong.set(title=f"strong, {arguments.strong_rows} rows; {measured['cores']} cores", ylabel="seconds of a step")
    weak.set(title="weak, a row a rank; o measured, x by the model", ylabel="seconds of a step")
    memory.set(title="between steps; o measured, x planned", ylabel="MB of a rank")
    for axes in (strong, weak, memory):
        axes.set_xlabel("ranks")
        axes.set_xscale("log", base=2)
        axes.set_xticks(arguments.ranks, arguments.ranks)
    strong.legend()
    drawn = {name: points for name, points in curves(large["points"]).items() if any(one["fits"] for one in points)}
    for number, (name, points) in enumerate(drawn.items()):
        color, fitting = f"C{number}", [point for point in points if point["fits"]]
        gpus = [point["gpus"] for point in fitting]
        seconds.plot(gpus, [point["seconds"] for point in fitting], "-", color=color, label=name)
        seconds.plot(gpus, [point["with_overlap"] for point in fitting], ":", color=color)
        seconds.plot(gpus, [point["communication"] for point in fitting], "--", color=color, linewidth=0.8)
        tokens.plot(gpus, [point["tokens_per_second"] for point in fitting], "-", color=color)
        tokens.plot(gpus, [point["tokens_per_second_with_overlap"] for point in fitting], ":", color=color)
        peak.plot([one["gpus"] for one in points], [one["peak_bytes"] / 1e9 for one in points], "-", color=color)
    seconds.set(title=f"{arguments.large}, {arguments.rows} rows a GPU, where it fits", ylabel="seconds of a step")
    seconds.plot([], [], "k:", label="with overlap")
    seconds.plot([], [], "k--", linewidth=0.8, label="communication")
    seconds.legend()
    tokens.set(title="dotted: with overlap", ylabel="tokens a second", yscale="log")
    budget = parse_bytes("--gpu_memory", arguments.gpu_memory)
    peak.axhline(budget / 1e9, color="gray", linewidth=0.8)
    peak.set(title=f"planned; the line: {arguments.gpu_memory}", ylabel="GB of a GPU", yscale="log")
    for axes in (seconds, tokens, peak):
        axes.set_xlabel("GPUs")
        axes.set_xscale("log", base=2)
        axes.set_xticks(arguments.gpus, arguments.gpus)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        if axes not in (tokens, peak):
            axes.set_ylim(bottom=0)
    figure.savefig(arguments.results.with_suffix(".png"), dpi=110)


def parser() -> argparse.ArgumentParser:
    """The flags; bandwidths in 10**9 bytes a second."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--model", default="llama2-7b", help="that is measured: a shipped config, folder or hub id")
    add("--shrink", type=positive, default=16, help="its widths and vocabulary are divided by this")
    add("--num_layers", type=positive, default=8, help="of it")
    add("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    add("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    add("--strong_rows", type=int, default=8, help="rows of a strong step, of all ranks together")
    add("--small_length", type=positive, default=192, help="tokens of a row that is measured")
    add("--steps", type=positive, default=5, help="that a median is of, after a warm-up")
    add("--large", default="llama2-70b", help="whose steps are told by the model")
    add("--gpus", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    add("--rows", type=positive, default=1, help="of a GPU and micro-batch")
    add("--batch_rows", type=positive, default=512, help="of a step of constant size, in micro-batches of --rows")
    add("--length", type=positive, nargs="+", default=[2048, 4096], help="tokens of a row")
    add("--flops", type=float, default=989e12, help="peak of a GPU; the default is an H100's in bf16")
    add("--mfu", type=float, default=0.45, help="of the peak that matrix products reach")
    add("--memory_gbs", type=float, default=3350, help="of a GPU's own memory")
    add("--intra_gbs", type=float, default=450, help="of a GPU within its node and one direction; NVLink")
    add("--inter_gbs", type=float, default=50, help="of a GPU between nodes; a NIC of 400 Gb/s for each")
    add("--gpus_per_node", type=positive, default=8)
    add("--call_us", type=float, default=8.4, help="of a collective before its first hop; as NCCL has it of a ring")
    add("--intra_hop_us", type=float, default=3.4, help="of a hop within a node; the same")
    add("--inter_hop_us", type=float, default=9.6, help="of a hop between nodes; the same")
    add("--gpu_memory", default="80GB", help="of a GPU; 1 GiB of it stays free")
    add("--results", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    return made


def main() -> None:
    """Measure, tell the large model's steps, and write all of it."""
    run_on_cpu()
    made = parser()
    arguments = parsed(made)
    for name in ("flops", "mfu", "memory_gbs", "intra_gbs", "inter_gbs"):
        if getattr(arguments, name) <= 0:
            made.error(f"--{name} {getattr(arguments, name):g}: must be more than 0")
    try:
        parse_bytes("--gpu_memory", arguments.gpu_memory)
        load_model_config(arguments.large)
    except UserError as error:
        made.error(str(error).replace("--model", "--large"))
    if unfit := [ranks for ranks in arguments.ranks if arguments.strong_rows % ranks]:
        made.error(f"--strong_rows {arguments.strong_rows}: not divisible by --ranks {unfit[0]}")
    if arguments.strong_rows < 2:
        made.error(f"--strong_rows {arguments.strong_rows}: at least 2, for seconds of a row")
    with RankGroup(2, Ranks) as pair:
        measured = measure(arguments, pair)
        tell_here(measured, arguments.strong_rows)
        large = model_large(arguments, pair)
    tell_large(arguments, large)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    plot(measured, large, arguments)
    write_results(arguments.results, {"here": measured, "large": large})


if __name__ == "__main__":
    main()
