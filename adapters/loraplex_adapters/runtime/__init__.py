"""An adapter as tensors: read, bound to the modules of a model, kept, and applied beside its linear layers.

Threads of their own (`loader_threads`) read an adapter (`weights`), one that is uploaded while it comes (`arrivals`),
bind it to the model's modules (`targets`) tensor by tensor (`binding`) and work out scales, magnitudes and biases
(`folding`, `copies`). It is kept in host memory (`store`), given a slot on the device (`pool`), alone or as a weighted
sum of several (`composition`), and applied beside a linear layer (`layer`) or in place of parameters of the base
(`replaced`).
"""
