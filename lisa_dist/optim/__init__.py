"""The optimizer over flat partitions: AdamW, its kernels, its states."""
