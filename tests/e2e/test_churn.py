"""Adapters come, change their content and go while many callers use them, and no answer is ever another adapter's."""

import asyncio
import random
from collections import Counter

import pytest

from loraplex import AlreadyExists, AsyncAdminClient, AsyncClient, FailedPrecondition, NotFound
from loraplex.v1.inference_pb2 import GenerateResponse
from tests.e2e.conftest import MODELS, Server

CONTENTS = MODELS["storyteller"]
NAMES = ("churn-a", "churn-b", "churn-c")
PROMPT = "Tell me a story about a fox."
TOKENS = 24
CALLERS = 12
CALLS_EACH = 40


async def say(client: AsyncClient, target: str) -> GenerateResponse:
    stream = client.stream_generate(
        target, PROMPT, max_tokens=TOKENS, temperature=0, token_ids=True, ignore_eos=True, bypass_prefix_cache=False
    )
    return await stream.collect()


class Churn:
    """Registers, swaps, unloads and deletes adapters at random, until told to stop."""

    def __init__(self, admin: AsyncAdminClient, random_: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._admin = admin
        self._random = random_

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            change = self._random.choices((self._create, self._unload, self._delete), (6, 2, 1))[0]
            try:
                await change(self._random.choice(NAMES))
                self.done[change.__name__] += 1
            except (NotFound, FailedPrecondition, AlreadyExists):  # gone already, the current one, or still going
                continue

    async def _create(self, name: str) -> None:
        await self._admin.create_adapter(
            name, base_model="storyteller", source=self._random.choice(CONTENTS), wait=20 * self._random.random()
        )

    async def _unload(self, name: str) -> None:
        await self._admin.unload_adapter(name, wait=0.01)

    async def _delete(self, name: str) -> None:
        versions = await self._admin.list_adapters(include_versions=True)
        version = self._random.choice([v.version for v in versions if v.name.endswith(name)] or [f"{name}@{'0' * 12}"])
        target = name if self._random.random() < 0.3 else version.rpartition("/")[2]
        await self._admin.delete_adapter(target, wait=0.01)


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_answer_is_another_adapters(
    client: AsyncClient, admin: AsyncAdminClient, server: Server, seed: int
) -> None:
    expected: dict[str, list[int]] = {}  # by version id, which is the digest of the content
    for content in CONTENTS:
        answer = await say(client, content)
        expected[answer.target.adapter_version.rpartition("@")[2]] = list(answer.outputs[0].token_ids)
    assert len(expected) == len(CONTENTS)

    outcomes: Counter[str] = Counter()

    async def call(random_: random.Random) -> None:
        for _ in range(CALLS_EACH):
            name = random_.choice((*NAMES, "pirate"))
            try:
                answer = await say(client, name)
            except NotFound:  # not registered at the moment
                outcomes["not found"] += 1
                continue
            version = answer.target.adapter_version.rpartition("@")[2]
            assert list(answer.outputs[0].token_ids) == expected[version], f"{name} was {version}"
            outcomes["answered"] += 1

    engines = server.engine_pids()
    stop = asyncio.Event()
    churn = Churn(admin, random.Random(seed))
    churning = asyncio.create_task(churn.run(stop))
    await asyncio.gather(*(call(random.Random(f"{seed}-{number}")) for number in range(CALLERS)))
    stop.set()
    await churning
    assert outcomes["answered"] > CALLERS * CALLS_EACH / 4, outcomes
    assert min(churn.done[change] for change in ("_create", "_unload", "_delete")) > 0, churn.done
    assert server.engine_pids() == engines
    for name in NAMES:
        try:
            await admin.delete_adapter(name, wait=20)
            with pytest.raises(NotFound):
                await admin.get_adapter(name)
        except NotFound:
            continue
