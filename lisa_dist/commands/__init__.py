"""The verbs of `lisa-dist`."""
