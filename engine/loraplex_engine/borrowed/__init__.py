"""Models that no native family reads, computed by transformers' own classes.

What a step reads and writes stays ours: attention over the paged cache (`attention`), linears and the embedding with
adapters beside them (`modules`), weights (`loading`). The rest is the class's code. `probe` finds out what a class
does, and refuses what would not be right; `comparison` holds a loaded model against its class's own attention.
"""
