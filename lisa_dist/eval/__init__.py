"""Evaluation of a model: benchmark tasks and MT-Bench."""
