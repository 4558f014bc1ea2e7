"""Blocks of the causal and image-text architectures of transformers, at their real size, on the meta device.

Each is found right or refused in words. Right means: the layers are one list, the embedding and the head are in their
blocks, other models inside are outside, and the blocks are as large as those of the language model by itself.
"""

import collections
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from architectures import MAPPINGS, look_at_experts, on_a_rank
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lisa_dist.core.blocks import Blocks, find_blocks
from lisa_dist.errors import UserError

SLICE = [
    "bloom",
    "cohere",
    "falcon",
    "gemma3_text",
    "gpt_neox",
    "olmoe",
    "opt",
    "phi3",
    "qwen2_moe",
    "stablelm",
    "llava",
]


def build(model_type: str, class_name: str) -> PreTrainedModel | str:
    """A model of the type's own config, or why that is not enough: some need another package."""
    try:
        with torch.device("meta"):
            return getattr(transformers, class_name)._from_config(AutoConfig.for_model(model_type))
    except Exception as error:  # noqa: BLE001 - of transformers alone, in as many kinds as there are architectures
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def what_is_wrong(model: PreTrainedModel, blocks: Blocks) -> list[str]:
    """What is wrong with blocks that were found."""
    held = [name for block in blocks for name in block.parameters]
    prefix = blocks.layers_path
    of_language = {id(one) for block in blocks if block is not blocks.outside for one in block.parameters.values()}
    inner = [one for one in model.modules() if one is not model and isinstance(one, PreTrainedModel)]
    encoders = [one for one in inner if model.get_input_embeddings() not in list(one.modules())]
    encoders = [one for one in encoders if model.get_submodule(f"{prefix}.0") not in list(one.modules())]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def is_in(module, block) -> bool:
        return any(one is mine for one in module.parameters() for mine in block.parameters.values())

    checks = {
        "a parameter is in no block, or in two": sorted(held) == sorted(dict(model.named_parameters())),
        "a layer has nothing, or something from elsewhere": all(
            layer.parameters and all(name.startswith(f"{prefix}.{number}.") for name in layer.parameters)
            for number, layer in enumerate(blocks.layers)
        ),
        "the embedding is not in embed": is_in(embedding, blocks.embed),
        "the head is not in head": head is None or is_in(head, blocks.embed if blocks.tied else blocks.head),
        "an encoder is not outside": not any(id(one) in of_language for each in encoders for one in each.parameters()),
        "something of a language model alone is outside": len(inner) > 1
        or model.config.get_text_config() is not model.config
        or not blocks.outside.parameters,
    }
    return [said for said, holds in checks.items() if not holds] + by_itself(model, blocks)


def by_itself(model: PreTrainedModel, blocks: Blocks) -> list[str]:
    """Differences to the language model of the text config, where transformers has one."""
    text = model.config.get_text_config()
    if text is model.config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []
    with torch.device("meta"):
        alone = find_blocks(AutoModelForCausalLM.from_config(text))
    sizes = {
        "layers": (sum(layer.numel for layer in one.layers) for one in (blocks, alone)),
        "embedding and head": (one.embed.numel + (0 if one.tied else one.head.numel) for one in (blocks, alone)),
    }
    pairs = {name: tuple(both) for name, both in sizes.items()}
    if blocks.tied != alone.tied:
        del pairs["embedding and head"]
    return [f"{name}: {here}, by itself {there}" for name, (here, there) in pairs.items() if here != there]


@pytest.mark.full
@pytest.mark.parametrize("kind", MAPPINGS)
def test_blocks_of_every_third_architecture(kind):
    """`python tests/system/architectures.py --blocks` looks at all of them."""
    look_at_blocks(kind, stride=3)


def look_at_blocks(kind: str, stride: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    wrong = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type, class_name in list(MAPPINGS[kind].items())[::stride]:
            model = build(model_type, class_name)
            if isinstance(model, str):
                print(kind, model_type, "not buildable:", model)
                outcomes["not buildable"] += 1
                continue
            try:
                blocks = find_blocks(model)
            except UserError as error:
                outcomes["encoder-decoder" if "is an encoder-decoder" in str(error) else "refused"] += 1
                if "\n" in str(error):
                    wrong[model_type] = [f"refused in more than a line: {error}"]
                continue
            outcomes["found"] += 1
            if said := what_is_wrong(model, blocks):
                wrong[model_type] = said
    print(kind, dict(outcomes))
    assert wrong == {}
    # Encoder-decoders cannot be trained; how many of them a slice has depends on the release of transformers.
    assert outcomes["found"] > 0.75 * outcomes.total()
    assert outcomes["refused"] < 0.1 * outcomes.total()


@pytest.mark.full
@pytest.mark.usefixtures("cpu_ops")
def test_a_step_and_a_switch_are_those_of_plain_adamw():
    """A slice of `python tests/system/architectures.py`."""
    (found,) = run_ranks(on_a_rank, 1, SLICE)
    assert {outcome for _, _, outcome in found} == {"equal"}, found
    assert len(found) >= len(SLICE)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| `{name}` \|.*\| yes \| yes", page, re.MULTILINE) for name in SLICE), "docs/models.md"


@pytest.mark.full
def test_frozen_experts_are_those_of_a_rounded_model():
    """Of kinds of modules that have experts; all by `python tests/system/architectures.py --experts`."""
    kinds = ["deepseek_v3", "granitemoe", "jetmoe", "llama4_text", "gpt_oss", "qwen3_moe"]
    found = look_at_experts(kinds)
    assert {name: outcome.partition(";")[0] for name, outcome in found.items()} == dict.fromkeys(sorted(kinds), "equal")
