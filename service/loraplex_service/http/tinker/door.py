"""The endpoints of Tinker's REST API."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from loraplex_service.http.exchange import Exchange, Handler, telling
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import Draft, Table
from loraplex_service.http.service import Clients, ServiceClient, call_options
from loraplex_service.http.tinker import api
from loraplex_service.http.tinker.api import API
from loraplex_service.http.tinker.futures import Futures
from loraplex_service.http.tinker.table import CREATE, SAMPLE

SAMPLERS, SESSIONS = f"{API}samplers/", f"{API}sessions/"  # behind which a name follows


class Serving(Protocol):
    """How a door reads a body and calls the service."""

    async def draft(self, exchange: Exchange, table: Table) -> Draft: ...

    async def serve(
        self, exchange: Exchange, draft: Draft, work: Callable[[ServiceClient], Coroutine[Any, Any, None]]
    ) -> None: ...


class TinkerDoor:
    """Answers at the paths below API. Bodies of samples are read by tables; of others nothing counts but an id."""

    def __init__(self, serving: Serving, clients: Clients, futures: Futures) -> None:
        self._serving = serving
        self._clients = clients
        self._futures = futures
        self.endpoints: Mapping[str, tuple[str, Handler]] = {
            CREATE.path: ("POST", self._create),
            SAMPLE.path: ("POST", self._sample),
            f"{API}create_session": ("POST", lambda exchange: exchange.answer(api.new_session())),
            f"{API}get_server_capabilities": ("GET", self._capabilities),
            f"{API}retrieve_future": ("POST", self._fetch),
            f"{API}cancel_future": ("POST", self._cancel),
            **{f"{API}{path}": (method, telling(content)) for path, (method, content) in api.TOLD.items()},
            **{f"{API}{path}": ("POST", _refuse) for path in api.REFUSED},
        }
        self.below: Mapping[str, tuple[str, Handler]] = {
            SAMPLERS: ("GET", self._sampler),
            SESSIONS: ("POST", telling({})),  # a session is finished
        }

    async def _capabilities(self, exchange: Exchange) -> None:
        api.begin(exchange)
        with self._clients.lease() as client:
            await exchange.answer(await api.capabilities(client, call_options(exchange)))

    async def _sampler(self, exchange: Exchange) -> None:
        api.begin(exchange)
        name = exchange.path.removeprefix(SAMPLERS)
        with self._clients.lease() as client:
            await exchange.answer(await api.sampler(client, name, call_options(exchange)))

    async def _create(self, exchange: Exchange) -> None:
        api.begin(exchange)
        draft = await self._serving.draft(exchange, CREATE)

        async def create(client: ServiceClient) -> None:
            await exchange.answer(await api.create_sampling_session(client, draft, call_options(exchange)))

        await self._serving.serve(exchange, draft, create)

    async def _sample(self, exchange: Exchange) -> None:
        api.begin(exchange)
        draft = await self._serving.draft(exchange, SAMPLE)

        async def begin(client: ServiceClient) -> None:
            await exchange.answer(await api.begin_sample(exchange, client, self._clients, self._futures, draft))

        await self._serving.serve(exchange, draft, begin)

    async def _fetch(self, exchange: Exchange) -> None:
        await api.fetch(exchange, self._futures, await self._named(exchange))

    async def _cancel(self, exchange: Exchange) -> None:
        self._futures.cancel(await self._named(exchange), api.owner(exchange))
        await exchange.answer({})

    async def _named(self, exchange: Exchange) -> str:
        """The id of the sample that a body names. Bodies are small: who has begun none may not send more."""

        async def refuse() -> None:
            raise Refusal(413, "the body has more than an id", code="message_too_large")

        api.begin(exchange)
        return await exchange.read(refuse, api.request_id)


async def _refuse(exchange: Exchange) -> None:
    raise Refusal(400, f"{exchange.path}: {api.WHY_REFUSED}", code="unsupported_call")
