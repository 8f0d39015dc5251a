"""LoRA adapters: read them, check them, keep them, hand them out.

An adapter is a PEFT directory. Its files are found and described without torch (`source`, `safetensors`, `config`,
`pattern`, `names`), and what exists is written down (`registry`); that much the service imports. In the engine, loader
threads read an adapter (`weights`) and bind it to the model's modules (`targets`) tensor by tensor (`binding`), with
scales, magnitudes and biases worked out (`folding`); it is kept in host memory (`store`), given a slot on the device
(`pool`), alone or as a weighted sum of several (`composition`), and applied beside a linear layer (`layer`) or in place
of parameters of the base (`replaced`). Its identity everywhere is an `AdapterKey` (`key`): a name and the digest of its
content. What can be wrong with it is in `errors`.
"""
