"""What the product itself has logged."""

import logging

import pytest

ROOMS = ("service", "engine", "adapters", "kernels", "loraplex", "demo")


def own_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Records of our own loggers. Libraries log beside them: gRPC's poller of loops that earlier tests have closed."""
    return [record for record in caplog.records if record.name.partition(".")[0] in ROOMS]
