"""The endpoints, as an ASGI application."""

import asyncio
import base64
import logging
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from loraplex import LoraplexError
from loraplex.v1.pooling_pb2 import EmbedResponse
from loraplex.v1.tokenizer_pb2 import DetokenizeResponse, TokenizeResponse
from loraplex_service.http import openapi, trainers
from loraplex_service.http.adapters import LOAD, UNLOAD, load, unload
from loraplex_service.http.answers import Answers, ChatAnswers, TextAnswers, version_header
from loraplex_service.http.catalog import listed, page, retrieved
from loraplex_service.http.exchange import Exchange, Handler, Receive, Room, Send, telling
from loraplex_service.http.failures import REQUEST_ID, Failure, Refusal, anthropic_error, failed, openai_error, refused
from loraplex_service.http.generations import echoes, generate
from loraplex_service.http.hosts import Hosts
from loraplex_service.http.messages.answers import MessageAnswers
from loraplex_service.http.messages.table import COUNT, MESSAGES
from loraplex_service.http.parameters import Draft, Table
from loraplex_service.http.responses.answers import ResponseAnswers
from loraplex_service.http.responses.table import RESPONSES
from loraplex_service.http.service import Clients, ServiceClient, call_options
from loraplex_service.http.tables import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE
from loraplex_service.http.tinker.door import TinkerDoor
from loraplex_service.http.tinker.futures import Futures

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
MODEL = "/v1/models/"
METHODS = {"GET": ("GET", "HEAD"), "POST": ("POST",)}  # uvicorn leaves out the body of an answer to HEAD
HEALTH_SECONDS = 2.0  # for the service to say how it is
OTHER = "other"  # what is no endpoint


class Endpoint(NamedTuple):
    """What answers at a path."""

    method: str
    handler: Handler


def _reading(table: Table, handler: Handler) -> dict[str, Endpoint]:
    """The endpoint that reads bodies by a table."""
    return {table.path: Endpoint("POST", handler)}


def _words(exchange: Exchange) -> Callable[[Failure], dict[str, Any]]:
    """How the API that is called tells what went wrong. Of models both APIs know."""
    of_models = exchange.path.startswith("/v1/models") and "anthropic-version" in exchange.headers
    return anthropic_error if of_models or exchange.path.startswith(MESSAGES.path) else openai_error


class Door:
    """The application. Each request becomes a call of the service, which is cancelled when its caller leaves."""

    def __init__(
        self, clients: Clients, room: Room, version: str, admin: Clients | None = None, hosts: Hosts | None = None
    ) -> None:
        """`admin`: for calls of the admin port; None: there are none over HTTP. `hosts`: None: any."""
        self._clients = clients
        self._admin = admin
        self._room = room
        self._version = version
        self._hosts = hosts or Hosts()
        self.samples = Futures(room.waiting_bytes)
        tinker = TinkerDoor(self, clients, self.samples)
        self.answered = Counter[tuple[str, str]]()  # by endpoint and status; whoever tells them clears it
        self._endpoints = {
            "/health": Endpoint("GET", self._health),
            "/version": Endpoint("GET", self._tell_version),
            "/v1/models": Endpoint("GET", self._models),
            "/openapi.json": Endpoint("GET", self._document),
            "/docs": Endpoint("GET", self._page),
            **_reading(CHAT, self._generation(CHAT, ChatAnswers)),
            **_reading(COMPLETIONS, self._completions),
            **_reading(RESPONSES, self._generation(RESPONSES, ResponseAnswers)),
            **_reading(EMBEDDINGS, self._embeddings),
            **_reading(TOKENIZE, self._tokenize),
            **_reading(DETOKENIZE, self._detokenize),
            **_reading(MESSAGES, self._generation(MESSAGES, MessageAnswers)),
            **_reading(COUNT, self._count),
            **_reading(LOAD, self._load),
            **_reading(UNLOAD, self._unload),
            **{path: Endpoint("POST", _needless(why)) for path, why in trainers.NEEDLESS.items()},
            **{path: Endpoint("POST", _refusing(path, why)) for path, why in trainers.REFUSED.items()},
            **{path: Endpoint("GET", telling(content)) for path, content in trainers.TOLD.items()},
            trainers.NO_SETTINGS: Endpoint("GET", _refusing(trainers.NO_SETTINGS, trainers.WHY_NO_SETTINGS)),
            **{path: Endpoint(*each) for path, each in tinker.endpoints.items()},
        }
        self._below = {MODEL: Endpoint("GET", self._model)}  # behind these a name follows
        self._below |= {path: Endpoint(*each) for path, each in tinker.below.items()}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._room)
        exchange.path = trainers.ALIASES.get(exchange.path, exchange.path)
        try:
            exchange.told = _words(exchange)
            endpoint = self._endpoint(exchange.path)
            self._hosts.check(exchange.headers)
            if exchange.method not in METHODS[endpoint.method]:
                allowed = ", ".join(METHODS[endpoint.method])
                raise Refusal(405, f"{exchange.path} takes {endpoint.method} alone", allow=allowed)
            await endpoint.handler(exchange)
        except ConnectionError:
            return  # the caller left
        except Refusal as refusal:
            await exchange.tell(refused(refusal))
        except LoraplexError as error:
            await exchange.tell(failed(error))
        except Exception:
            logger.exception("%s failed", exchange.path)
            await exchange.tell(refused(Refusal(500, "the server failed; its log says why")))
        finally:
            self.answered[self._label(exchange.path), str(exchange.status)] += 1

    def _prefix(self, path: str) -> str | None:
        return next((prefix for prefix in self._below if path.startswith(prefix)), None)

    def _label(self, path: str) -> str:
        return path if path in self._endpoints else self._prefix(path) or OTHER

    def _endpoint(self, path: str) -> Endpoint:
        if (prefix := self._prefix(path)) is not None:
            return self._below[prefix]
        if path not in self._endpoints:
            raise Refusal(404, f"there is no {path[:200]} here; docs/http.md lists what there is", code="unknown_url")
        return self._endpoints[path]

    # ---- what there is -----------------------------------------------------------------------------------------------

    async def _health(self, exchange: Exchange) -> None:
        with self._clients.lease() as client:
            serving = await client.serves_within(HEALTH_SECONDS)
        await exchange.answer({"status": "ok" if serving else "not serving"}, 200 if serving else 503)

    async def _tell_version(self, exchange: Exchange) -> None:
        await exchange.answer({"version": self._version})

    async def _document(self, exchange: Exchange) -> None:
        await exchange.page(self._documents[0], "application/json")

    async def _page(self, exchange: Exchange) -> None:
        await exchange.page(self._documents[1], "text/html; charset=utf-8", headers=openapi.PAGE_HEADERS)

    @cached_property
    def _documents(self) -> tuple[bytes, bytes]:
        return msgspec.json.encode(openapi.document(self._version)), openapi.page(self._version)

    async def _models(self, exchange: Exchange) -> None:
        call = call_options(exchange)
        with self._clients.lease() as client:
            models = await _unless_gone(exchange, listed(client, call))
        await exchange.answer(page(models, exchange.query))

    async def _model(self, exchange: Exchange) -> None:
        name, call = exchange.path.removeprefix(MODEL), call_options(exchange)
        with self._clients.lease() as client:
            model = await _unless_gone(exchange, retrieved(client, name, call))
        await exchange.answer(model)

    # ---- generations -------------------------------------------------------------------------------------------------

    def _generation(self, table: Table, answers: type[Answers]) -> Handler:
        """Answers with one generation."""

        async def handle(exchange: Exchange) -> None:
            draft = await self.draft(exchange, table)
            most = self._room.body_bytes
            work = partial(generate, exchange, draft=draft, answers=answers(draft), most_bytes=most)
            await self.serve(exchange, draft, work)

        return handle

    async def _completions(self, exchange: Exchange) -> None:
        draft = await self.draft(exchange, COMPLETIONS)
        if draft.echo and draft.message.output.logprobs:
            draft.message.output.prompt_logprobs = draft.message.output.top_logprobs

        async def complete(client: ServiceClient) -> None:
            said = await echoes(exchange, client, draft) if draft.echo else ()
            await generate(exchange, client, draft, TextAnswers(draft, said), self._room.body_bytes)

        await self.serve(exchange, draft, complete)

    # ---- numbers and tokens ------------------------------------------------------------------------------------------

    async def _embeddings(self, exchange: Exchange) -> None:
        draft = await self.draft(exchange, EMBEDDINGS)

        async def embed(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            response = await client.ask("PoolingService/Embed", draft.message, EmbedResponse, call)
            headers = {REQUEST_ID: response.report.request_id, **version_header(response.report.target)}
            await exchange.answer_with(partial(_embedded, response, draft), response.ByteSize(), headers)

        await self.serve(exchange, draft, embed)

    async def _tokenize(self, exchange: Exchange) -> None:
        async def tell(response: TokenizeResponse) -> None:
            tokens, limit = list(response.token_ids), response.max_context_tokens
            await exchange.answer({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

        await self._tokens(exchange, TOKENIZE, tell)

    async def _count(self, exchange: Exchange) -> None:
        await self._tokens(exchange, COUNT, lambda response: exchange.answer({"input_tokens": len(response.token_ids)}))

    async def _tokens(
        self, exchange: Exchange, table: Table, tell: Callable[[TokenizeResponse], Awaitable[None]]
    ) -> None:
        draft = await self.draft(exchange, table)

        async def tokenize(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            await tell(await client.ask("TokenizerService/Tokenize", draft.message, TokenizeResponse, call))

        await self.serve(exchange, draft, tokenize)

    async def _detokenize(self, exchange: Exchange) -> None:
        draft = await self.draft(exchange, DETOKENIZE)

        async def detokenize(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            response = await client.ask("TokenizerService/Detokenize", draft.message, DetokenizeResponse, call)
            await exchange.answer({"prompt": response.text})

        await self.serve(exchange, draft, detokenize)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    async def _load(self, exchange: Exchange) -> None:
        with self._managing() as admin:
            draft = await self.draft(exchange, LOAD)

            async def register(client: ServiceClient) -> None:
                await exchange.answer(await load(admin, client, draft, call_options(exchange)))

            await self.serve(exchange, draft, register)

    async def _unload(self, exchange: Exchange) -> None:
        with self._managing() as admin:
            draft = await self.draft(exchange, UNLOAD)

            async def delete(client: ServiceClient) -> None:
                await exchange.answer(await unload(admin, draft, call_options(exchange)))

            await self.serve(exchange, draft, delete)

    @contextmanager
    def _managing(self) -> Iterator[ServiceClient]:
        """A client of the admin port. Raises Refusal where there is none."""
        if self._admin is None:
            problem = "adapters are not managed over HTTP here: `http_admin: true` in the configuration allows it"
            raise Refusal(404, problem, code="unknown_url")
        with self._admin.lease() as admin:
            yield admin

    async def draft(self, exchange: Exchange, table: Table) -> Draft:
        """What a body asks for. Raises Refusal, and what the service says to callers who may not ask."""
        call = call_options(exchange)

        async def admit() -> None:
            with self._clients.lease() as client:
                await client.check_role(call)

        return await exchange.read(admit, table.read)

    async def serve(
        self, exchange: Exchange, draft: Draft, work: Callable[[ServiceClient], Coroutine[Any, Any, None]]
    ) -> None:
        """Do the work, until the caller leaves. Errors name the parameters of the request."""
        with self._clients.lease() as client:
            try:
                await _unless_gone(exchange, work(client))
            except LoraplexError as error:
                await exchange.tell(failed(error, draft.named))


# ---- calls with nothing to do ----------------------------------------------------------------------------------------


def _needless(why: str) -> Handler:
    return telling({"success": True, "message": why})


def _refusing(path: str, why: str) -> Handler:
    async def refuse(exchange: Exchange) -> None:
        raise Refusal(400, f"{path}: {why}", code="unsupported_call")

    return refuse


# ---- one request -----------------------------------------------------------------------------------------------------


async def _unless_gone(exchange: Exchange, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of the work, which is cancelled when the caller leaves. Raises ConnectionError then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(exchange.gone())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _embedded(response: EmbedResponse, draft: Draft) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(each.values, draft.base64)}
        for index, each in enumerate(response.embeddings)
    ]
    used = response.report.usage.prompt_tokens
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "model": draft.message.model, "data": data, "usage": usage}


def _vector(values: Sequence[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
