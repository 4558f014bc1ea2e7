"""The table of what was tried: ideas, in the order of the page, and what each is worth."""

import statistics

from benchmarks.tables.parts import Rows, TableError, loss, table
from benchmarks.tables.quality import layers_that_train, spread_of_seeds
from benchmarks.tables.runs import losses_by_rate, runs_at_best

# Method of quality.py, idea.
IDEAS = {
    "lisa 2": "LISA, two layers at a time",
    "lisa 2 as published": "as published: all moments afresh in each period",
    "full": "full training",
    "lora r16": "LoRA, rank 16",
    "lora r64": "LoRA, rank 64",
    "galore r16": "GaLore, rank 16",
    "apollo r16": "APOLLO, rank 16",
    "ms-swift lisa 2": "LISA in ms-swift",
    "lisa auto": "cheaper states, and more layers in the same memory",
    "lisa in lora's memory": "as many layers as fit LoRA's step and a tenth",
    "lisa in lora's, embed frozen": "the same, embeddings and head frozen",
    "lisa at lora's peak, embed frozen": "as many as fit LoRA's own peak, embeddings and head frozen",
    "lisa in lora's, no masters": "as many as fit LoRA's step and a tenth, weights in bf16",
    "lisa 14, embed frozen": "fourteen layers, embeddings frozen, moments in 32 bits",
    "lisa 14 keep, embed frozen": "the same, states kept",
    "lisa 14 K 10, embed frozen": "the same, K 10",
    "lisa 14 keep, K 5, embed frozen": "the same, K 5, states kept",
    "lisa 14 fixed, embed frozen": "the same, one set of layers for the whole run",
    "lisa 14 balanced, embed frozen": "the same, each as often as any other",
    "lisa 14 middle, embed frozen": "the same, the layers in the middle, which pay most",
    "lisa modules 14 fixed, embed frozen": "as many modules as fourteen layers have, one set for the whole run",
    "lisa modules 8 fixed, embed frozen": "as many modules as eight layers have, one set for the whole run",
    "lisa 8 upper, embed frozen": "eight layers, mostly upper, embeddings frozen",
    "lisa 14 window, embed frozen": "fourteen neighbouring layers, embeddings frozen",
    "lisa 8 window, embed frozen": "eight neighbouring layers, embeddings frozen",
    "lisa 2, factored": "factored embed and head",
    "lisa 2, 8 bits": "moments in 8 bits",
    "lisa 2 bf16": "weights in bf16",
    "lisa 2, frozen 8 bits": "frozen layers in 8 bits",
    "lisa 2, frozen 4 bits": "frozen layers in 4 bits",
    "fixed 2": "one set of layers for the whole run",
    "lisa 2 upper more": "upper layers more often, weights 1 to 5",
    "lisa 2 upper most": "the same, their cubes",
    "lisa 2 lower most": "lower layers more often",
    "lisa 2 depth 1": "by depth, evenly drawn",
    "lisa 2 depth 2": "by depth squared, evenly drawn",
    "lisa 2 depth 4": "by depth to the fourth power, evenly drawn",
    "lisa 2 depth 8": "by depth to the eighth power, evenly drawn",
    "lisa 2 balanced": "each as often as any other",
    "lisa 2 probed": "more often what a probe by loss says pays",
    "lisa 2 probed sharp": "the same, sharper",
    "lisa 2 window": "neighbouring layers",
    "lisa modules": "modules in the place of layers",
    "lisa modules adaptive": "modules by norms of gradients",
    "lisa 2, embed and head / 2": "embeddings and head at half the rate",
    "lisa 2 K auto": "periods so short that layers come twice",
    "lisa 2 by update": "weights from norms of updates",
    "lisa 2 adaptive": "weights from norms of gradients",
    "lisa 2 sharp": "the same, sharper",
    "lisa 2 reshuffle": "each layer once before any repeats",
    "lisa 2 keep": "states kept while a layer is frozen",
    "lisa 2 warm-up": "a warm-up after a switch",
    "lisa 2 keep, warm-up": "both",
    "lisa 2 K 5": "short periods",
    "lisa 2 keep, K 5": "short periods, states kept",
    "lisa 2 keep, K 1": "a switch in every step, states kept",
    "lisa 2 K 50": "long periods",
    "lisa 2 K 100": "longer ones",
    "lisa 2 rate x 1.6": "a rate 1.6 times as high",
    "lisa 2 rate / 1.6": "a rate 1.6 times as low",
    "lisa 1": "one layer at a time",
    "lisa 1 reshuffle": "the same, each once before any repeats",
    "lisa 1 adaptive": "the same, by norms of gradients",
    "lisa 3": "three layers",
    "lisa 4": "four layers",
    "lisa 4 keep": "four layers, states kept",
    "one block": "one block at a time, BAdam's order",
}


@table("experiments", "quality", "quality_smollm2", "quality_smollm2_alpaca")
def experiments(*tasks: dict) -> Rows:
    """Mean held-out loss at the best rate of each, on every task that it was tried on."""
    rows = []
    for arm, idea in IDEAS.items():
        found = [runs_at_best(arm, figures["runs"]) for figures in tasks]
        if not any(found):
            raise TableError(f"no results have a run of {arm}")
        tried = [losses_by_rate(arm, figures["runs"]) for figures in tasks]
        layers = [layers_that_train(arm, figures) for figures in tasks]
        rows.append([idea, *map(_cell, found, tried, layers)])
    return [["idea", "stories260K, GSM8K", "SmolLM2, GSM8K", "SmolLM2, Alpaca"], *rows]


def _cell(runs: list[dict], by_rate: dict[float, float], layers: str) -> str:
    losses = [run["held_out"] for run in runs]
    if not losses:
        return "-"
    one_rate = ", one rate" if len(by_rate) == 1 else ""
    return f"{loss(statistics.mean(losses))} ({spread_of_seeds(losses)}{one_rate}); {layers}"
