"""What vLLM itself makes of whole layers, and of one matrix of a layer: its own code that a server's update runs.

vllm_on_cpu.py BEFORE AFTER PART LAYER: folders of a model before and after a decoder layer and the head have trained,
and with one matrix of that layer trained alone. Prints the likeliest tokens with their log-probabilities as JSON: of
engines that have read AFTER and PART, and of engines of BEFORE that were sent what makes them AFTER and PART.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from lisa_dist.core.blocks import find_blocks
from lisa_dist.train.rollouts import changed_units


def answers(folder: str, weights: list[tuple] = ()) -> list:
    """Of a new engine of the folder, after an update with these weights."""
    engine = LLM(
        model=folder, max_model_len=64, max_num_seqs=2, enforce_eager=True, dtype="float32", skip_tokenizer_init=True
    )
    executor = engine.llm_engine.model_executor
    if weights:
        model = executor.driver_worker.model_runner.model
        initialize_layerwise_reload(model)
        model.load_weights(weights)
        finalize_layerwise_reload(model, engine.llm_engine.model_config)
        engine.reset_prefix_cache()
    asked = SamplingParams(max_tokens=8, temperature=0, logprobs=1, detokenize=False)
    (found,) = engine.generate([{"prompt_token_ids": [5, 6, 7, 8]}], asked, use_tqdm=False)
    one = found.outputs[0]
    return [[token, chance[token].logprob] for token, chance in zip(one.token_ids, one.logprobs, strict=True)]


def main() -> None:
    before, after, part, layer = sys.argv[1:]
    blocks, trained = find_blocks(AutoModelForCausalLM.from_pretrained(before)), load_file(f"{after}/model.safetensors")
    units = changed_units(blocks, {f"layers.{layer}", "embed", "head", "rest"})
    sent = [(name, trained[name]) for unit in units for name in unit]
    matrix = [(name, value) for name, value in sent if name.endswith(f"layers.{layer}.self_attn.q_proj.weight")]
    found = {"after": answers(after), "sent": answers(before, sent)}
    print("found", json.dumps(found | {"part": answers(part), "sent part": answers(before, matrix)}))


if __name__ == "__main__":
    main()
