"""How a loss is computed from hidden states: logits of labels, chunks, or Liger's kernels."""
