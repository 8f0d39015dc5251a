"""The control plane: the methods that operators and tools call, other than generation.

AdapterService, ModelService, RouteService and ServerService on the admin port, TokenizerService on the data port. They
turn requests into calls of the registry, the deployer and the host, and turn their state into resources. What they
share is in `paging`, `once` and `waiting`. `metrics_page` shows that state to Prometheus.
"""
