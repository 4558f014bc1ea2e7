"""The report of a run and the comparison of layerwise norms, from the files in an output folder."""
