"""The table of docs/experiments.md: ideas, in the order of the page, and what each is worth."""

import statistics

from benchmarks.tables.parts import Rows, TableError, loss, table
from benchmarks.tables.quality import layers_that_train, spread_of_seeds
from benchmarks.tables.runs import losses_by_rate, runs_at_best

# Idea, arm of quality.py, verdict.
IDEAS = (
    ("LISA, two layers at a time", "lisa 2", "what the others are measured against"),
    (
        "as published: all moments afresh in each period",
        "lisa 2 as published",
        "0.05 worse with 5 layers, as embedding and head lose theirs; with 30 0.02 worse on GSM8K, no worse on Alpaca",
    ),
    ("full training", "full", "the aim"),
    ("LoRA, rank 16", "lora r16", "the memory to compare with"),
    ("LoRA, rank 64", "lora r64", "more adapters help little where the text is new"),
    ("GaLore, rank 16", "galore r16", "half of the gap on GSM8K, a fifth on Alpaca; a gradient of the whole model"),
    (
        "APOLLO, rank 16",
        "apollo r16",
        "as good as full training with 5 layers; with 30 seven tenths of the gap, or six tenths; the same gradient",
    ),
    ("LISA in ms-swift", "ms-swift lisa 2", "the same on the same draws; it keeps states, as `lisa 2 keep`"),
    (
        "cheaper states, and more layers in the same memory",
        "lisa auto",
        "of 5 layers four, 0.007 behind full training; of 30 fourteen, 0.017 behind on GSM8K, level on Alpaca",
    ),
    (
        "as many layers as fit LoRA's step and a tenth",
        "lisa in lora's memory",
        "within 0.02 of full training, or better: of 5 layers all, of 30 fourteen",
    ),
    (
        "the same, embeddings and head frozen",
        "lisa in lora's, embed frozen",
        "better by 0.008 on SmolLM2's GSM8K, far worse where the text is new",
    ),
    (
        "as many as fit LoRA's own peak, embeddings and head frozen",
        "lisa at lora's peak, embed frozen",
        "without the tenth: 0.021 ahead of LoRA on Alpaca, 0.013 behind it on GSM8K",
    ),
    (
        "as many as fit LoRA's step and a tenth, weights in bf16",
        "lisa in lora's, no masters",
        "nothing lost with 30 layers; 0.02 with 5, within the spread",
    ),
    (
        "the same layers, upper ones more often",
        "lisa in lora's, upper most",
        "of 5 layers all, so that no sampler changes anything; the figure is of half the rate",
    ),
    ("the same layers, by a probe", "lisa in lora's, probed", "as the one above"),
    ("fourteen layers, embeddings frozen, moments in 32 bits", "lisa 14, embed frozen", "what equal time compares"),
    (
        "the same, states kept",
        "lisa 14 keep, embed frozen",
        "on the one seed 0.007 better on GSM8K, 0.011 worse on Alpaca, for the memory of all states",
    ),
    ("the same, K 10", "lisa 14 K 10, embed frozen", "nothing"),
    (
        "the same, K 5, states kept",
        "lisa 14 keep, K 5, embed frozen",
        "nothing on GSM8K, 0.02 worse on Alpaca",
    ),
    (
        "the same, one set of layers for the whole run",
        "lisa 14 fixed, embed frozen",
        "after 100 steps 0.010 better on GSM8K, where it is 0.003 behind LoRA; level on Alpaca",
    ),
    (
        "the same, each as often as any other",
        "lisa 14 balanced, embed frozen",
        "worse, by 0.004 on GSM8K and 0.028 on Alpaca",
    ),
    (
        "the same, the layers in the middle, which pay most",
        "lisa 14 middle, embed frozen",
        "after 100 steps ahead of all on Alpaca, by 0.018 of full training; 0.004 worse on GSM8K",
    ),
    (
        "as many modules as fourteen layers have, one set for the whole run",
        "lisa modules 14 fixed, embed frozen",
        "after 100 steps 0.005 better than layers on this seed; at equal time 0.010 behind LoRA, by fewer steps",
    ),
    (
        "as many modules as eight layers have, one set for the whole run",
        "lisa modules 8 fixed, embed frozen",
        "the nearest to LoRA at equal time on GSM8K, 0.005 behind it over three seeds; level on Alpaca",
    ),
    (
        "eight layers, mostly upper, embeddings frozen",
        "lisa 8 upper, embed frozen",
        "a shorter backward pass, and worse",
    ),
    (
        "fourteen neighbouring layers, embeddings frozen",
        "lisa 14 window, embed frozen",
        "a twentieth less time; better on one seed of Alpaca, worse on GSM8K, no better at equal time",
    ),
    ("eight neighbouring layers, embeddings frozen", "lisa 8 window, embed frozen", "a tenth less time, and worse"),
    ("factored embed and head", "lisa 2, factored", "better with 5 layers; with 30 nothing lost, or 0.016 on Alpaca"),
    ("moments in 8 bits", "lisa 2, 8 bits", "nothing is lost"),
    ("weights in bf16", "lisa 2 bf16", "nothing lost with 5 layers, 0.004 with 30"),
    ("frozen layers in 8 bits", "lisa 2, frozen 8 bits", "nothing more than bf16 loses"),
    ("frozen layers in 4 bits", "lisa 2, frozen 4 bits", "costs 0.03 to 0.06"),
    ("one set of layers for the whole run", "fixed 2", "better with 5 layers, whichever two but the lowest"),
    ("upper layers more often, weights 1 to 5", "lisa 2 upper more", "helps a little with 5 layers"),
    ("the same, their cubes", "lisa 2 upper most", "helps with 5 layers"),
    ("lower layers more often", "lisa 2 lower most", "hurts with 5 layers"),
    ("by depth, evenly drawn", "lisa 2 depth 1", "within the spread"),
    ("by depth squared, evenly drawn", "lisa 2 depth 2", "a fifth of the gap with 5 layers"),
    (
        "by depth to the fourth power, evenly drawn",
        "lisa 2 depth 4",
        "half of the gap with 5 layers; with 30 it costs 0.05 on GSM8K, 0.11 on Alpaca",
    ),
    ("by depth to the eighth power, evenly drawn", "lisa 2 depth 8", "seven tenths of the gap with 5 layers"),
    (
        "each as often as any other",
        "lisa 2 balanced",
        "worse with 5 layers; with 30 nothing on GSM8K, and 0.055 better on Alpaca",
    ),
    ("more often what a probe by loss says pays", "lisa 2 probed", "helps with 5 layers, nothing with 30"),
    (
        "the same, sharper",
        "lisa 2 probed sharp",
        "as good as depth with 5 layers; with 30 no better than balanced draws alone",
    ),
    (
        "neighbouring layers",
        "lisa 2 window",
        "worse on GSM8K, level on Alpaca: windows reach the first and the last layer half as often",
    ),
    ("modules in the place of layers", "lisa modules", "helps, with 30 layers more"),
    ("modules by norms of gradients", "lisa modules adaptive", "nothing more"),
    (
        "embeddings and head at half the rate",
        "lisa 2, embed and head / 2",
        "helps SmolLM2, by 0.04 on Alpaca; hurts the other",
    ),
    (
        "periods so short that layers come twice",
        "lisa 2 K auto",
        "K 20 of 400 steps, as it was; with 30 layers K 3: nothing on GSM8K, 0.028 better on Alpaca",
    ),
    ("weights from norms of updates", "lisa 2 by update", "nothing: they differ too little"),
    ("weights from norms of gradients", "lisa 2 adaptive", "nothing: they rank layers the wrong way round"),
    ("the same, sharper", "lisa 2 sharp", "nothing"),
    ("each layer once before any repeats", "lisa 2 reshuffle", "a little worse"),
    ("states kept while a layer is frozen", "lisa 2 keep", "little, for the memory of all states"),
    ("a warm-up after a switch", "lisa 2 warm-up", "a little with 5 layers, for nothing; none with 30, or 0.014 worse"),
    ("both", "lisa 2 keep, warm-up", "no more than either"),
    ("short periods", "lisa 2 K 5", "worse with 5 layers; with 30, of which more are reached, a little better"),
    ("short periods, states kept", "lisa 2 keep, K 5", "worse"),
    ("a switch in every step, states kept", "lisa 2 keep, K 1", "worse"),
    ("long periods", "lisa 2 K 50", "nothing"),
    ("longer ones", "lisa 2 K 100", "nothing"),
    ("a rate 1.6 times as high", "lisa 2 rate x 1.6", "worse"),
    ("a rate 1.6 times as low", "lisa 2 rate / 1.6", "worse"),
    ("one layer at a time", "lisa 1", "worse"),
    ("the same, each once before any repeats", "lisa 1 reshuffle", "no better"),
    ("the same, by norms of gradients", "lisa 1 adaptive", "no better"),
    ("three layers", "lisa 3", "layers are what helps"),
    ("four layers", "lisa 4", "layers are what helps"),
    ("four layers, states kept", "lisa 4 keep", "a little more"),
    ("one block at a time, BAdam's order", "one block", "far behind"),
)


@table("experiments", "quality", "quality_smollm2", "quality_smollm2_alpaca")
def experiments(*tasks: dict) -> Rows:
    """Mean held-out loss at the best rate of each, on every task that it was tried on."""
    rows = []
    for idea, arm, verdict in IDEAS:
        found = [runs_at_best(arm, figures["runs"]) for figures in tasks]
        if not any(found):
            raise TableError(f"no results have a run of {arm}")
        tried = [losses_by_rate(arm, figures["runs"]) for figures in tasks]
        layers = [layers_that_train(arm, figures) for figures in tasks]
        rows.append([idea, f"`{arm}`", *map(_cell, found, tried, layers), verdict])
    return [["idea", "arm", "stories260K, GSM8K", "SmolLM2, GSM8K", "SmolLM2, Alpaca", "verdict"], *rows]


def _cell(runs: list[dict], by_rate: dict[float, float], layers: str) -> str:
    losses = [run["held_out"] for run in runs]
    if not losses:
        return "-"
    one_rate = ", one rate" if len(by_rate) == 1 else ""
    return f"{loss(statistics.mean(losses))} ({spread_of_seeds(losses)}{one_rate}); {layers}"
