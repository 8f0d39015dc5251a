"""Many callers at once on the true server: each gets what it would get alone, and who goes leaves nothing behind."""

import asyncio
import shutil
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from loraplex import (
    AsyncAdminClient,
    AsyncClient,
    InvalidArgument,
    LoraplexError,
    NotFound,
)
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.inference_pb2 import GenerateResponse
from tests.e2e.conftest import DEMO, END_SECONDS, LORAPLEX, MODELS, Server
from tests.waits import MOST_SECONDS

TARGETS = [*MODELS, *(adapter for adapters in MODELS.values() for adapter in adapters)]
PROMPTS = ["Tell me a story about a fox.", "What is two plus three?", "Once upon a time", "Who are you?", "The sea"]
TOKENS = 40


async def say(client: AsyncClient, target: str, prompt: str, tokens: int = TOKENS) -> GenerateResponse:
    stream = client.stream_generate(target, prompt, max_tokens=tokens, temperature=0, token_ids=True, ignore_eos=True)
    return await stream.collect()


def token_ids(response: GenerateResponse) -> list[int]:
    return list(response.outputs[0].token_ids)


async def until_idle(admin: AsyncAdminClient) -> None:
    """Until no model has a request, nor a block in use."""
    async for message in admin.watch_load(interval=0.1):
        busy = [
            load for load in message.models if load.running_requests or load.waiting_requests or load.cache_tokens_used
        ]
        if not busy:
            return


async def test_every_model_and_adapter_has_a_voice_of_its_own(client: AsyncClient) -> None:
    said = set()
    for target in TARGETS:
        conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:4]]
        answers = [await client.generate(target, talk, max_tokens=TOKENS, temperature=0) for talk in conversations]
        assert all(f"models/{name}" == answers[0].target.model for name in MODELS if target in (name, *MODELS[name]))
        said.add(tuple(answer.outputs[0].text for answer in answers))
    assert len(said) == len(TARGETS)


async def test_32_streams_at_once_are_what_each_is_alone(client: AsyncClient, admin: AsyncAdminClient) -> None:
    work = [(TARGETS[number % len(TARGETS)], PROMPTS[number % len(PROMPTS)]) for number in range(32)]
    alone = {pair: token_ids(await say(client, *pair)) for pair in set(work)}
    together = await asyncio.gather(*(say(client, *pair) for pair in work))
    for pair, answer in zip(work, together, strict=True):
        assert token_ids(answer) == alone[pair], pair
        assert answer.usage.completion_tokens == TOKENS
    await until_idle(admin)


async def test_callers_that_cancel_leave_nothing_behind(client: AsyncClient, admin: AsyncAdminClient) -> None:
    streams = [
        client.stream_generate(TARGETS[number % len(TARGETS)], "Once", max_tokens=1500, n=4, ignore_eos=True)
        for number in range(24)
    ]
    await asyncio.gather(*(anext(stream) for stream in streams))
    for stream in streams:
        stream.cancel()
    await until_idle(admin)


async def test_callers_that_are_killed_leave_nothing_behind(
    client: AsyncClient, admin: AsyncAdminClient, server: Server
) -> None:
    command = (LORAPLEX, "generate", "--server", server.data, "--max-tokens", "1900", "--ignore-eos", "pirate", "Once")
    for _ in range(3):
        caller = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        assert caller.stdout is not None
        await caller.stdout.read(1)  # it has begun to print
        caller.kill()
        await caller.communicate()
        assert caller.returncode == -signal.SIGKILL
    await until_idle(admin)


@pytest.mark.parametrize(
    ("target", "options", "error", "reason"),
    [
        ("nothing", {}, NotFound, "MODEL_NOT_FOUND"),
        ("no such name!", {}, InvalidArgument, "INVALID_PARAMETER"),
        ("tenants/shared/adapters/none", {}, NotFound, "ADAPTER_NOT_FOUND"),
        ("storyteller", {"temperature": -1.0}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"top_p": float("nan")}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"max_tokens": 1 << 30}, InvalidArgument, "PROMPT_TOO_LONG"),
        ("storyteller", {"logit_bias": {1 << 31: 1.0}}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"allowed_token_ids": [1 << 31]}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"top_logprobs": 1000}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"n": 1000}, InvalidArgument, "INVALID_PARAMETER"),
        ("storyteller", {"regex": "(?=a)b"}, InvalidArgument, "INVALID_PARAMETER"),
    ],
)
async def test_bad_requests_are_refused_and_the_engines_live_on(
    client: AsyncClient,
    server: Server,
    target: str,
    options: dict[str, object],
    error: type[LoraplexError],
    reason: str,
) -> None:
    engines = server.engine_pids()
    with pytest.raises(error) as raised:
        await client.generate(target, "Once", **options)  # type: ignore[arg-type]
    assert raised.value.reason == reason
    assert server.engine_pids() == engines


async def test_a_prompt_that_is_too_long_is_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await client.generate("storyteller", "word " * 5000)
    assert raised.value.reason == "PROMPT_TOO_LONG"


async def test_extreme_requests_that_are_allowed_harm_nobody(client: AsyncClient) -> None:
    """On the edge of every limit, beside an ordinary request that must come out as ever."""
    expected = token_ids(await say(client, "pirate", PROMPTS[0]))
    extremes = [
        {"temperature": 10.0, "top_k": 1, "seed": 2**64 - 1},
        {"temperature": 1e-6, "min_p": 1.0},
        {"repetition_penalty": 10.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": dict.fromkeys(range(100), -100.0), "allowed_token_ids": list(range(50))},
        {"top_logprobs": 20, "prompt_logprobs": 20},
        {"n": 16, "temperature": 0.0},
        {"stop": ["e"] * 16},
    ]
    calls = [client.generate("storyteller", "A", max_tokens=20, **options) for options in extremes]  # type: ignore[arg-type]
    answers = await asyncio.gather(say(client, "pirate", PROMPTS[0]), *calls)
    assert token_ids(answers[0]) == expected
    assert len(answers[6].outputs) == 16


async def test_an_adapter_is_swapped_and_removed_while_it_is_used(
    client: AsyncClient, admin: AsyncAdminClient, own_adapter: Path
) -> None:
    prompt, tokens = PROMPTS[0], 400
    expected = {name: token_ids(await say(client, name, prompt, tokens)) for name in ("pirate", "poet")}

    async def register(source: str) -> Adapter:
        shutil.copytree(DEMO / "adapters" / source, own_adapter, dirs_exist_ok=True)
        return await admin.create_adapter("own", base_model="storyteller", source="own", wait=MOST_SECONDS)

    first = await register("pirate")
    assert first.state == Adapter.STATE_ACTIVE, first.error.message
    stream = client.stream_generate("own", prompt, max_tokens=tokens, temperature=0, token_ids=True, ignore_eos=True)
    await anext(stream)
    shutil.rmtree(own_adapter)
    second = await register("poet")
    assert second.version != first.version
    after = await say(client, "own", prompt, tokens)
    before = await stream.collect()
    assert (before.target.adapter_version, token_ids(before)) == (first.version, expected["pirate"])
    assert (after.target.adapter_version, token_ids(after)) == (second.version, expected["poet"])

    last = client.stream_generate("own", prompt, max_tokens=tokens, temperature=0, token_ids=True, ignore_eos=True)
    await anext(last)
    await admin.delete_adapter("own")
    with pytest.raises(NotFound):
        await client.generate("own", prompt)
    assert token_ids(await last.collect()) == expected["poet"]
    await until_idle(admin)


async def test_the_service_process_holds_no_torch(server: Server, client: AsyncClient) -> None:
    await client.generate("storyteller", [{"role": "user", "content": "Hello"}], max_tokens=1)
    maps = await asyncio.to_thread(Path(f"/proc/{server.process.pid}/maps").read_text)
    assert "libtorch" not in maps


async def test_no_tenant_finds_what_another_has_cached(server: Server, client: AsyncClient) -> None:
    """Whoever can tell by the time that a prompt was cached knows that somebody else has sent it."""
    prompt = "A prompt of which somebody would like to know whether anybody has sent it, of more than one block. " * 3

    async def cached_tokens(tenant: str) -> int:
        async with AsyncClient(server.data, tenant=tenant, timeout=END_SECONDS) as caller:
            response = await caller.generate("storyteller", prompt, max_tokens=1)
        return int(response.usage.cached_prompt_tokens)

    assert await cached_tokens("alice") == 0
    assert await cached_tokens("alice") > 0
    assert await cached_tokens("bob") == 0
