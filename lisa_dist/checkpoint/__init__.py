"""Checkpoints: save, resume, export."""
