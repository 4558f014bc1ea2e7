"""Training data: sources, formats, tokens."""
