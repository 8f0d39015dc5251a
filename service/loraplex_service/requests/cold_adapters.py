"""Requests whose adapter is not on the device: they wait, go without, or fail, as their policy says."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loraplex.v1.generation_pb2 import ON_COLD_FAIL, ON_COLD_USE_BASE, AdapterPolicy
from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.versions import AdapterVersion
from loraplex_engine.link.client import EngineClient
from loraplex_service.errors import InvalidRequest, Unavailable, unusable_adapter
from loraplex_service.names.target import Target
from loraplex_service.timestamps import duration_seconds


class Wait(NamedTuple):
    """A request's wait for its adapter."""

    seconds: float  # so far
    seconds_left: float | None  # that it may still wait; None: for ever


NO_WAIT = Wait(0.0, None)  # of a request without an adapter


class ColdAdapters:
    """Has engines load the adapters that requests need, and lets each request wait as long as its policy says."""

    def __init__(self, adapter_path: Callable[[AdapterVersion], str], max_load_wait_seconds: float) -> None:
        """`adapter_path`: the directory with a version's files, resolved and allowed, for engines to read."""
        self._adapter_path = adapter_path
        self._max_load_wait_seconds = max_load_wait_seconds

    def goes_without(self, target: Target, policy: AdapterPolicy, path: str) -> bool:
        """Whether the request goes on with the base model alone, because its adapter is cold and its policy is not to
        wait.

        The adapter is brought to the device all the same, for later requests. `path`: the field that names it. Raises
        Unavailable (ADAPTER_COLD) if the policy is to fail, what `unusable_adapter` returns for an adapter that failed
        to load, and InvalidRequest for a sum that is not defined.
        """
        _check_composable(target, path)
        key, client = target.adapter_key, target.model.client
        if key is None or client.adapters.on_device(key):
            return False
        if policy.on_cold in (ON_COLD_FAIL, ON_COLD_USE_BASE) or policy.HasField("max_load_wait"):
            for version in target.versions:
                if client.adapters.facts(version.key) is None:
                    client.adapters.start_loading(version.key, self._adapter_path(version), ahead=True)
            try:
                client.adapters.start_bringing(key)
            except AdapterRejected as error:
                if policy.on_cold == ON_COLD_FAIL:  # else each call would be told to try again
                    raise unusable_adapter(target.resolved().adapter_version, str(error), error.reason) from error
        if policy.on_cold == ON_COLD_FAIL:
            raise _cold(target, "is not on the device; it is being brought there")
        return policy.on_cold == ON_COLD_USE_BASE

    async def load(self, target: Target, policy: AdapterPolicy, time_limit_seconds: float | None, path: str) -> Wait:
        """Have the engine read the target's adapters into host memory. The scheduler brings them to the device later.

        The wait ends at the request's time limit at the latest, whether or not the adapters have been read. Raises
        Unavailable (ADAPTER_COLD), what `unusable_adapter` returns, and InvalidRequest for a sum that is not defined.
        """
        may_wait = self._wait_seconds(policy)
        try:
            async with asyncio.timeout(time_limit_seconds):
                waited = await self._load(target, may_wait)
        except TimeoutError:
            assert time_limit_seconds is not None
            waited = time_limit_seconds
        _check_composable(target, path)
        return Wait(waited, max(may_wait - waited, 0.0))

    async def hold(self, client: EngineClient, versions: Sequence[AdapterVersion]) -> float:
        """Have an engine read adapters into host memory, and wait until it holds them all at once.

        Returns the seconds that it took. Raises what `unusable_adapter` returns, and the error with which the engine
        ended.
        """
        loop = asyncio.get_running_loop()
        began, seconds = loop.time(), 0.0
        while missing := [version for version in versions if client.adapters.facts(version.key) is None]:
            for version in missing:  # while one is waited for, another may be unloaded
                try:
                    await client.adapters.load(version.key, self._adapter_path(version))
                except AdapterRejected as error:
                    raise unusable_adapter(version.version_name, str(error), error.reason) from error
            seconds = loop.time() - began
        return seconds

    def _wait_seconds(self, policy: AdapterPolicy) -> float:
        if policy.on_cold == ON_COLD_FAIL:
            return 0.0  # it was on the device when the request arrived
        if policy.HasField("max_load_wait"):
            return min(self._max_load_wait_seconds, duration_seconds(policy.max_load_wait))
        return self._max_load_wait_seconds

    async def _load(self, target: Target, wait_seconds: float) -> float:
        """Load the adapters. Returns the seconds that it took."""
        try:
            async with asyncio.timeout(wait_seconds):
                return await self.hold(target.model.client, target.versions)
        except TimeoutError:
            raise _cold(target, f"is not loaded after {wait_seconds:g} s; it goes on loading") from None


def _check_composable(target: Target, path: str) -> None:
    """Raise InvalidRequest if the target is a weighted sum with an adapter that cannot be part of a sum."""
    for version, _ in target.parts:
        loaded = target.model.client.adapters.facts(version.key)
        if loaded is not None and loaded.whole:
            raise InvalidRequest.at(path, f"adapter {version.version_name} cannot be composed: {loaded.whole}")


def _cold(target: Target, problem: str) -> Unavailable:
    return Unavailable("ADAPTER_COLD", f"adapter {target.resolved().adapter_version} {problem}, try again")
