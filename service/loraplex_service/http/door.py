"""The endpoints, as an ASGI application."""

import asyncio
import base64
import logging
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from loraplex import LoraplexError, from_status
from loraplex.channel import CallOptions
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import GenerateRequest, GenerateResponse
from loraplex.v1.pooling_pb2 import EmbedResponse
from loraplex.v1.prompt_pb2 import Prompt
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, DetokenizeResponse, TokenizeResponse
from loraplex_service.http.answers import Answers, ChatAnswers, TextAnswers
from loraplex_service.http.catalog import listed, retrieved
from loraplex_service.http.exchange import Exchange, Receive, Room, Send
from loraplex_service.http.failures import Failure, Refusal, failed, refused
from loraplex_service.http.parameters import Draft, Table
from loraplex_service.http.service import Clients, ServiceClient, call_options
from loraplex_service.http.tables import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Exchange], Awaitable[None]]
ResultT = TypeVar("ResultT")
DONE = b"data: [DONE]\n\n"
MODEL = "/v1/models/"
METHODS = {"GET": ("GET", "HEAD"), "POST": ("POST",)}  # uvicorn leaves out the body of an answer to HEAD
HEALTH_SECONDS = 2.0  # for the service to say how it is
OTHER = "other"  # what is no endpoint


class Door:
    """The application. Each request becomes a call of the service, which is cancelled when its caller leaves."""

    def __init__(self, clients: Clients, room: Room, version: str) -> None:
        self._clients = clients
        self._room = room
        self._version = version
        self.answered = Counter[tuple[str, str]]()  # by endpoint and status; whoever tells them clears it
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/version": ("GET", self._tell_version),
            "/v1/models": ("GET", self._models),
            CHAT.path: ("POST", self._chat),
            COMPLETIONS.path: ("POST", self._completions),
            EMBEDDINGS.path: ("POST", self._embeddings),
            TOKENIZE.path: ("POST", self._tokenize),
            DETOKENIZE.path: ("POST", self._detokenize),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._room)
        try:
            method, handler = self._route(exchange.path)
            if exchange.method not in METHODS[method]:
                raise Refusal(405, f"{exchange.path} takes {method} alone", allow=", ".join(METHODS[method]))
            await handler(exchange)
        except ConnectionError:
            return  # the caller left
        except Refusal as refusal:
            await _tell(exchange, refused(refusal))
        except LoraplexError as error:
            await _tell(exchange, failed(error))
        except Exception:
            logger.exception("%s failed", exchange.path)
            await _tell(exchange, refused(Refusal(500, "the server failed; its log says why")))
        finally:
            self.answered[self._endpoint(exchange.path), str(exchange.status)] += 1

    def _endpoint(self, path: str) -> str:
        if path.startswith(MODEL):
            return MODEL
        return path if path in self._routes else OTHER

    def _route(self, path: str) -> tuple[str, Handler]:
        if path.startswith(MODEL):
            return "GET", self._model
        if path not in self._routes:
            raise Refusal(404, f"there is no {path[:200]} here; docs/http.md lists what there is", code="unknown_url")
        return self._routes[path]

    # ---- what there is -----------------------------------------------------------------------------------------------

    async def _health(self, exchange: Exchange) -> None:
        with self._clients.lease() as client:
            serving = await client.serves_within(HEALTH_SECONDS)
        await exchange.answer({"status": "ok" if serving else "not serving"}, 200 if serving else 503)

    async def _tell_version(self, exchange: Exchange) -> None:
        await exchange.answer({"version": self._version})

    async def _models(self, exchange: Exchange) -> None:
        call = call_options(exchange)
        with self._clients.lease() as client:
            models = await _unless_gone(exchange, listed(client, call))
        await exchange.answer({"object": "list", "data": models})

    async def _model(self, exchange: Exchange) -> None:
        name, call = exchange.path.removeprefix(MODEL), call_options(exchange)
        with self._clients.lease() as client:
            model = await _unless_gone(exchange, retrieved(client, name, call))
        await exchange.answer(model)

    # ---- generations -------------------------------------------------------------------------------------------------

    async def _chat(self, exchange: Exchange) -> None:
        draft = await self._draft(exchange, CHAT)
        await self._serve(exchange, draft, lambda client: self._generate(exchange, client, draft, ChatAnswers(draft)))

    async def _completions(self, exchange: Exchange) -> None:
        draft = await self._draft(exchange, COMPLETIONS)
        if draft.echo and draft.message.output.logprobs:
            draft.message.output.prompt_logprobs = draft.message.output.top_logprobs

        async def complete(client: ServiceClient) -> None:
            echoes = await _echoes(exchange, client, draft) if draft.echo else ()
            await self._generate(exchange, client, draft, TextAnswers(draft, echoes))

        await self._serve(exchange, draft, complete)

    async def _generate(self, exchange: Exchange, client: ServiceClient, draft: Draft, answers: Answers) -> None:
        specs, call = _specs(draft, self._room.body_bytes), call_options(exchange, draft.routing_key)
        if draft.stream:
            await (_stream_one if len(specs) == 1 else _stream_several)(exchange, client, specs, call, answers)
            return
        if len(specs) == 1:
            request = GenerateRequest(spec=specs[0])
            responses = [await client.ask("InferenceService/Generate", request, GenerateResponse, call)]
        else:
            found = dict([each async for each in _batch(client, specs, call)])
            responses = [found[number] for number in range(len(specs))]
        await exchange.answer(answers.whole(responses), headers=_headers(responses[0].request_id, responses[0].target))

    # ---- numbers and tokens ------------------------------------------------------------------------------------------

    async def _embeddings(self, exchange: Exchange) -> None:
        draft = await self._draft(exchange, EMBEDDINGS)

        async def embed(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            response = await client.ask("PoolingService/Embed", draft.message, EmbedResponse, call)
            data = [
                {"object": "embedding", "index": index, "embedding": _vector(each.values, draft.base64)}
                for index, each in enumerate(response.embeddings)
            ]
            report, used = response.report, response.report.usage.prompt_tokens
            usage = {"prompt_tokens": used, "total_tokens": used}
            answer = {"object": "list", "model": draft.message.model, "data": data, "usage": usage}
            await exchange.answer(answer, headers=_headers(report.request_id, report.target))

        await self._serve(exchange, draft, embed)

    async def _tokenize(self, exchange: Exchange) -> None:
        draft = await self._draft(exchange, TOKENIZE)

        async def tokenize(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            response = await client.ask("TokenizerService/Tokenize", draft.message, TokenizeResponse, call)
            tokens, limit = list(response.token_ids), response.max_context_tokens
            await exchange.answer({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

        await self._serve(exchange, draft, tokenize)

    async def _detokenize(self, exchange: Exchange) -> None:
        draft = await self._draft(exchange, DETOKENIZE)

        async def detokenize(client: ServiceClient) -> None:
            call = call_options(exchange, draft.routing_key)
            response = await client.ask("TokenizerService/Detokenize", draft.message, DetokenizeResponse, call)
            await exchange.answer({"prompt": response.text})

        await self._serve(exchange, draft, detokenize)

    async def _draft(self, exchange: Exchange, table: Table) -> Draft:
        call = call_options(exchange)

        async def admit() -> None:
            with self._clients.lease() as client:
                await client.check_role(call)

        return await exchange.read(admit, table.read)

    async def _serve(
        self, exchange: Exchange, draft: Draft, work: Callable[[ServiceClient], Coroutine[Any, Any, None]]
    ) -> None:
        """Do the work, until the caller leaves. Errors name the parameters of the request."""
        with self._clients.lease() as client:
            try:
                await _unless_gone(exchange, work(client))
            except LoraplexError as error:
                await _tell(exchange, failed(error, draft.named))


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


async def _tell(exchange: Exchange, failure: Failure) -> None:
    """Answer with what went wrong; in a stream that has begun, as its last event."""
    if not exchange.begun:
        await exchange.answer(failure.body, failure.status, failure.headers)
        return
    await exchange.event(failure.body)
    await exchange.end()


def _headers(request_id: str, target: ResolvedTarget) -> dict[str, str]:
    headers = {"x-request-id": request_id}
    return {**headers, "loraplex-adapter-version": target.adapter_version} if target.adapter_version else headers


# ---- generations -----------------------------------------------------------------------------------------------------


def _specs(draft: Draft, most_bytes: int) -> list[GenerateSpec]:
    """A spec for each prompt. Raises Refusal where what they share would become too large, once in each."""
    if not draft.prompts:
        return [draft.message]
    if (size := len(draft.prompts) * draft.message.ByteSize()) > most_bytes:
        problem = (
            f"what all {len(draft.prompts)} prompts share makes {size} bytes, once in each; {most_bytes} are taken"
        )
        raise Refusal(413, problem, code="message_too_large")
    specs = []
    for prompt in draft.prompts:
        spec = GenerateSpec()
        spec.CopyFrom(draft.message)
        spec.prompt.MergeFrom(prompt)
        specs.append(spec)
    return specs


async def _stream_one(
    exchange: Exchange, client: ServiceClient, specs: Sequence[GenerateSpec], call: CallOptions, answers: Answers
) -> None:
    """Send tokens as they come. What refuses the request does so before the stream begins, with a status."""
    async with client.stream(specs[0], call) as stream:
        async for message in stream:
            if message.HasField("started"):
                await exchange.begin(_headers(message.started.request_id, message.started.target))
            for chunk in answers.chunks(message):
                await exchange.event(chunk)
    await exchange.end(DONE)


async def _stream_several(
    exchange: Exchange, client: ServiceClient, specs: Sequence[GenerateSpec], call: CallOptions, answers: Answers
) -> None:
    """Send the outputs of each prompt as soon as they are complete."""
    used = []
    async for number, response in _batch(client, specs, call):
        if not exchange.begun:
            await exchange.begin(_headers(response.request_id, response.target))
        used.append(response.usage)
        for chunk in answers.chunks_of(number * len(response.outputs), number, response):
            await exchange.event(chunk)
    for chunk in answers.usage_chunks(used):
        await exchange.event(chunk)
    await exchange.end(DONE)


async def _batch(
    client: ServiceClient, specs: Sequence[GenerateSpec], call: CallOptions
) -> AsyncIterator[tuple[int, GenerateResponse]]:
    """The responses as they come, each with the number of its spec. Raises the first error."""
    async with client.batch_generate(specs, **call) as stream:
        async for message in stream:
            match message.WhichOneof("result"):
                case "error":
                    raise from_status(message.error)
                case "response":
                    yield message.index, message.response


async def _echoes(exchange: Exchange, client: ServiceClient, draft: Draft) -> list[str]:
    """The texts of the prompts."""
    call = call_options(exchange, draft.routing_key)

    async def text_of(prompt: Prompt) -> str:
        if prompt.HasField("text"):
            return prompt.text
        tokens = DetokenizeRequest(model=draft.message.model, token_ids=prompt.token_ids.ids, skip_special_tokens=False)
        return (await client.ask("TokenizerService/Detokenize", tokens, DetokenizeResponse, call)).text

    return [await text_of(prompt) for prompt in draft.prompts]


def _vector(values: Sequence[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
