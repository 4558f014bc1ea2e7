"""Every causal and image-text architecture of transformers, tiny: one step and one switch, against plain AdamW.

python tests/system/architectures.py [--blocks | --experts | --page | model_type ...]

Sizes of a config are known by their names, and made small; what cannot be built so is counted. A loop of one's own
trains each on one CPU rank under ZeRO-2, with a switch before the second step, and plain torch trains the same layers:
losses and all weights must be equal but for rounding. Prints a table; test_architectures.py runs a part of it. With
`--blocks` it looks at the blocks of all, at their real size; with `--experts` at frozen experts in 4 bits; with
`--page` at frozen layers in 8 bits and shared rows too, on two ranks, and it writes docs/models.md.
"""

import collections
import contextlib
import inspect
import io
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes import functional
from torch import distributed as dist
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import lisa_dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from ranks import run_ranks, stop_ranks
from reference import train_reference

from lisa_dist.core.blocks import find_blocks
from lisa_dist.core.frozen_layers import FrozenLayers
from lisa_dist.ds_config import read_ds_config
from lisa_dist.errors import UserError

# Types of models and names of their classes.
MAPPINGS = {
    kind: {model_type: name if isinstance(name, str) else name[0] for model_type, name in mapping.items()}
    for kind, mapping in (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
}
LAYERS, VOCABULARY, LENGTH = 4, 128, 16
LR = 1e-3
# What the name of a size says of it; the first that fits decides.
SIZES = (
    (r"vocab_size(_per_layer_input)?|max_position_embeddings|n_positions|max_seq_len|n_ctx", VOCABULARY),
    (r"(num_|n_)?(hidden_|decoder_|encoder_|self_)?layers?|depth|num_blocks|num_mem_blocks", LAYERS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|top_k|expert_topk|top_k_experts", 2),
    (r"(num_|n_)?(local_|routed_)?experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_groups?|n_groups", 1),
    (r"(num_|n_)?(key_value|kv)_heads|num_query_groups|num_kv_heads", 2),
    (r"mamba_d_head", 32),
    (r"(mamba_|linear_)?(num_|n_)?(.*_)?heads?|n_head", 4),
    (r"index_head_dim", 32),
    (r"(.*_)?head_dim|head_size|kv_channels|d_kv|(.*_)?lora_rank|d_state|(.*_)?state_size|(.*_)?chunk_size", 16),
    (r"hidden_size_per_layer_input|embedding_size_per_layer", 16),
    (r"(.*_)?intermediate_size|(.*_)?ffn_dim|ffn_hidden_size|d_ff|n_inner|dense_ffn.*", 96),
    (r"(.*_)?hidden_size|n_embd|d_model|dim|embedding_size|embed_dim|embedding_dim|word_embed_proj_dim|d_embed", 64),
    (r"sliding_window|window_size|attention_window", 8),
)

COLUMNS = ("trains", "frozen layers in 8 bits", "ranks share rows")
PAGE = """# Models

What trains of the architectures that transformers {transformers} has for text, and for images and text. Each is built
tiny and takes two steps with a switch between them. "trains": losses and all weights are those of plain AdamW on the
same layers. "frozen layers in 8 bits": its first loss is that of 32 bits within 2%. "ranks share rows": two
ranks share each row ([Attention](attention.md)), and have the loss of one. "not buildable": small sizes are not enough
for the model; it may train. This page is made by `python tests/system/architectures.py --page`.

{counts}

| architecture | for | example | {columns} |
|---|---|---|---|---|---|
{rows}

## Why not

{reasons}
"""
GIVEN = r"n_(routed|shared)_experts|num_experts_per_tok|(topk|n)_group|head_dim"  # sizes that a config may leave out


def shrink(config: PretrainedConfig) -> list[str]:
    """Make every size of a config, and of the configs in it, small, and lists by layer as long as there are layers.

    The names that stay as they are: properties that follow from others and cannot be set.
    """
    stay: list[str] = []
    depths = {value for name, value in vars(config).items() if isinstance(value, int) and size_of(name) == LAYERS}
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            stay += shrink(value)
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        small: Any = None
        if isinstance(value, int) and (size := size_of(name)) is not None:
            small = min(value, size)
        elif value is None and re.fullmatch(GIVEN, name):
            small = size_of(name)
        elif isinstance(value, list) and len(value) in depths and len(value) > LAYERS:
            small = spread(value)
        elif re.fullmatch(r".*_token_id|.*_token_index", name) and isinstance(value, int) and value >= VOCABULARY:
            small = VOCABULARY - 1
        elif re.search("dropout|_pdrop|jitter|layerdrop", name) and isinstance(value, float):
            small = 0.0
        if small is not None:
            try:
                setattr(config, name, small)
            except (AttributeError, NotImplementedError):  # what Python and transformers raise for such a property
                stay.append(name)  # it is told where the model stays large for it
    if vars(config).get("kv_lora_rank"):  # keys of all heads come from one latent vector
        config.num_key_value_heads = config.num_attention_heads
    return stay


def size_of(name: str) -> int | None:
    return next((small for pattern, small in SIZES if re.fullmatch(pattern, name)), None)


def spread(values: list) -> list:
    """As many as there are layers, with as many kinds as fit."""
    kinds = list(dict.fromkeys(map(repr, values)))
    firsts = [next(value for value in values if repr(value) == kind) for kind in kinds][:LAYERS]
    return firsts + values[: LAYERS - len(firsts)]


def build(model_type: str, class_name: str) -> PreTrainedModel | str:
    """A tiny model, or why there is none: some need more than small sizes."""
    try:
        config = AutoConfig.for_model(model_type)
        stay = shrink(config)
        torch.manual_seed(0)
        model = getattr(transformers, class_name)._from_config(config, dtype=torch.float32)
        model.config.use_cache = False
        if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
            return f"it stays large{': cannot set ' + ', '.join(stay) if stay else ''}"
        model.train()
        tokens = batches()[0, 0]
        first, second = (model(input_ids=tokens, labels=tokens).loss for _ in range(2))
        if torch.equal(first, second) and first.isfinite() and first.requires_grad:
            return model
        return f"its losses are {first.item():.6g} and {second.item():.6g}"
    except Exception as error:  # noqa: BLE001 - of transformers alone, in as many kinds as there are architectures
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def batches() -> torch.Tensor:
    """Token ids of shape (steps, micro-batches, rows, length); the last ids may be special."""
    return torch.randint(3, VOCABULARY - 8, (2, 1, 2, LENGTH), generator=torch.Generator().manual_seed(1))


def train(model: PreTrainedModel, twin: PreTrainedModel) -> str:
    """Equal, refused with the reason, or what differs; `twin` is the same model."""
    try:
        config = lisa_dist.LisaConfig(lisa_interval_steps=1, lisa_activated_layers=1, lisa_sampler="reshuffle")
        engine, lisa = lisa_dist.initialize(model, "zero2", config, lr=LR, micro_batch_size=2)
    except UserError as error:
        return f"refused: {error}"
    losses, periods = [], []
    for (tokens,) in batches():
        lisa.on_step_begin()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        periods.append(lisa.active_layers)
    blocks = find_blocks(twin)
    layers = list(twin.get_submodule(blocks.layers_path))
    frozen = [parameter for parameter in twin.parameters() if not parameter.requires_grad]  # by its own code
    outside = [[*blocks.outside.parameters.values(), *frozen]] * 2
    expected = train_reference(twin, layers, periods, 1, batches(), lr=LR, weight_decay=0.0, frozen_of_period=outside)
    differing, worst = 0, 0.0
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        difference = (mine - theirs).abs()
        differing, worst = differing + int((difference > 1e-5).sum()), max(worst, difference.max().item())
    engine.destroy()
    if max(abs(one - other) for one, other in zip(losses, expected, strict=True)) > 1e-4:
        return f"losses {losses}, of plain AdamW {expected}"
    # A first step of AdamW is the sign of the gradient, so rounding shows where a gradient is next to nothing.
    equal = worst < LR / 2 and differing <= 1e-4 * sum(parameter.numel() for parameter in model.parameters())
    return "equal" if equal else f"{differing} elements differ, by up to {worst:.2g}"


def with_frozen_experts(model_type: str, class_name: str, implementation: str, checkpointed: bool) -> str:
    """Whether a pass with frozen layers in 4 bits is that of a twin whose matrices were rounded, to the bit.

    Or why there is none: nothing of three dimensions, or it cannot be built. What stays in 16 bits is named.
    """
    found = []
    for quantizes in (True, False):
        model = build(model_type, class_name)
        if isinstance(model, str):
            return f"not buildable: {model}"
        try:
            blocks = find_blocks(model.to(torch.bfloat16))
            model.set_experts_implementation(implementation)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            return f"not runnable: {error}"
        large = {name for layer in blocks.layers for name, one in layer.parameters.items() if one.ndim > 2}
        for number, layer in enumerate(blocks.layers):
            layer.requires_grad_(number == 1)
        frozen = FrozenLayers(model, blocks, 4, "host", torch.device("cpu"), streams=True)
        frozen.begin([1])
        names = {name for name, value in model.named_parameters() if not value.numel()}
        left = sorted(
            {re.sub(r".*layers\.\d+\.", "", name) for name in large - names - blocks.layers[1].parameters.keys()}
        )
        if not names & large:
            return f"no experts: {', '.join(left) or 'nothing'} of three dimensions stays as it is"
        if not quantizes:
            frozen.switch(range(len(blocks.layers)))
            for name in names:
                value = model.get_parameter(name).data
                codes = functional.quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
                value.copy_(functional.dequantize_4bit(*codes))
        tokens = batches()[0, 0]
        try:
            loss = model(input_ids=tokens, labels=tokens).loss
        except RuntimeError as error:  # of a model that has no such implementation
            return f"not runnable: {error}".partition("\n")[0]
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    equal = len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
    return f"{'equal' if equal else 'DIFFERENT'}; in 16 bits: {', '.join(left) or 'none'}"


def look_at_experts(names: list[str] | None = None) -> dict[str, str]:
    """The outcome of each causal architecture, of the ways to compute experts that transformers has."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for model_type in [one for one in MAPPINGS["causal"] if names is None or one in names]:
        outcomes = {}
        for way in itertools.product(("eager", "grouped_mm", "batched_mm"), (False, True)):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcomes[way] = with_frozen_experts(model_type, MAPPINGS["causal"][model_type], *way)
            if outcomes[way].startswith(("not buildable", "no experts")):
                break
        found[model_type] = " | ".join(sorted(set(outcomes.values())))
        print(model_type, found[model_type], file=sys.__stderr__, flush=True)
    return found


def on_a_rank(names: list[str] | None = None) -> list[tuple[str, str, str]]:
    """What came of each architecture, on a rank: in which mapping it is, its type, and the outcome."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for kind, mapping in MAPPINGS.items():
        for model_type in [one for one in mapping if names is None or one in names]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                model, twin = (build(model_type, mapping[model_type]) for _ in range(2))
                try:
                    outcome = f"not buildable: {model}" if isinstance(model, str) else train(model, twin)
                except Exception as error:  # noqa: BLE001 - a crash is an outcome too
                    outcome = f"{type(error).__name__}: {error}"
            found.append((kind, model_type, outcome))
            print(*found[-1], file=sys.__stderr__, flush=True)
    return found


def on_two_ranks(names: list[str] | None = None) -> list[tuple[str, str, str, str]]:
    """On a rank of two: of each architecture how it trains with frozen layers in 8 bits, and with shared rows."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for kind, mapping in MAPPINGS.items():
        for model_type in [one for one in mapping if names is None or one in names]:
            outcomes = []
            for how in ({"lisa_frozen_bits": "8"}, {}):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    outcomes.append(steps(build(model_type, mapping[model_type]), **how))
            found.append((kind, model_type, *outcomes))
            print(*found[-1], file=sys.__stderr__, flush=True)
    return found


def steps(model: PreTrainedModel | str, **how: str) -> str:
    """Two steps with frozen layers in 8 bits, or else with rows that two ranks share; yes, or why not."""
    if isinstance(model, str):
        return "-"
    large = {name for name, parameter in model.named_parameters() if parameter.ndim > 2 and "layers." in name}
    ds_config = read_ds_config("zero2") | {"bf16": {"enabled": bool(how)}}
    config = lisa_dist.LisaConfig(lisa_interval_steps=1, lisa_activated_layers=1, lisa_sampler="reshuffle", **how)
    given = {"lr": LR, "micro_batch_size": 2, "sequence_parallel": 1 if how else 2}
    engine = None
    try:
        before = model(input_ids=batches()[0, 0], labels=batches()[0, 0]).loss.item()
        model = model.to(torch.bfloat16) if how else model
        engine, lisa = lisa_dist.initialize(model, ds_config, config, **given)
        whole = {name for name, parameter in model.named_parameters() if name in large and parameter.numel()}
        for number, (tokens,) in enumerate(batches()):
            lisa.on_step_begin()
            batch = {"input_ids": tokens, "labels": tokens}
            loss = engine(**(batch if how else lisa.sequence.shard(batch))).loss
            total = loss.detach().clone() / dist.get_world_size()
            dist.all_reduce(total)
            if number == 0 and abs(total.item() - before) > 0.02 * before:
                return f"its first loss is {total.item():.4g} where it should be {before:.4g}"
            engine.backward(loss)
            engine.step()
        return "yes, some in 16 bits" if how and len(whole) > len(large) / LAYERS else "yes"
    except (UserError, RuntimeError, TypeError, AttributeError) as error:
        return str(error).partition("\n")[0]
    finally:
        if engine is not None:
            engine.destroy()


def write_page(trained: list[tuple[str, str, str]], further: list[tuple[str, str, str, str]]) -> None:
    """docs/models.md, of the outcomes of `on_a_rank` and `on_two_ranks`."""
    rows, reasons = [], []
    for (kind, model_type, outcome), (*_, bits, shared) in zip(trained, further, strict=True):
        source = inspect.getsource(CONFIG_MAPPING[model_type])
        example = next(iter(re.findall(r'checkpoint="([^"]+)"', source)), "")
        name = f"[{example}](https://huggingface.co/{example})" if example else "-"
        marks = ["yes" if outcome == "equal" else outcome.partition(":")[0]]
        marks += [one if one in ("-", "yes", "yes, some in 16 bits") else "no" for one in (bits, shared)]
        rows.append(
            f"| `{model_type}` | {'text' if kind == 'causal' else 'images and text'} | {name} | {' | '.join(marks)} |"
        )
        if outcome != "equal" and not outcome.startswith("not buildable"):
            reasons.append(f"- `{model_type}`: {outcome.removeprefix('refused: ')}")
        reasons += [
            f"- `{model_type}`, {what}: {why}"
            for what, why, mark in zip(COLUMNS[1:], (bits, shared), marks[1:], strict=True)
            if mark == "no"
        ]
    counts = []
    for number, column in enumerate(COLUMNS):
        marks = collections.Counter(row.split(" | ")[3 + number].strip(" |").partition(",")[0] for row in rows)
        counts.append(f"- {column}: {', '.join(f'{mark} {count}' for mark, count in marks.most_common())}")
    text = PAGE.format(
        transformers=transformers.__version__,
        counts="\n".join(counts),
        rows="\n".join(rows),
        columns=" | ".join(COLUMNS),
        reasons="\n".join(reasons),
    )
    (Path(__file__).parents[2] / "docs" / "models.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Print every outcome, and how many there are of each."""
    if "--blocks" in sys.argv:
        from test_architectures import look_at_blocks

        for kind in MAPPINGS:
            look_at_blocks(kind, stride=1)
        return
    if "--experts" in sys.argv:
        print(collections.Counter(outcome.partition(":")[0] for outcome in look_at_experts().values()))
        return
    names = [word for word in sys.argv[1:] if word != "--page"] or None
    (found,) = run_ranks(on_a_rank, 1, names, timeout=7200)
    if "--page" in sys.argv:
        write_page(found, run_ranks(on_two_ranks, 2, names, timeout=7200)[0])
    for kind in MAPPINGS:
        of_kind = [outcome.partition(":")[0] for one, _, outcome in found if one == kind]
        print(kind, dict(collections.Counter(of_kind)))
    stop_ranks()


if __name__ == "__main__":
    main()
