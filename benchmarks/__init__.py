"""Benchmarks: how fast Loraplex is, next to what else could do the work, on one machine in one run.

`serving` drives whole systems with the same requests, `kernels` times the operations, `roofline` measures what the
machine could do, `scheduler` what planning a step costs, `report` draws. Nothing here runs in the tests.
"""
