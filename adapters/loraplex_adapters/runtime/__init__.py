"""An adapter as tensors: read, bound to the modules of a model, kept, and applied beside its linear layers."""
