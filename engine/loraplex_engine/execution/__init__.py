"""What a step computes: its tensors, the cache, the forward pass, the tokens that are drawn."""
