"""Memory of a training step: planned before a run, measured in it."""
