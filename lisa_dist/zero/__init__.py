"""ZeRO partitions rebuilt in place: the only folder that touches DeepSpeed's private fields."""
