"""Reports of a run that has left its files."""
