"""Imported last where ranks are forked: what is there by then is never collected, and no child walks or copies it."""

import gc

gc.collect()
gc.freeze()
# `lisa_dist.zero` asks at every switch whether objects are set aside, and counting them takes as long as walking.
gc.get_freeze_count = lambda: 1
