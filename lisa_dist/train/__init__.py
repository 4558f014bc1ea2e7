"""Training runs: the Trainer integration, its arguments, and a run from start to end."""
