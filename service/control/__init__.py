"""The control plane: what operators and tools call, beside generating.

AdapterService, ModelService, RouteService and ServerService on the admin port, TokenizerService on the data port. They
turn requests into calls of the registry, the deployer and the host, and what those know into resources.
"""
