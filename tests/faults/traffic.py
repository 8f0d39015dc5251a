"""Everything that callers and operators do to a server, all at once and in any order, the rude and the wrong too."""

import asyncio
import itertools
import random
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.error import HTTPError

from loraplex import (
    AlreadyExists,
    AsyncAdminClient,
    AsyncClient,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
    Unsupported,
    generate_spec,
)
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.routes_pb2 import Route, RouteTarget
from tests.e2e.conftest import DEMO, MODELS, Server

CALLERS = 6
OPERATORS = 2
MOST_ADAPTERS = 12  # registered at a time, beside those of the configuration
CALL_SECONDS = 400.0  # in a long run the machine may be stopped for minutes; a call that hangs never ends
MOST_SCRAPES = 10
WORDS = ("once", "upon", "a", "time", "there", "was", "an", "old", "fox", "who", "told", "12", "hens", "what", "is it?")
STOOD_STILL = ("still rendering", "ping timeout")  # what calls end with once the machine has been stopped for a while
GONE = (NotFound, FailedPrecondition, AlreadyExists, Cancelled)  # what somebody else changed meanwhile


class Traffic:
    """Calls until it is told to stop. Fails with the first answer that no caller should get."""

    def __init__(self, server: Server, client: AsyncClient, admin: AsyncAdminClient, seed: int) -> None:
        self.num_requests = 0  # calls that have ended
        self.done: Counter[str] = Counter()
        self._server = server
        self._client = client
        self._admin = admin
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._registered: list[str] = []
        self._calls: dict[Callable[[], Awaitable[None]], int] = {
            self.stream: 6,
            self.unary: 4,
            self.batch: 2,
            self.cancel: 3,
            self.disconnect: 2,
            self.deadline: 2,
            self.mistake: 2,
            self.tokenise: 2,
        }
        self._operations: dict[Callable[[], Awaitable[None]], int] = {
            self.register: 3,
            self.upload: 2,
            self.swap: 3,
            self.move: 3,
            self.pin: 1,
            self.delete: 4,
            self.route: 2,
            self.look: 3,
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Raises ExceptionGroup."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(self._repeat(self._calls, stop, pause=0.0))
            for _ in range(OPERATORS):
                tasks.create_task(self._repeat(self._operations, stop, pause=0.1))

    async def delete_all(self) -> None:
        """What it has registered and not deleted."""
        while self._registered:
            await self.delete()

    async def _repeat(
        self, choices: dict[Callable[[], Awaitable[None]], int], stop: asyncio.Event, pause: float
    ) -> None:
        while not stop.is_set():
            [action] = self._random.choices(list(choices), list(choices.values()))
            try:
                await action()
            except (InvalidArgument, Unavailable) as error:
                if not any(reason in str(error) for reason in STOOD_STILL):
                    raise
            self.num_requests += 1
            self.done[action.__name__] += 1
            await asyncio.sleep(pause * self._random.random())

    # ---- callers ---------------------------------------------------------------------------------------------------

    async def stream(self) -> None:
        """By a tenant of many, with everything that can be asked for."""
        tenant = {"loraplex-tenant": f"tenant-{self._random.randrange(200)}"}
        temperature, seed = self._random.choice((0.0, 1.0)), self._random.randrange(99)
        stream = self._client.stream_generate(
            self._target(),
            self._prompt(),
            max_tokens=24,
            n=2,
            stop=["fox"],
            logprobs=True,
            temperature=temperature,
            top_p=0.9,
            seed=seed,
            metadata=tenant,
        )
        with suppress(*GONE):
            await stream.collect()

    async def unary(self) -> None:
        talk = [{"role": "user", "content": self._prompt()}]
        with suppress(*GONE):
            await self._client.generate(self._target(), talk, max_tokens=8, temperature=0)

    async def batch(self) -> None:
        specs = [generate_spec(self._target(), self._prompt(), max_tokens=4) for _ in range(3)]
        with suppress(*GONE):
            async for _ in self._client.batch_generate(specs):
                pass

    async def cancel(self) -> None:
        stream = self._client.stream_generate(self._target(), self._prompt(), max_tokens=1500, ignore_eos=True)
        with suppress(*GONE):
            for _ in range(self._random.randrange(6)):
                await anext(stream)
        stream.cancel()

    async def disconnect(self) -> None:
        """A channel of its own that is closed while a stream runs."""
        async with AsyncClient(self._server.data, timeout=CALL_SECONDS) as client:
            stream = client.stream_generate(self._target(), self._prompt(), max_tokens=1500, ignore_eos=True)
            with suppress(*GONE):
                await anext(stream)

    async def deadline(self) -> None:
        """Some are refused at once, because their deadline would pass while they wait."""
        options = {"max_tokens": 1500, "ignore_eos": True, "timeout": 0.02 + 0.2 * self._random.random()}
        with suppress(DeadlineExceeded, Unavailable, *GONE):
            await self._client.generate(self._target(), self._prompt(), **options)  # type: ignore[arg-type]

    async def mistake(self) -> None:
        model, options = self._random.choice(
            [
                (f"nothing-{next(self._numbers)}", {}),
                ("no such name!", {}),
                ("storyteller", {"temperature": -1.0}),
                ("storyteller", {"max_tokens": 1 << 30}),
                ("storyteller", {"json_schema": "{"}),
                ("pirate", {"logit_bias": {1 << 31: 1.0}}),
            ]
        )
        try:
            await self._client.generate(model, self._prompt(), **options)  # type: ignore[arg-type]
        except (InvalidArgument, NotFound, Unsupported):
            return
        raise AssertionError(f"{model} with {options} was answered")

    async def tokenise(self) -> None:
        answer = await self._client.tokenize("storyteller", self._prompt())
        await self._client.detokenize("storyteller", answer.token_ids)

    # ---- operators -------------------------------------------------------------------------------------------------

    async def register(self) -> None:
        """Under a name that nobody has had yet."""
        await self._create(await self._new_name())

    async def upload(self) -> None:
        name = await self._new_name()
        directory = DEMO / "adapters" / self._content()
        await self._admin.upload_adapter(name, base_model="storyteller", directory=directory, wait=CALL_SECONDS)

    async def swap(self) -> None:
        """Another version under a name that is in use."""
        if self._registered:
            await self._create(self._random.choice(self._registered))

    async def move(self) -> None:
        name = self._known()
        with suppress(*GONE):
            await self._admin.load_adapter(name, residency=self._random.choice(("host", "device")), wait=1)
            await self._admin.unload_adapter(name, residency=self._random.choice(("disk", "host")), wait=1)

    async def pin(self) -> None:
        name = self._known()
        with suppress(*GONE):
            await self._admin.update_adapter(name, pinned=True, labels={"seen": str(next(self._numbers))})
            await self._admin.update_adapter(name, pinned=False)

    async def delete(self) -> None:
        if self._registered:
            name = self._registered.pop(self._random.randrange(len(self._registered)))
            with suppress(*GONE):
                await self._admin.delete_adapter(name, wait=CALL_SECONDS)

    async def route(self) -> None:
        name = f"tenants/shared/routes/route-{next(self._numbers)}"
        targets = [RouteTarget(model=model) for model in MODELS]
        await self._admin.update_route(Route(name=name, targets=targets), allow_missing=True)
        await self._client.generate(name, self._prompt(), max_tokens=1)
        await self._admin.delete_route(name)

    async def look(self) -> None:
        """What dashboards, balancers and the curious do."""
        assert await self._client.is_serving()
        await self._admin.list_adapters(include_versions=True)
        await self._admin.list_models()
        with suppress(PermissionDenied):
            await self._admin.create_adapter("own", base_model="storyteller", source="/etc")
        for watch in (self._admin.watch_load(), self._admin.watch_adapters(), self._admin.watch_models()):
            await anext(watch)
            watch.cancel()
        page = await asyncio.to_thread(read_page, self._server)
        assert "loraplex_" in page

    # ---- choices ---------------------------------------------------------------------------------------------------

    async def _create(self, name: str) -> None:
        with suppress(*GONE):
            adapter = await self._admin.create_adapter(
                name, base_model="storyteller", source=self._content(), wait=CALL_SECONDS
            )
            assert adapter.state in (Adapter.STATE_ACTIVE, Adapter.STATE_DELETING), adapter

    async def _new_name(self) -> str:
        if len(self._registered) >= MOST_ADAPTERS:
            await self.delete()
        name = f"passing-{next(self._numbers)}"
        self._registered.append(name)
        return name

    def _known(self) -> str:
        return self._random.choice([*self._registered, *MODELS["storyteller"]])

    def _target(self) -> str:
        """As much for one model as for the other, however many adapters each has."""
        model = self._random.choice(list(MODELS))
        passing = self._registered if model == "storyteller" else []
        return self._random.choice([model, *MODELS[model], *passing])

    def _content(self) -> str:
        return self._random.choice(MODELS["storyteller"])

    def _prompt(self) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randrange(1, 60)))


def read_page(server: Server) -> str:
    """The Prometheus page. It is a 500 where the service could not answer in time, as when the machine stands still."""
    for _ in range(MOST_SCRAPES):
        with (
            suppress(HTTPError),
            urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=CALL_SECONDS) as response,
        ):
            return str(response.read(), "utf-8")
    raise AssertionError(f"the metrics page failed {MOST_SCRAPES} times in a row")
