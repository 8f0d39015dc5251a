"""`loraplex quantize`: writes a quantised copy of a checkpoint, with the packages that others made for it."""
