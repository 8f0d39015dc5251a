"""What the product itself has logged."""

import logging

import pytest

ROOMS = ("loraplex_service", "loraplex_engine", "loraplex_adapters", "loraplex_kernels", "loraplex", "loraplex_demo")


def own_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Records of our own loggers. Libraries log beside them: gRPC's poller of loops that earlier tests have closed."""
    return [record for record in caplog.records if record.name.partition(".")[0] in ROOMS]


def is_of_closed_loop(record: logging.LogRecord) -> bool:
    """Whether gRPC's poller, which all loops of a process share, met an event of a loop that an earlier test closed."""
    error = record.exc_info[1] if record.exc_info else None
    return record.name == "asyncio" and isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
