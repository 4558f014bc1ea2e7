"""Evaluation of a model on benchmark tasks and MT-Bench."""
