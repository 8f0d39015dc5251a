"""Load for a running server, and what its callers saw: the clocks and figures of `loraplex bench` and of benchmarks/.

`loops` sends requests, closed or open; `records` turns the moments at which tokens came into figures; `plans` draws the
requests of `loraplex bench`; `doors` sends them over gRPC or HTTP; `runs` puts these together, and `report` says what
came of it. `records` and `loops` need the standard library alone: benchmarks of other systems import them in those
systems' own environments.
"""
