"""Names of other libraries that are replaced outside `lisa_dist/zero`, whose own table is for DeepSpeed's optimizers.

A replacement is made by `patch` or `patched` alone, and has an entry here: what is replaced and why, the request
upstream or else the option that is wanted, and the condition on which the entry and the code that uses it can go.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

# What: why. Upstream: where it was asked for, or what is wanted. Remove when ....
PATCHES = {
    "compiled_call": "torch.nn.Module._compiled_call_impl: a generation's cache would take a graph for each "
    "layer. Upstream: wanted, Module.compile for passes with gradients alone. Remove when it has that.",
    "eval_extras": "tqdm and get_git_commit_hash of lm-eval: a bar for each task and rank, a call of git. Upstream: "
    "wanted, options of evaluate. Remove when bars and git can be turned off by them.",
    "few_shots": "build_all_requests and _instances of lm-eval's tasks: examples would depend on the number of ranks. "
    "Upstream: EleutherAI/lm-evaluation-harness#1308. Remove when they are sampled by the item's number.",
    "fp32_product": "torch.nn.Linear.forward, on CPUs that do not multiply bf16: it would be some 20 times slower. "
    "Upstream: pytorch/pytorch#146508. Remove when torch multiplies bf16 in fp32 on such CPUs.",
    "frozen_forward": "forward of a module with frozen weights: they are in fewer bits. Upstream: wanted, a quantized "
    "tensor that keeps its original elsewhere. Remove when a module's weight can be one.",
    "grouped_experts": "transformers.integrations.moe._can_use_grouped_mm, in a trace: fake tensors have it in bf16 "
    "alone. Upstream: pytorch/pytorch#159547. Remove when torch._grouped_mm has a meta kernel for all precisions.",
    "head_gradient": "trl.trainer.utils._ChunkedLogProbFunction: the head's gradient would be whole in fp32. Upstream: "
    "wanted, a gradient in the weights' precision, chunk by chunk. Remove when TRL computes that.",
    "hidden_secrets": "__class__ of TrainingArguments: pickles have tokens, dicts have keys and passwords. Upstream: "
    "huggingface/transformers#13700 masks names in _token alone. Remove when it masks all of them, in pickles too.",
    "label_logits": "forward of a model with TRL's fused head: it would compute logits twice. Upstream: wanted, a "
    "loss_type for logits of labels, kept. Remove when SFTConfig has one.",
    "liger_loss": "forward of a model with TRL's fused head: it would never call Liger's loss. Upstream: wanted, "
    "Liger's loss with the metrics of a fused head. Remove when SFTConfig takes both.",
    "metrics_of_parts": "gather_for_metrics of an Accelerator, where ranks share rows: it would cut values of ranks to "
    "a number of rows. Upstream: wanted, a gather of metrics by rank. Remove when TRL counts tokens by gather.",
    "no_compiler": "trl.kernels.chunked_logprob._TRITON_AVAILABLE: without a C compiler a step would end in an error. "
    "Upstream: wanted, a look for the compiler, or a variable. Remove when TRL has either.",
    "packed_mask": "transformers.masking_utils.find_packed_sequence_indices, in a trace: it reads values, and fake "
    "tensors have none (since huggingface/transformers#39194). Upstream: wanted, to be told that rows are not packed. "
    "Remove when a model's arguments can do that.",
    "repeated_rows": "batch_sampler, dataset and collate_fn of a DataLoader that Accelerate has prepared: rows that it "
    "repeats to fill the last batches would count twice in the loss. Upstream: wanted, a mark on repeated rows. Remove "
    "when Accelerate's loaders tell which rows are repeated.",
    "rollouts": "four names of TRL's VLLMGeneration, and generate of its client: all weights would be sent each time. "
    "Upstream: wanted, a hook that names what has changed. Remove when TRL has it.",
    "step_meter": "backward of DeepSpeed's engine and step of its optimizer: memory is read before them. Upstream: "
    "wanted, hooks at both. Remove when ZeRO's optimizers call step hooks, and the engine one before backward.",
    "tiles": "_forward_tile, _backward_tile and _addmm_fp32 of trl.kernels.chunked_logprob, in a trace: the first two "
    "are Triton's on a GPU. Upstream: wanted, kernels with meta implementations. Remove when they have those.",
    "tiles_of_mlp": "forward of an MLP in a checkpointed layer: of a long row it would store the most that a step "
    "does. Upstream: wanted, checkpoints of tiles. Remove when transformers can checkpoint an MLP by tiles.",
    "traced_fp8": "fp8_rows of lisa_dist.core.fp8_product, in a trace: a Triton kernel takes no fake tensors. "
    "Upstream: wanted here, an operator of our own. Remove when the kernel has a meta implementation.",
    "traced_liger": "what Liger replaced in transformers and torch, in a trace: Triton would take a null pointer. "
    "Upstream: linkedin/Liger-Kernel#242. Remove when Liger replaces names of one model alone.",
    "weight_conversions": "_weight_conversions of a model: under ZeRO-3 those never done would be undone. Upstream: "
    "close to huggingface/transformers#46650. Remove when transformers keeps those that a model was loaded by.",
    "zero3_init": "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref: a model of shapes would be "
    "partitioned. Upstream: huggingface/transformers#28106. Remove when from_config can do without ZeRO-3.",
}


def patch(owner: Any, name: str, replacement: Any, *, of: str) -> None:
    """Replace an attribute that `owner`, of another library, must have; `of` is its key in the table."""
    assert of in PATCHES, of
    assert hasattr(owner, name), f"{type(owner).__name__} has no {name} any more; {PATCHES[of]}"
    setattr(owner, name, replacement)


@contextlib.contextmanager
def patched(owner: Any, name: str, replacement: Any, *, of: str) -> Iterator[None]:
    """`patch` for as long as the body runs: then `owner` has its own value again, or that of its class."""
    has_own, own = name in vars(owner), vars(owner).get(name)
    patch(owner, name, replacement, of=of)
    try:
        yield
    finally:
        if has_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
