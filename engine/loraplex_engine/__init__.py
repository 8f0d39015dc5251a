"""The engine process: one base model, its adapters, and every request that runs on them, one step at a time.

Start with `core` (add, abort, step), then `scheduler` (who runs), `model_runner` (what is computed) and `process` (how
it is reached). `messages`, `sampling_params`, `config`, `bus` and `client` need no torch: the service imports them.
"""
