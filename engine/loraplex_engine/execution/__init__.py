"""The computation of a step: its tensors, the forward pass, and the tokens that are drawn.

`model_runner` executes a plan; `batch` lays it out as tensors, `sampler` draws, `kv_cache` and `memory_profile` size
the cache, and `cuda_graph` replays decoding steps on a GPU.
"""
