"""The way of every request to an engine: what its name means, admission, the wait for its adapters, its record."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from loraplex.v1.generation_pb2 import AdapterPolicy
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.versions import AdapterVersion
from loraplex_engine.link.client import EngineClient
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.admission import Admission
from loraplex_service.admission.tenants import Tenant, Tenants
from loraplex_service.call import Call
from loraplex_service.call_errors import status_name
from loraplex_service.errors import LoraplexError, Unavailable
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.target import Target
from loraplex_service.requests.cold_adapters import NO_WAIT, ColdAdapters, Wait
from loraplex_service.requests.in_flight import InFlight, Requests, Work
from loraplex_service.telemetry.records import NOBODY, Observer


async def keeps_nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Size:
    """The work that a request asks for at most."""

    prompt_tokens: int
    outputs: int
    max_tokens: int  # of each output
    held_back_tokens: int = 0  # of the prompts, those that come to the engine only when others have ended


@dataclass(frozen=True, slots=True)
class Entered:
    """A request that was let in, and whose adapters its engine has read."""

    target: ResolvedTarget  # as the caller is told
    adapter: AdapterKey | None  # None: the base model
    wait: Wait
    start: Callable[[], None]  # to be called at its first result
    successor: Callable[[], Awaitable[EngineClient]]  # waits for the next engine after one has died


class Entrance:
    """Lets requests in, one by one, and keeps account of those that are inside."""

    def __init__(
        self,
        catalog: Catalog,
        admission: Admission,
        tenants: Tenants,
        adapter_path: Callable[[AdapterVersion], str],
        max_load_wait_seconds: float = 60.0,
        resume_seconds: float = 60.0,
        observer: Observer = NOBODY,
        adapter_texts: AdapterTexts | None = None,
        recorded: Callable[[], Awaitable[None]] = keeps_nothing,
    ) -> None:
        """`adapter_path`: the directory with a version's files, resolved and allowed, for engines to read.
        `resume_seconds`: how long a request that has begun waits for the next engine after one has died. `recorded`:
        waits until observers have stored the records of ended requests: callers see an end only then.
        """
        self.tenants = tenants
        self.requests = Requests()
        self.recorded = recorded
        self._catalog = catalog
        self._admission = admission
        self._adapter_texts = adapter_texts or AdapterTexts(adapter_path)
        self._cold_adapters = ColdAdapters(adapter_path, max_load_wait_seconds)
        self._resume_seconds = resume_seconds
        self._observer = observer

    async def target(self, call: Call, tenant: Tenant, name: str, path: str) -> Target:
        """What `name` means now, with the text of its adapter. `path`: the field that holds the name.

        Raises what `Catalog.resolve` does, and what `Admission.check` does where no request would be let in.
        """
        target = self._catalog.resolve(call.tenant, name, path, call.routing_key)
        target = await self._adapter_texts.dressed(target)
        self._admission.check(target.model.name, target.model.limits, tenant.name, tenant.config.weight)
        return target

    @asynccontextmanager
    async def entered(
        self,
        known: InFlight,
        tenant: Tenant,
        target: Target,
        policy: AdapterPolicy,
        size: Size,
        time_limit_seconds: float | None,
        path: str,
    ) -> AsyncIterator[Entered]:
        """Let a request in for the length of the block, and wait for its adapters, at most to its time limit.

        `path`: the field that names the target. Raises what `Tenant.spending`, `Admission.enter`, `Catalog.using` and
        `ColdAdapters` raise.
        """
        call, model = known.call, target.model
        expected = self._admission.expected_tokens(size.prompt_tokens, size.outputs, size.max_tokens)
        with (
            tenant.spending(expected, call.used_tokens),
            self._admission.enter(
                model.name,
                model.limits,
                size.prompt_tokens - size.held_back_tokens,
                size.outputs,
                size.max_tokens,
                tenant.name,
                tenant.config.weight,
                call.seconds_left(),
            ),
            self._catalog.using(target.versions) as start,
        ):
            without = self._cold_adapters.goes_without(target, policy, path)
            resolved = target.resolved(fell_back_to_base=without)
            if resolved.adapter_version:
                call.metadata["loraplex-adapter-version"] = resolved.adapter_version
                call.metadata["loraplex-adapter"] = " + ".join(version.name for version in target.versions)
            await call.admit()
            adapter, wait = None if without else target.adapter_key, NO_WAIT
            if adapter is not None:
                async with known.waiting():
                    wait = await self._cold_adapters.load(target, policy, time_limit_seconds, path)
            yield Entered(resolved, adapter, wait, start, partial(self._successor, target, adapter))

    @asynccontextmanager
    async def working(self, known: InFlight, work: Work) -> AsyncIterator[None]:
        """Mark the request as running. However the block ends, its engine then forgets the request."""
        call = known.call
        call.usage = work.usage
        known.runs(work)
        status, caller_waits = "OK", True
        try:
            yield
        except BaseException as error:
            status, caller_waits = status_name(error, call), isinstance(error, Exception)
            raise
        finally:
            if not call.recorded:
                self.record(call, work, status)
            work.close()
            if caller_waits:
                await self.recorded()

    def record(self, call: Call, work: Work, status: str) -> None:
        """Tell the observers how a request has ended."""
        call.recorded = True
        self._observer.generation_ended(call, work.record(status, call.trace_id))

    def end_all(self, error: LoraplexError) -> None:
        """End every request in flight with this error."""
        self.requests.end_all(error)

    async def _successor(self, target: Target, adapter: AdapterKey | None) -> EngineClient:
        """Wait for the next engine after one has died, until it holds the request's adapters.

        Raises Unavailable (ENGINE_RESTARTING) if it takes too long, and what `Catalog.successor` and
        `ColdAdapters.hold` raise.
        """
        versions = () if adapter is None else target.versions  # None: it went on with the base model
        try:
            async with asyncio.timeout(self._resume_seconds):
                while True:
                    client = await self._catalog.successor(target.model)
                    try:
                        await self._cold_adapters.hold(client, versions)
                        return client
                    except Unavailable:
                        if client.error is None:  # else the next engine died as well
                            raise
        except TimeoutError:
            seconds = f"{self._resume_seconds:g} s"
            message = f"the engine of model {target.model.name!r} is not back after {seconds}; try again"
            raise Unavailable("ENGINE_RESTARTING", message) from None
