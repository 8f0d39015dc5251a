"""The engine process: one base model, its adapters, and every request that runs on them, one step at a time.

`core` is the engine without a process around it: it adds requests and takes steps; `process` is the loop around it. A
step is planned in `scheduling` and computed in `execution`, by a model from `models`, which is built from `layers` and
read from `checkpoint` and `quantization`. The service imports `link` alone, which needs no torch.
"""
