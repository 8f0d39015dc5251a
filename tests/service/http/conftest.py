"""What the tests of the HTTP door share."""

from collections.abc import AsyncIterator

import pytest

from tests.service.control_plane import ControlPlane
from tests.service.http.caller import Caller, caller_of


@pytest.fixture
async def caller(control: ControlPlane) -> AsyncIterator[Caller]:
    """In front of the service with the model "tiny" loaded and "other" not; it gives each prompt back."""
    async with caller_of(control.addresses.data) as caller:
        yield caller
