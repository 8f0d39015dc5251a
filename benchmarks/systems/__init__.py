"""The systems under test, one file each. Each runs as `python -m benchmarks.systems.NAME` in its own environment."""
