"""LoRA adapters: read them, check them, keep them, hand them out.

`files` knows an adapter as a PEFT directory: it finds, fetches, checks and describes it without torch. `runtime` knows
it as tensors: read, bound to a model, kept and applied. `registry` says which adapters exist, `versions` what a version
is, `records` what of them outlives a process. An adapter's identity everywhere is an `AdapterKey` (`key`): a name and
the digest of its content. Its errors are in `errors`.
"""
