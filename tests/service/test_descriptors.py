"""The server may open as many files and sockets as its callers may make it."""

import logging
import resource
from collections.abc import Iterator

import pytest

from loraplex_service.config import ServiceConfig
from loraplex_service.descriptors import SPARE, descriptors_needed, raise_descriptor_limit
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.ports.config import LimitsConfig


@pytest.fixture
def low_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_each_listener_counts() -> None:
    config = ServiceConfig(
        models=(HostedModelConfig(name="m", model="/m"),),
        health_listen="127.0.0.1:1",
        limits=LimitsConfig(connections=100),
    )
    assert descriptors_needed(config) == 3 * 100 + SPARE


@pytest.mark.usefixtures("low_limit")
def test_the_limit_is_raised_to_what_is_needed_and_never_lowered() -> None:
    raise_descriptor_limit(300)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300
    raise_descriptor_limit(10)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300


@pytest.mark.usefixtures("low_limit")
def test_what_the_system_does_not_allow_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.WARNING):
        raise_descriptor_limit(hard + 1)
    assert "lower limits.connections" in caplog.text
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
