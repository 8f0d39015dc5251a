"""LoRA adapters: read them, check them, keep them, hand them out.

An adapter is a PEFT directory. It is read and checked here (`config`, `weights`, `binding`), kept in host memory
(`store`), given a slot on the device (`pool`) and applied beside a linear layer (`layer`). Its identity everywhere is
an `AdapterKey`: a name and the digest of its content. `key`, `config`, `source` and `registry` need no torch.
"""
