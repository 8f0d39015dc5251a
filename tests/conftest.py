"""Without a GPU the Triton kernels are tested under Triton's interpreter; asserts count under `python -O` too."""

import os
from pathlib import Path

import pytest

# Triton decides when it is first imported, and transformers imports it: so before any test module is.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Threads of OpenMP wait by spinning: those of two processes would wait for each other's cores. Engines inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# pytest rewrites the asserts of test modules, so that `python -O` leaves them in; what tests share is asked for here.
pytest.register_assert_rewrite(
    *(f"tests.{room}" for room in ("service", "engine", "adapters", "client", "e2e", "faults", "reference", "docs"))
)
