"""Do the forms of lisa_adamw learn alike, and what does each take? Losses on real data, 3 seeds; bytes of two ranks.

python benchmarks/forms.py --model stories260k-hf --dataset gsm8k/train.jsonl

Every form draws the same layers and begins from the same weights. Bytes are those of live storages, each counted once,
of weights, gradients and states of the active parameters, on both ranks together. Under ZeRO-2 every rank holds all
weights, and the whole of each gradient that its partition cuts; under ZeRO-3 everything is there once.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bench import launch, print_table, worker_parser, write_results

ALL_8 = {"lisa_state_bits": "embed=8,head=8,layers=8"}
FORMS = {
    "fp32, torch AdamW": ("float32", "adamw_torch_fused", {}),
    "bf16, torch AdamW": ("bfloat16", "adamw_torch_fused", {}),
    "bf16, bitsandbytes 8 bits": ("bfloat16", "adamw_8bit", {}),
    "fp32": ("float32", "lisa_adamw", {}),
    "bf16, fp32 master": ("bfloat16", "lisa_adamw", {}),
    "bf16, fp32 master, 8 bits": ("bfloat16", "lisa_adamw", ALL_8),
    "bf16_sr": ("bfloat16", "lisa_adamw", {"lisa_master": "bf16_sr"}),
    "bf16_sr, 8 bits": ("bfloat16", "lisa_adamw", ALL_8 | {"lisa_master": "bf16_sr"}),
}
SEEDS, STEPS, INTERVAL, ROWS, LENGTH, HELD_OUT = (0, 1, 2), 150, 10, 16, 128, 64


def worker(arguments: argparse.Namespace) -> None:
    """Train each form with each seed on this rank."""
    import deepspeed
    import torch
    from torch import distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lisa_dist
    from lisa_dist.train.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = Path(arguments.dataset).read_text(encoding="utf-8").splitlines()[: ROWS * STEPS + HELD_OUT]
    rows = [json.loads(line) for line in lines]
    ids = [tokenizer(f"{row['question']} {row['answer']}")["input_ids"][:LENGTH] for row in rows]
    ids = torch.tensor([row + [tokenizer.eos_token_id or 0] * (LENGTH - len(row)) for row in ids])
    held_out, rest = ids[:HELD_OUT], ids[HELD_OUT:]
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def mean(loss: torch.Tensor) -> float:
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        return total.item() / world_size

    figures = {}
    for form, (dtype, optim, settings) in FORMS.items():
        runs = []
        for seed in SEEDS:
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
            batches = rest[order].split(ROWS)
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype))
            if dtype == "bfloat16" and not cpu_multiplies_bf16():
                multiply_in_fp32(model)
            config = lisa_dist.LisaConfig(lisa_interval_steps=INTERVAL, lisa_seed=seed, **settings)
            engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=arguments.lr, weight_decay=0.01, optim=optim)
            losses = []
            for step in range(STEPS):
                lisa.on_step_begin()
                mine = batches[step % len(batches)].chunk(world_size)[rank]
                loss = engine(input_ids=mine, labels=mine).loss
                engine.backward(loss)
                engine.step()
                losses.append(mean(loss))
            lisa.close()
            engine.eval()
            with torch.no_grad():
                mine = held_out.chunk(world_size)[rank]
                after = mean(engine(input_ids=mine, labels=mine).loss)
            runs.append({"losses": losses, "held_out": after})
            engine.destroy()
        figures[form] = {"dtype": dtype, "optim": optim, "runs": runs, "bytes": {}}
        for stage in ("zero2", "zero3"):
            counted = bytes_of(arguments.model, stage, dtype, optim, settings, rest[rank : rank + 1])
            summed = torch.tensor(list(counted.values()))
            dist.all_reduce(summed)
            figures[form]["bytes"][stage] = dict(zip(counted, summed.tolist(), strict=True))
    if rank == 0:
        Path(arguments.folder, "figures.json").write_text(json.dumps(figures))


def bytes_of(model_path: str, stage: str, dtype: str, optim: str, settings: dict, row) -> dict[str, float]:
    """On this rank, for each active parameter: bytes of weights, of gradients that wait for a step, of states."""
    import torch
    from transformers import AutoModelForCausalLM

    import lisa_dist
    from lisa_dist.train.cpu_bf16 import cpu_multiplies_bf16, multiply_in_fp32

    def held(tensors) -> dict[int, int]:
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    if dtype == "bfloat16" and not cpu_multiplies_bf16():
        multiply_in_fp32(model)
    engine, lisa = lisa_dist.initialize(model, stage, lisa_dist.LisaConfig(**settings), optim=optim)
    active = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    for _ in range(2):
        lisa.on_step_begin()
        engine.backward(engine(input_ids=row, labels=row).loss)
        gradients = held(lisa.partitions.held_gradients())
        engine.step()
    weights = held(lisa.partitions.local_weights(parameter) for parameter in active)
    parts = [
        part for state in lisa.partition_states().values() for part in (state.master, *state.optimizer_state.values())
    ]
    states = {place: size for place, size in held(parts).items() if place not in weights}
    numel = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in active)
    engine.destroy()
    taken = {"weights": weights, "gradients": gradients, "states": states}
    return {name: sum(sizes.values()) / numel for name, sizes in taken.items()}


def plot(figures: dict, path: Path) -> None:
    """Losses, smoothed over ten steps, with the range of the seeds as a band; and how far each is from the first."""
    from matplotlib.figure import Figure

    def smooth(values: list[float]) -> list[float]:
        return [statistics.mean(values[max(0, step - 9) : step + 1]) for step in range(STEPS)]

    figure = Figure(figsize=(9, 8), layout="constrained")
    losses_axes, gaps_axes = figure.subplots(2, sharex=True)
    first = next(iter(figures.values()))["runs"]
    for form, found in figures.items():
        runs = found["runs"]
        gaps = [[mine - theirs for mine, theirs in zip(run["losses"], base["losses"], strict=True)]
                for run, base in zip(runs, first, strict=True)]  # fmt: skip
        for axes, series in ((losses_axes, [run["losses"] for run in runs]), (gaps_axes, gaps)):
            of_step = list(zip(*map(smooth, series), strict=True))
            (line,) = axes.plot([statistics.mean(values) for values in of_step], label=form, linewidth=1)
            axes.fill_between(range(STEPS), list(map(min, of_step)), list(map(max, of_step)), alpha=0.1,
                              color=line.get_color())  # fmt: skip
    losses_axes.set_ylabel("training loss, mean of ten steps")
    losses_axes.set_title(f"{len(SEEDS)} seeds, two layers active, {INTERVAL} steps a period")
    losses_axes.legend()
    gaps_axes.set_ylabel(f"difference from {next(iter(figures))}")
    gaps_axes.set_xlabel("step")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train every form on two ranks; print, draw and write what came of it."""
    parser = worker_parser(__doc__.splitlines()[0], "forms.json")
    parser.add_argument("--dataset", required=True, help="question/answer rows, .jsonl")
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()
    if arguments.folder:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = {"folder": folder, "model": arguments.model, "dataset": arguments.dataset, "lr": arguments.lr}
        launch(Path(__file__), [word for name, value in flags.items() for word in (f"--{name}", str(value))], 2)
        figures = json.loads(Path(folder, "figures.json").read_text())
    rows = []
    for form, found in figures.items():
        ends = [statistics.mean(run["losses"][-20:]) for run in found["runs"]]
        held = [run["held_out"] for run in found["runs"]]
        sizes = [" + ".join(f"{size:.2f}" for size in of_stage.values()) for of_stage in found["bytes"].values()]
        rows.append([form, *sizes, f"{statistics.mean(ends):.4f}", f"{min(ends):.4f} .. {max(ends):.4f}",
                     f"{statistics.mean(held):.4f}", f"{min(held):.4f} .. {max(held):.4f}"])  # fmt: skip
    print("bytes: of weights, gradients and states, on two ranks together, for each active parameter")
    print_table(["form", "bytes, zero2", "bytes, zero3", "last 20 steps", "seeds", "held out", "seeds"], rows)
    plot(figures, arguments.results.with_suffix(".png"))
    write_results(arguments.results, figures)


if __name__ == "__main__":
    main()
