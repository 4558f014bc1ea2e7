"""The tables of README and docs: each a function of its name, which makes its rows from benchmarks/results."""

import statistics

from benchmarks.tables import runs as of_results
from benchmarks.tables.parts import Rows, TableError, gib, loss, mib, percent, rate, table, times

# docs/choosing.md


def chosen(figures: dict, lr: float = 2e-3, **settings) -> float:
    """Mean held-out loss of an arm of choosing.py, over its seeds."""
    keys = [of_results.choosing_key({"lr": lr} | settings, seed) for seed in range(len(figures))]
    found = [figures[key]["held_out"] for key in keys if key in figures]
    if not found:
        raise TableError(f"choosing.json has no run {keys[0]}")
    return statistics.mean(found)


def side_by_side(figures: dict, arms: dict[str, dict]) -> Rows:
    """Arms of choosing.py as columns, and their losses below."""
    return [list(arms), [loss(chosen(figures, **settings), 3) for settings in arms.values()]]


@table("choosing_gamma", "choosing")
def gammas_and_rates(figures: dict) -> Rows:
    rates = (1e-3, 2e-3, 4e-3)
    rows = [
        [name, *(loss(chosen(figures, lr, lisa_activated_layers=gamma), 3) for lr in rates)]
        for gamma, name in {1: "1", 2: "2", 3: "3", 5: "5, all: full training"}.items()
    ]
    return [["gamma", *map(rate, rates)], *rows]


@table("choosing_samplers", "choosing")
def samplers(figures: dict) -> Rows:
    names = ("uniform", "reshuffle", "cyclic", "fixed")
    return side_by_side(figures, {f"`{name}`": {"lisa_sampler": name} for name in names})


@table("choosing_ends", "choosing")
def embeddings_and_head(figures: dict) -> Rows:
    sampled, frozen = {"lisa_always_on": "rest"}, {"lisa_frozen": "embed,head"}
    return side_by_side(figures, {"always trained": {}, "sampled as layers are": sampled, "frozen": sampled | frozen})


@table("choosing_cards", "cards")
def cards(figures: dict) -> Rows:
    """What init chooses, by card and model; tokens a second are by arithmetic."""
    rows = [["GPUs", "model", "layers", "layers frozen in", "ZeRO", "checkpointed", "global batch", "rate",
             "GiB of a GPU", "GiB of the host", "tokens/s, by arithmetic"]]  # fmt: skip
    for key, one in figures.items():
        gpus, model = key.split(", ")
        memory = f"{one['peak'] / 2**30:.1f}", f"{one['host'] / 2**30:.0f}" if one["host"] else "-"
        two_digits = float(f"{one['tokens_per_second']:.2g}")
        layers = f"{one['layers']} of {one['num_layers']}", f"{one['frozen_bits']} bits", f"`{one['ds_config']}`"
        settings = f"{one['checkpointed']}", f"{one['global_batch']}", rate(one["learning_rate"])
        rows.append([gpus, f"`{model}`", *layers, *settings, *memory, f"{two_digits:,.0f}"])
    return rows


# docs/kernels.md


@table("kernels_adamw", "kernels_cpu")
def adamw(figures: dict) -> Rows:
    names = {
        "lisa_adamw, fp32": "`lisa_adamw`, fp32",
        "lisa_adamw, bf16, fp32 master": "`lisa_adamw`, fp32 masters of bf16 weights",
        "lisa_adamw, bf16, fp32 master, 8 bits": "`lisa_adamw`, masters and 8 bits",
        "lisa_adamw, bf16, stochastic": "`lisa_adamw`, `bf16_sr`",
        "lisa_adamw, bf16, stochastic, 8 bits": "`lisa_adamw`, `bf16_sr` and 8 bits",
        "torch AdamW, foreach": "torch's AdamW, for-each",
        "torch AdamW, fused": "torch's AdamW, fused",
        "DeepSpeedCPUAdam": "DeepSpeedCPUAdam",
        "bitsandbytes AdamW8bit": "bitsandbytes AdamW8bit, fp32",
        "bitsandbytes AdamW8bit in bf16": "bitsandbytes AdamW8bit, bf16",
        "torchao AdamW8bit in bf16": "torchao's AdamW8bit, bf16, stochastic",
    }
    found = {one["name"]: one for one in figures["kernels"] if one["numel"] == 10**8}
    rows = [["", "ns an element", "beside the tensors"]]
    for name, shown in names.items():
        beside = found[name]["bytes_beside"]
        size = "not seen" if beside is None else mib(beside) if beside else "none"
        rows.append([shown, f"{1e9 * found[name]['seconds'] / 10**8:.1f}", size])
    return rows


@table("kernels_forms", "forms")
def forms(figures: dict) -> Rows:
    names = {
        "fp32, torch AdamW": "fp32, torch's AdamW",
        "fp32": "fp32",
        "bf16, torch AdamW": "bf16, torch's AdamW",
        "bf16, bitsandbytes 8 bits": "bf16, bitsandbytes' 8 bits",
        "bf16, fp32 master": "bf16, fp32 masters",
        "bf16, fp32 master, 8 bits": "bf16, fp32 masters, 8 bits",
        "bf16_sr": "`bf16_sr`",
        "bf16_sr, 8 bits": "`bf16_sr`, 8 bits",
    }
    rows = [["", "bytes an active parameter, ZeRO-3", "loss of the last 20 steps", "held out"]]
    for form, shown in names.items():
        sizes = " + ".join(f"{size:.2f}" for size in figures[form]["bytes"]["zero3"].values())
        ends = [statistics.mean(run["losses"][-20:]) for run in figures[form]["runs"]]
        held_out = [run["held_out"] for run in figures[form]["runs"]]
        rows.append([shown, sizes, loss(statistics.mean(ends)), loss(statistics.mean(held_out))])
    return rows


# docs/memory.md, docs/zero.md, docs/norms.md


@table("memory_smaller", "smaller", "smaller_smollm2")
def smaller_forms(llama: dict, smollm2: dict) -> Rows:
    """Of each form the peak of a step, how far its plan is off, and a switch's share of a period."""
    shown = [(name, figures, ranks) for name, figures in (("LLaMA-2-7B / 8", llama), ("SmolLM2-135M", smollm2))
             for ranks in (1, 2)]  # fmt: skip
    header = [f"{name}, {ranks} rank{'s' * (ranks > 1)}" for name, _, ranks in shown]
    rows = []
    for form in (key.partition(", ")[2] for key in llama if key.startswith("1 ranks")):
        row = [form]
        for _, figures, ranks in shown:
            cell = figures[f"{ranks} ranks, {form}"]
            off = abs(cell["planned"] / cell["peak"] - 1)
            row.append(f"{mib(cell['peak'])}, {percent(off)}, {percent(cell['share_of_period'])}")
        rows.append(row)
    return [["", *header], *rows]


@table("memory_policies", "policies")
def policies(figures: dict) -> Rows:
    names = {
        "LoRA r16": "LoRA, rank 16",
        "QLoRA r16": "QLoRA, rank 16 (by its layers' codes)",
        "LISA as published": "LISA as published: embed and head always trained",
        "LISA, always-on 8 bit": "their moments in 8 bits",
        "LISA, embed+head drawn": "embed and head sampled",
        "LISA, drawn, 8 bit": "sampled, all moments in 8 bits",
        "LISA, always on, 6 bytes": "always trained, no masters, moments in 8 bits "
        "(`--optim lisa_adamw --lisa_master bf16_sr`)",
        "LISA, factored": "the same, embed and head factored "
        "(`--lisa_state_bits embed=factored,head=factored,layers=8`)",
        "LISA, factored, frozen 8 bits": "the same, frozen layers in 8 bits (`--lisa_frozen_bits 8`)",
        "LISA, factored, frozen 4 bits": "the same, frozen layers in 4 bits",
        "LISA, drawn, 6 bytes": "embed and head sampled, no masters, moments in 8 bits",
        "LISA, states on host": "all states on the host (`--deepspeed zero2_offload`)",
        "LISA, drawn, on host": "sampled (`--lisa_always_on rest`), all states on the host "
        "(`--lisa_offload embed,head,rest,layers`)",
    }
    lengths = {"1024": "1024 tokens, 0", "4096": "4096 tokens, 0"}
    lengths |= {f"{tokens}, all checkpointed": f"{tokens} tokens, 32" for tokens in lengths}
    models = {"LLaMA-2-7B": "llama2-7b", "Llama-3.1-8B": "llama3.1-8b"}
    columns = [f"{model}, {length} checkpointed" for model in models.values() for length in lengths.values()]
    rows = [
        [shown, *(gib(figures[f"{column}, {name}"]["gpu"]["peak"]) for column in columns)]
        for name, shown in names.items()
    ]
    return [["", *(f"{model}, {length}" for model in models for length in lengths)], *rows]


SIDE_BY_SIDE = ("full", "lora r16", "lora r128", "callback", "static", "lisa")


def middle(steps: list[dict], part: str = "step") -> float:
    """Median seconds of a part of the steps of speed.py."""
    return statistics.median(step[part] for step in steps)


def ratios(of: dict, to: dict, steps: str = "steps") -> list[float]:
    """Of speed.py, two arms' steps, one over the other, round by round."""
    return [one["step"] / other["step"] for one, other in zip(of[steps], to[steps], strict=True)]


def spread(each: list[float], digits: int = 2) -> str:
    """The median, and the least and the most."""
    return f"{statistics.median(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"


def held(arm: dict) -> int:
    """Bytes of memory.py after the last switch."""
    return list(arm["live"].values())[-1]["total"]


def moved(arm: dict) -> str:
    """The share of frozen elements that have moved."""
    return "-" if arm["drift"] is None else percent(arm["drift"]["changed"] / arm["drift"]["elements"], 0)


def layers_of(arm: str) -> str:
    """What an arm of memory.py and speed.py trains, of the 32 layers of LLaMA-2-7B's shape."""
    return "32 of 32" if arm.startswith("full") else "adapters" if arm.startswith("lora") else "2 of 32"


@table("headline", "memory", "speed", "communication")
def headline(memory: dict, speed: dict, communication: dict) -> Rows:
    """What each method takes, in parts of full training."""
    bytes_held, steps = memory["zero2"], speed["zero2"]
    rows = [["% of full training, ZeRO-2, two ranks", "layers", "memory between steps", "peak of a step",
             "time of a step", "FLOPs of a step", "bytes sent", "frozen weights that move"]]  # fmt: skip
    for arm in SIDE_BY_SIDE:
        shares = (
            held(bytes_held[arm]) / held(bytes_held["full"]),
            bytes_held[arm]["peak"] / bytes_held["full"]["peak"],
            statistics.median(ratios(steps[arm], steps["full"])),
            steps[arm]["flops"] / steps["full"]["flops"],
            sent(communication, "zero2", arm),
        )
        rows.append([arm, layers_of(arm), *(percent(share, 0) for share in shares), moved(bytes_held[arm])])
    return rows


def sent(figures: dict, ds_config: str, arm: str) -> float:
    """Of communication.py, what a rank sends in a step, in parts of full training's."""
    arms = figures["counted"][ds_config]
    return arms[arm]["moments"]["step"]["wire"] / arms["full"]["moments"]["step"]["wire"]


@table("memory_held", "memory")
def memory_held(figures: dict) -> Rows:
    """Of every arm of memory.py what it holds, by what it is, and its peak beside the plan."""
    kinds = ("weights", "masters", "moments")
    rows = [["MiB of a rank", *kinds, f"all, after {last_switch(figures)} switches", "peak of a step", "its plan",
             "peak with a switch", "frozen, moved"]]  # fmt: skip
    for ds_config, of_arms in figures.items():
        for name, arm in of_arms.items():
            *_, last = arm["live"].values()
            sizes = [*(last[kind] for kind in kinds), last["total"], arm["peak"]]
            off = "-" if arm["planned"] is None else f"{100 * (arm['planned'] / arm['peak'] - 1):+.1f}%"
            row = [f"{ds_config}, {name}", *(f"{size / 2**20:.1f}" for size in sizes), off]
            with_switch = arm["peak_with_switch"]
            rows.append([*row, "-" if with_switch is None else f"{with_switch / 2**20:.1f}", moved(arm)])
    return rows


def last_switch(figures: dict) -> str:
    """After how many switches memory.py has looked last."""
    return list(next(iter(figures.values()))["lisa"]["live"])[-1]


def step_rows(of_sections: dict[str, dict]) -> Rows:
    """A row of each arm of sections of speed.py in which full training runs too."""
    rows = [["", "layers", "step s", "forward", "backward", "optimizer", "of full's step", "FLOPs of full's"]]
    for title, of_arms in of_sections.items():
        for name, arm in of_arms.items():
            parts = [f"{middle(arm['steps'], part):.2f}" for part in ("step", "forward", "backward", "optimizer")]
            of_full = spread(ratios(arm, of_arms["full"])), f"{arm['flops'] / of_arms['full']['flops']:.2f}"
            rows.append([f"{title}, {name}", layers_of(name), *parts, *of_full])
    return rows


@table("speed_steps", "speed")
def speed_steps(figures: dict) -> Rows:
    """Of every stage the arms side by side."""
    return step_rows({name: arms for name, arms in figures.items() if "callback" in arms})


@table("speed_of_static", "speed")
def speed_of_static(figures: dict) -> Rows:
    """LISA's step in parts of static's: of each stage and width, in the first period and after a switch."""
    rows = [["LISA's step, of static's", "parameters", "in the first period", "after a switch"]]
    for title, arms in figures.items():
        if "lisa" in arms:
            each = [spread(ratios(arms["lisa"], arms["static"], which), 3) for which in ("steps", "after_a_switch")]
            rows.append([title, f"{arms['lisa']['parameters'] / 1e6:.0f} M", *each])
    return rows


@table("zero_switch", "switch")
def switch(figures: dict) -> Rows:
    rows = [["", "parameters", "switch s", "step s", "of K = 20"]]
    for name, cell in figures.items():
        times = spread(cell["switch_seconds"], 3), f"{statistics.median(cell['step_seconds']):.2f}"
        share = percent(cell["share_of_period"]["20"], 2)
        rows.append([name, f"{cell['parameters'] / 1e6:.0f} M", *times, share])
    return rows


@table("scaling_70b", "scaling")
def scaling_of_a_large_model(figures: dict) -> Rows:
    """What the model says where it fits the GPUs, for the shortest rows."""
    points = figures["large"]["points"]
    shortest = min(point["length"] for point in points)
    rows = [["", "GPUs", "step s", "of it communication", "tokens a second", "GB of a GPU"]]
    for point in points:
        if point["fits"] and point["length"] == shortest and point["gpus"] in (8, 32, 128, 512):
            name, speed = f"{point['ds_config']}, {point['arm']}", f"{point['tokens_per_second']:,.0f}"
            share = percent(point["communication"] / point["seconds"], 0)
            peak = f"{point['peak_bytes'] / 1e9:.1f}"
            rows.append([name, f"{point['gpus']}", f"{point['seconds']:.2f}", share, speed, peak])
    return rows


@table("communication_step", "communication")
def communication_step(figures: dict) -> Rows:
    """Bytes of a step in parts of full training's, by DeepSpeed config."""
    counted = figures["counted"]
    rows = [["sent by a rank in a step, of full training's", "active share", *counted, "equal to the formula"]]
    for arm in SIDE_BY_SIDE:
        first, *_ = of_configs = [arms[arm] for arms in counted.values()]
        of_full = [percent(sent(figures, ds_config, arm)) for ds_config in counted]
        equal = "yes" if all(one["equal"] for one in of_configs) else "no"
        rows.append([arm, percent(first["active_share"]), *of_full, equal])
    return rows


@table("communication_70b", "communication")
def communication_of_a_large_model(figures: dict) -> Rows:
    ((title, of_stages),) = figures["by_formula_alone"].items()
    rows = [[f"GB that a rank sends in a step, {title}", "full", "LISA", "LISA with a switch in 20 steps"]]
    for ds_config, arms in of_stages.items():
        steps = [arms[arm]["wire"] / 1e9 for arm in ("full", "lisa")]
        rows.append([ds_config, *(f"{step:.2f}" for step in steps), f"{arms['lisa']['mean_of_period'] / 1e9:.2f}"])
    return rows


def times_a_layer(blocks: dict[str, dict], quantity: str, block: str) -> str:
    """How many times the median layer's norm that of embedding or head is."""
    if block not in blocks:
        return "tied"
    layer = statistics.median(norms[quantity] for name, norms in blocks.items() if name.startswith("layers."))
    return times(blocks[block][quantity] / layer)


@table("norms_ends", "norms_stories260k-hf", "norms_smollm2-135m")
def norms_of_the_ends(*models: dict) -> Rows:
    lines = {
        "weight norm, full": ("full", "weight_norm"),
        "weight norm, LoRA, merged, on the layers": ("lora", "weight_norm"),
        "weight norm, LoRA, merged, ends": ("lora_ends", "weight_norm"),
        "update of a step, full": ("full", "update_norm"),
        "update of a step, LoRA on the layers": ("lora", "update_norm"),
        "update of a step, LoRA, ends": ("lora_ends", "update_norm"),
        "moved, full": ("full", "moved_norm"),
        "moved, LoRA, ends": ("lora_ends", "moved_norm"),
        "adapter product, LoRA, ends": ("lora_ends", "product_norm"),
        "adapter product, LoRA, ends, even": ("lora_ends_even", "product_norm"),
    }
    rows = [["", "stories260K: embed", "head", "SmolLM2-135M: embed", "head"]]
    for name, (arm, quantity) in lines.items():
        ends = [(model[arm]["blocks"], block) for model in models for block in ("embed", "head")]
        rows.append([name, *(times_a_layer(blocks, quantity, block) for blocks, block in ends)])
    return rows


def of_ours(figures: dict, arm: str, quantity: str) -> list[float]:
    """An arm of peers.py relative to ours on as many ranks, round by round."""
    arms = figures["arms"]
    ours = arms.get(arms[arm]["baseline"], {"runs": []})["runs"]
    pairs = zip(arms[arm]["runs"], ours, strict=False)  # one may have ended earlier
    return [run[quantity] / ours[quantity] for run, ours in pairs]


@table("comparing_peers", "peers")
def peers(figures: dict) -> Rows:
    """Medians over the rounds; of an arm that did not run the reason."""
    rows = [["", "CPU s a step", "of ours", "MB of tensors", "of ours", "tokens, with loss", "versions"]]
    for name, arm in figures["arms"].items():
        if "not_run" in arm or not arm["runs"]:
            rows.append([name, f"not run: {arm.get('not_run', 'no round')}", *[""] * 5])
            continue
        cells = []
        for quantity, shown in (("cpu_seconds_per_step", "{:.2f}"), ("live_bytes", "{:,.0f}")):
            values = sorted(run[quantity] / (1e6 if quantity == "live_bytes" else 1) for run in arm["runs"])
            low, middle, high = (shown.format(one) for one in (values[0], statistics.median(values), values[-1]))
            cells.append(f"{middle} ({low} to {high})" if low != high else middle)
            ratios_of_rounds = of_ours(figures, name, quantity)
            cells.append(f"{statistics.median(ratios_of_rounds):.2f}" if ratios_of_rounds else "-")
        batch = [statistics.mean(run[count] for run in arm["runs"]) for count in ("tokens", "labels")]
        versions = figures["versions"][arm["peer"]]
        told = [f"{package} {versions[package]}" for package in (arm["peer"], "badam") if package in versions]
        rows.append([name, *cells, "{:.0f}, {:.0f}".format(*batch), ", ".join(told)])
    return rows
