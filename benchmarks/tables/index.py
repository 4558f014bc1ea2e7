"""The index of benchmarks/REPORT.md: a row for every script, with its results; and what came of each."""

import ast
import statistics

from benchmarks.tables.parts import LATEST, Benchmarks, Rows, TableError, gib, latest, loss, mib, named, percent
from benchmarks.tables.quality import importance_table, mean_loss
from benchmarks.tables.rows import chosen, held, last_switch, of_ours, ratios, times_a_layer
from benchmarks.tables.runs import losses_by_rate


def index(benchmarks: Benchmarks) -> Rows:
    """The rows of the index, by folder; a results file has its command, machine and versions."""
    rows = [["benchmark", "question", "results", "device"]]
    for path in sorted(benchmarks.folder.glob("*/*.py")):
        script = ast.parse(path.read_text(encoding="utf-8"))
        if path.parent.name == "tables" or "main" not in (getattr(part, "name", None) for part in script.body):
            continue  # what others are made of, and what makes the tables: neither measures anything
        found = benchmarks.results_of(path.stem)
        links = ", ".join(f"[{name}](results/{name}.json)" for name in found) or "not run yet"
        devices = ", ".join(sorted({one["device"] for one in found.values()}))
        link = f"[{path.stem}]({path.parent.name}/{path.name})"
        rows.append([link, ast.get_docstring(script).splitlines()[0], links, devices])
    return rows


def sentence(script: str, figures: dict) -> str:
    if script not in LATEST:
        raise TableError(f"nothing says what came of {script}.py: write a function with @latest({script!r})")
    return LATEST[script](figures)


@latest("choosing")
def of_choosing(figures: dict) -> str:
    losses = {}
    for gamma in (1, 2, 3, 5):
        lowest = min(chosen(figures, lr, lisa_activated_layers=gamma) for lr in (1e-3, 2e-3, 4e-3))
        losses[f"gamma {gamma}:"] = loss(lowest, 3)
    return f"held-out loss at the best rate: {named(losses)}"


@latest("cards")
def of_cards(figures: dict) -> str:
    layers = {f"{key}:": f"{one['layers']} of {one['num_layers']}" for key, one in figures.items()}
    return f"layers that train: {named(layers)}"


@latest("checkpoints")
def of_checkpoints(figures: dict) -> str:
    texts = {}
    for ds_config, ways in figures["saves"].items():
        written = [sum(one["bytes"] for one in found) / len(found) / 1e9 for found in ways.values()]
        waited = [sum(one["waited"] for one in found) / len(found) for found in ways.values()]
        texts[f"{ds_config}:"] = (
            f"{written[0]:.2f} GB in {waited[0]:.1f} s, changed alone {written[1]:.2f} GB in {waited[1]:.1f} s, in the "
            f"background {waited[2]:.1f} s"
        )
    return f"a save writes, and training waits: {named(texts)}"


@latest("states")
def of_states(figures: dict) -> str:
    if "keep" in figures:
        return f"held-out loss: {named({name: loss(one['held_out'], 3) for name, one in figures.items()})}"
    losses = [statistics.mean(run["held_out"] for run in form["runs"]) for form in figures.values()]
    return f"held-out losses of {len(losses)} forms: {loss(min(losses))} to {loss(max(losses))}"


@latest("gpu")
def of_gpu(figures: dict) -> str:
    """Of each shape peak and speed of what has run, or that it has not."""
    shapes = []
    for shape, arms in figures["arms"].items():
        ran = {name: arm for name, arm in arms.items() if "not_run" not in arm}
        speed = {name: arm["tokens"] / statistics.median(step["step"] for step in arm["steps"])
                 for name, arm in ran.items()}  # fmt: skip
        said = {name: f"{gib(arm['peak'])} GiB {speed[name]:.0f} tokens/s" for name, arm in ran.items()}
        shapes.append(f"{shape}: {named(said) or 'nothing has run'}")
    return "; ".join(shapes)


@latest("gpu_correct")
def of_gpu_correct(figures: dict) -> str:
    passed = [one["passed"] for one in figures["checks"].values()]
    return f"{sum(passed)} of {len(passed)} checks passed, by {figures['kernels']}"


@latest("gpu_train")
def of_gpu_train(figures: dict) -> str:
    sizes = {name: gib(figures[name]) for name in ("planned", "measured", "allocated", "reserved")}
    return f"{figures['tokens_per_second']:.0f} tokens/s; GiB {named(sizes)}; {figures['num_alloc_retries']} retries"


@latest("gpu_ranks")
def of_gpu_ranks(figures: dict) -> str:
    ran = {name: f"{one['step']:.3f} s" for name, one in figures["arms"].items() if "step" in one}
    return f"a step on {figures['ranks']} GPUs: {named(ran)}"


@latest("kernels")
def of_kernels(figures: dict) -> str:
    ran = [one for one in figures["kernels"] if "seconds" in one]
    largest = max(one["numel"] for one in ran)
    each = {one["name"]: 1e9 * one["seconds"] / largest for one in ran if one["numel"] == largest}
    names = ("lisa_adamw, fp32", "torch AdamW, fused", "lisa_adamw, bf16, stochastic, 8 bits")
    shown = "; ".join(f"{name} {each[name]:.2f}" for name in names)
    return f"ns an element of {largest:,}: {shown}"


@latest("loading")
def of_loading(figures: dict) -> str:
    most = {name: max(own for own, _ in one["peaks"]) / one["model_bytes"] for name, one in figures.items()}
    return f"own pages of a rank, in copies of the model: {named({name: f'{seen:.2f}' for name, seen in most.items()})}"


@latest("memory")
def of_memory(figures: dict) -> str:
    zero2 = figures["zero2"]
    shown = named({arm: percent(held(zero2[arm]) / held(zero2["static"]), 0) for arm in ("full", "callback", "lisa")})
    return f"held after {last_switch(figures)} switches, of what static layers hold, zero2: {shown}"


@latest("speed")
def of_speed(figures: dict) -> str:
    both = {name: (arms["lisa"], arms["static"]) for name, arms in figures.items() if "lisa" in arms}
    shown = {name: f"{statistics.median(ratios(*pair)):.3f}" for name, pair in both.items()}
    return f"step of LISA, of static layers': {named(shown)}"


@latest("communication")
def of_communication(figures: dict) -> str:
    arms = [arm for of_config in figures["counted"].values() for arm in of_config.values()]
    shown = {}
    for name in (name for name in ("zero2", "zero3") if name in figures["counted"]):
        lisa, full = (figures["counted"][name][arm]["moments"]["step"]["wire"] for arm in ("lisa", "full"))
        shown[name] = percent(lisa / full)
    equal = f"counted equals the formula in {sum(arm['equal'] for arm in arms)} of {len(arms)} arms"
    return f"{equal}; LISA sends of full training's bytes: {named(shown)}"


@latest("norms")
def of_norms(figures: dict) -> str:
    arms = {"full training": "full", "LoRA on the layers": "lora", "LoRA at the ends too": "lora_ends"}
    shown = {name: times_a_layer(figures[arm]["blocks"], "update_norm", "embed") for name, arm in arms.items()}
    return f"update of the embedding, in times a layer's: {named(shown)}"


@latest("peers")
def of_peers(figures: dict) -> str:
    ran = [name for name, arm in figures["arms"].items() if "not_run" not in arm and arm["baseline"] != name]
    shares = {name: of_ours(figures, name, "cpu_seconds_per_step") for name in ran}
    shown = {f"{name}:": f"{statistics.median(share):.2f}" for name, share in shares.items() if share}
    return f"CPU seconds of a step, of ours: {named(shown) or 'no peer has run'}"


@latest("policies")
def of_policies(figures: dict) -> str:
    names = ("LoRA r16", "QLoRA r16", "LISA as published", "LISA, factored", "LISA, factored, frozen 4 bits")
    peaks = [gib(figures[f"llama3.1-8b, 1024 tokens, 0 checkpointed, {name}"]["gpu"]["peak"]) for name in names]
    shown = "; ".join(f"{name} {peak}" for name, peak in zip(names, peaks, strict=True))
    return f"planned peak GiB of llama3.1-8b, 1024 tokens: {shown}"


@latest("smaller")
def of_smaller(figures: dict) -> str:
    off = [abs(cell["planned"] / cell["peak"] - 1) for cell in figures.values()]
    names = {
        "AdamW, 32 bits": "AdamW",
        "factored, layers 8 bits, no masters": "factored",
        "the same, frozen layers in 4 bits": "4 bits",
    }
    peaks = named({f"{short}:": mib(figures[f"1 ranks, {name}"]["peak"]) for name, short in names.items()})
    return f"peak of a step on one rank: {peaks}; plans are off by {percent(max(off))} at most"


@latest("quality")
def of_quality(figures: dict) -> str:
    settings, runs = figures["settings"], figures["runs"]
    arms = [arm for arm in ("full", "lisa 2", "lora r8", "lora r16", "lora r32") if losses_by_rate(arm, runs)]
    after = f"{settings['steps']} steps" if settings.get("seconds") is None else f"{settings['seconds']:.0f} CPU s"
    losses = named({arm: loss(mean_loss(arm, runs)) for arm in arms})
    return f"held-out loss of {settings['model']} after {after}: {losses}"


@latest("pareto")
def of_pareto(figures: dict) -> str:
    shown = {}
    for name, task in figures["tasks"].items():
        arms = {arm: task["arms"][arm] for arm in ("lora r16", "lisa in lora's memory") if arm in task["arms"]}
        shown[name] = ", ".join(f"{arm} {loss(one['loss'])} at {mib(one['peak'])}" for arm, one in arms.items())
    return f"held-out loss at the peak of a step: {named(shown)}"


@latest("importance")
def of_importance(figures: dict) -> str:
    _, *rows = importance_table(figures)
    shown = {row[0]: row[1] for row in rows if row[0] in ("probe 10", "update", "gradient")}
    return f"rank correlation with runs of fixed layers: {named(shown)}"


@latest("scaling")
def of_scaling(figures: dict) -> str:
    measured = {}  # once, where one point stands for strong and weak scaling both
    for point in figures["here"]["points"]:
        if point["ranks"] > 1:
            key = (point["ds_config"], point["arm"], point["ranks"], point["rows_a_rank"])
            measured[key] = abs(point["off"])
    off = measured.values()
    most, median = percent(max(off), 0), percent(statistics.median(off), 0)
    return f"the model is off by {median} in the median of {len(off)} measured steps, by {most} at most"


@latest("switch")
def of_switch(figures: dict) -> str:
    shown = {}
    for name, cell in list(figures.items())[:3]:
        shown[name.split(",")[0]] = percent(cell["share_of_period"]["20"], 2)
    return f"of a period of 20 steps: {named(shown)}"
