"""The table of what was tried: ideas, in the order of the page, and what each is worth."""

import statistics

from benchmarks.tables.parts import Rows, TableError, loss, table
from benchmarks.tables.quality import layers_that_train, spread_of_seeds
from benchmarks.tables.runs import losses_by_rate, runs_at_best

# Method of quality.py, idea.
IDEAS = {
    "lisa 2": "two layers",
    "lisa 2 as published": "two, all moments new in each period, as published",
    "full": "full training",
    "lora r16": "LoRA, rank 16",
    "lora r64": "LoRA, rank 64",
    "galore r16": "GaLore, rank 16",
    "apollo r16": "APOLLO, rank 16",
    "ms-swift lisa 2": "LISA in ms-swift",
    "lisa auto": "as many layers as fit the memory of two with 32-bit states",
    "lisa in lora's memory": "as many as fit LoRA's step and a tenth",
    "lisa in lora's, embed frozen": "as many as fit it, embedding and head frozen",
    "lisa at lora's peak, embed frozen": "as many as fit LoRA's own peak, embedding and head frozen",
    "lisa in lora's, no masters": "as many as fit LoRA's step and a tenth, weights in bf16",
    "lisa 14, embed frozen": "14 layers, embedding and head frozen",
    "lisa 14 keep, embed frozen": "14, states kept",
    "lisa 14 keep, K 5, embed frozen": "14, states kept, K = 5",
    "lisa 14 fixed, embed frozen": "14, one set for the whole run",
    "lisa 14 balanced, embed frozen": "14, `balanced`",
    "lisa 14 middle, embed frozen": "14, those in the middle for the whole run",
    "lisa modules 14 fixed, embed frozen": "as many modules as 14 layers, one set for the whole run",
    "lisa modules 8 fixed, embed frozen": "as many modules as 8 layers, one set for the whole run",
    "lisa 8 upper, embed frozen": "8 layers, mostly upper, embedding and head frozen",
    "lisa 14 window, embed frozen": "14 neighbouring ones (`window`)",
    "lisa 2, factored": "two, embedding and head factored",
    "lisa 2, 8 bits": "two, moments in 8 bits",
    "lisa 2 bf16": "two, weights in bf16",
    "lisa 2, frozen 8 bits": "two, frozen layers in 8 bits",
    "lisa 2, frozen 4 bits": "two, frozen layers in 4 bits",
    "fixed 2": "two, one set for the whole run (`fixed`)",
    "lisa 2 upper more": "two, weights of layers 1 to 5",
    "lisa 2 upper most": "two, their cubes as weights",
    "lisa 2 lower most": "two, lower layers more often",
    "lisa 2 depth 1": "two, by depth, `balanced`",
    "lisa 2 depth 2": "two, by depth squared",
    "lisa 2 depth 4": "two, by depth to the power of 4",
    "lisa 2 depth 8": "two, by depth to the power of 8",
    "lisa 2 balanced": "two, `balanced`",
    "lisa 2 probed": "two, by the probe",
    "lisa 2 probed sharp": "two, by the probe, sharper",
    "lisa 2 window": "two neighbouring ones (`window`)",
    "lisa modules": "as many modules as two layers",
    "lisa modules adaptive": "as many modules, `adaptive`",
    "lisa 2, embed and head / 2": "two, embedding and head at half the rate",
    "lisa 2 K auto": "two, K by the length of the run",
    "lisa 2 by update": "two, by norms of updates",
    "lisa 2 adaptive": "two, `adaptive`",
    "lisa 2 sharp": "two, `adaptive`, sharper",
    "lisa 2 reshuffle": "two, `reshuffle`",
    "lisa 2 keep": "two, states kept",
    "lisa 2 warm-up": "two, a warm-up after activation",
    "lisa 2 K 5": "two, K = 5",
    "lisa 2 keep, K 5": "two, states kept, K = 5",
    "lisa 2 keep, K 1": "two, states kept, K = 1",
    "lisa 2 K 50": "two, K = 50",
    "lisa 2 K 100": "two, K = 100",
    "lisa 2 rate x 1.6": "two, 1.6 times the rate",
    "lisa 2 rate / 1.6": "two, the rate divided by 1.6",
    "lisa 1": "one layer",
    "lisa 3": "three layers",
    "lisa 4": "four layers",
    "lisa 4 keep": "four, states kept",
    "embed and head": "embedding and head alone",
    "one block": "one block (BAdam)",
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
