"""The computation of a step: its tensors, the forward pass, and the tokens that are drawn.

`loading` makes the runner, with a cache of the size that `kv_cache` and `memory_profile` find; `model_runner` executes
a plan; `arrays` lays it out as plain data, `batch` makes tensors of these, `sampler` draws, and `cuda_graph` replays
decoding steps on a GPU.
"""
