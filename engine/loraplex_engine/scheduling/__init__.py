"""Who runs in the next step, and on which blocks of the cache. It needs no torch: a plan is data."""
