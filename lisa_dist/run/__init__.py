"""A run from the command line: its arguments, their checks, what they are settled as, and its course."""
