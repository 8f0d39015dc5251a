"""Generations: a draft becomes calls of the service, and what comes back the answer."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from loraplex import from_status
from loraplex.channel import CallOptions
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import GenerateRequest, GenerateResponse
from loraplex.v1.prompt_pb2 import Prompt
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex.v1.tokenizer_pb2 import DetokenizeRequest, DetokenizeResponse
from loraplex_service.http.answers import Answers, Choices
from loraplex_service.http.exchange import Exchange
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import Draft
from loraplex_service.http.service import ServiceClient, call_options

PULSE_SECONDS = 10.0  # of silence: proxies cut a connection after 60, often


async def generate(exchange: Exchange, client: ServiceClient, draft: Draft, answers: Answers, most_bytes: int) -> None:
    """Answer with what the draft asks for, whole or as a stream. `most_bytes`: of all that becomes of it."""
    specs, call = _specs(draft, most_bytes), call_options(exchange, draft.routing_key)
    if draft.stream:
        if isinstance(answers, Choices) and len(specs) > 1:
            await _stream_several(exchange, client, specs, call, answers)
        else:
            await _stream_one(exchange, client, specs[0], call, answers)
        return
    if len(specs) == 1:
        request = GenerateRequest(spec=specs[0])
        responses = [await client.ask("InferenceService/Generate", request, GenerateResponse, call)]
    else:
        found = dict([each async for each in _batch(client, specs, call)])
        responses = [found[number] for number in range(len(specs))]
    headers = answers.headers(responses[0].request_id, responses[0].target)
    size = sum(response.ByteSize() for response in responses)
    await exchange.answer_with(partial(answers.whole, responses), size, headers)


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
    exchange: Exchange, client: ServiceClient, spec: GenerateSpec, call: CallOptions, answers: Answers
) -> None:
    """Send tokens as they come. What refuses the request does so before the stream begins, with a status."""
    async with client.stream(spec, call) as stream, _kept_alive(exchange, answers):
        async for message in stream:
            if message.HasField("started") and not exchange.begun:
                await _begin(exchange, answers, message.started.request_id, message.started.target)
            for chunk in answers.chunks(message):
                await exchange.event(chunk)
    await exchange.end(answers.last)


async def _stream_several(
    exchange: Exchange, client: ServiceClient, specs: Sequence[GenerateSpec], call: CallOptions, answers: Choices
) -> None:
    """Send the outputs of each prompt as soon as they are complete."""
    used = []
    async with _kept_alive(exchange, answers):
        async for number, response in _batch(client, specs, call):
            if not exchange.begun:
                await _begin(exchange, answers, response.request_id, response.target)
            used.append(response.usage)
            wanted = max(specs[number].sampling.n, len(response.outputs))  # a search may find fewer
            for chunk in answers.chunks_of(number * wanted, number, response):
                await exchange.event(chunk)
    for chunk in answers.usage_chunks(used):
        await exchange.event(chunk)
    await exchange.end(answers.last)


async def _begin(exchange: Exchange, answers: Answers, request_id: str, target: ResolvedTarget) -> None:
    """Begin a stream, which tells of failures in its own words from then on."""
    exchange.told = answers.failed
    await exchange.begin(answers.headers(request_id, target))


@asynccontextmanager
async def _kept_alive(exchange: Exchange, answers: Answers) -> AsyncIterator[None]:
    """Send a sign of life whenever nothing comes for long, so that nobody on the way takes the stream for dead.

    A request that is still waiting for its first token has its stream begun by the first of them.
    """

    async def pulse() -> None:
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            if asyncio.get_running_loop().time() - exchange.sent_at < PULSE_SECONDS:
                continue
            if not exchange.begun:
                await _begin(exchange, answers, exchange.request_id, ResolvedTarget())
            await exchange.pulse(answers.pulse)

    beating = asyncio.create_task(pulse())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


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


async def echoes(exchange: Exchange, client: ServiceClient, draft: Draft) -> list[str]:
    """The texts of the prompts."""
    call = call_options(exchange, draft.routing_key)

    async def text_of(prompt: Prompt) -> str:
        if prompt.HasField("text"):
            return prompt.text
        tokens = DetokenizeRequest(model=draft.message.model, token_ids=prompt.token_ids.ids, skip_special_tokens=False)
        return (await client.ask("TokenizerService/Detokenize", tokens, DetokenizeResponse, call)).text

    return [await text_of(prompt) for prompt in draft.prompts]
