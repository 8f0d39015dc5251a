"""A life of the service's control plane that ends with SIGKILL at a chosen point. Run as a process of its own.

It does what a script says, through the services themselves, and writes down what it has promised once each call has
returned. Points are everything that touches the disk: files opened, made, renamed and removed, and the statements of
the database.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.v1.adapters_pb2 import (
    Adapter,
    CreateAdapterRequest,
    DeleteAdapterRequest,
    UpdateAdapterRequest,
    UploadAdapterRequest,
    UploadFile,
)
from loraplex.v1.generation_pb2 import Sampling
from loraplex.v1.routes_pb2 import DeleteRouteRequest, Route, RouteTarget, UpdateRouteRequest
from loraplex_adapters.files.depot import Depot
from loraplex_adapters.files.remote import RemoteSources
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE, AdapterSource, digest
from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.versions import AdapterState, AdapterVersion
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.deployer import AdapterDeployer
from loraplex_service.adapters.library import AdapterLibrary
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.adapters.registrar import AdapterRegistrar
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.tenants import Tenants
from loraplex_service.control.adapters import AdapterServicer
from loraplex_service.control.quota import AdapterQuota
from loraplex_service.control.routes import RouteServicer
from loraplex_service.errors import LoraplexError, NotFound
from loraplex_service.models.host import ModelHost
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.routing import RouteBook
from loraplex_service.names.target import LoadedModel
from loraplex_service.requests.forms import Forms
from loraplex_service.requests.prompts import TextWork
from loraplex_service.state import State, StateFile
from loraplex_service.telemetry.series import Histogram
from loraplex_service.text import TemplateRenderer, Tokenizer
from tests.service.fake_engine import LIMITS, FakeEngine
from tests.waits import MOST_SECONDS

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
CONTEXT = cast(Any, None)  # the services look at none
WAIT = Duration(seconds=20)
CONTENTS = range(3)  # the directories of adapters that there are: a0, a1, …

Call = tuple[str, list[Any]]  # a method of Life and its arguments
Shape = list[list[Any]]

EVERYTHING: list[Call] = [
    ("upload", ["pirate", 0]),
    ("upload", ["pirate", 1]),
    ("use", ["pirate", 0]),
    ("register", ["local", 0]),
    ("label", ["local", 0]),
    ("route", ["main", ["pirate", "pirate*0.7 + local*0.3"], "tiny"]),
    ("pin", ["pirate", 1, True]),
    ("route", ["main", ["local"], ""]),
    ("change_all", ["pirate", 1]),
    ("pin", ["local", 0, True]),
    ("route", ["other", ["local*-1.5 + pirate"], ""]),
    ("pin", ["pirate", 1, False]),
    ("use", ["pirate", 0]),
    ("delete", ["pirate", 1]),
    ("drop_route", ["main"]),
    ("upload", ["again", 1]),
    ("delete", ["pirate", None]),
]


def any_script(seed: int, length: int = 10) -> list[Call]:
    """Calls as they come. Some fail, and change nothing."""
    draw = random.Random(seed)
    names = ("pirate", "local")

    def one() -> Call:
        name, content = draw.choice(names), draw.choice(CONTENTS)
        targets = draw.sample(["pirate", "local", "pirate*0.7 + local*0.3", "local*-2", "tiny"], 2)
        calls: list[Call] = [
            (draw.choice(("upload", "register")), [name, content]),
            (draw.choice(("upload", "register")), [name, content, True]),
            (draw.choice(("use", "label", "change_all")), [name, content]),
            ("pin", [name, content, draw.random() < 0.7]),
            ("delete", [name, draw.choice((None, content))]),
            ("route", [draw.choice(("main", "other")), targets, draw.choice(("", "tiny", name))]),
            ("drop_route", [draw.choice(("main", "other"))]),
        ]
        return draw.choices(calls, (4, 2, 3, 2, 2, 3, 1))[0]

    return [("upload", ["pirate", 0]), ("register", ["local", 1]), *(one() for _ in range(length))]


class FakeHost:
    """Hosts "tiny", with a fake engine that is there once it has started."""

    def __init__(self, engine: FakeEngine) -> None:
        config = SimpleNamespace(adapter_host_bytes=1 << 30)
        self._model = SimpleNamespace(
            name="tiny", client=None, tokenizer=None, supervisor=SimpleNamespace(limits=LIMITS), config=config
        )
        self._engine = engine
        self._subscribers: list[Callable[[Any], None]] = []

    def start(self) -> None:
        self._model.client = self._engine.client
        for callback in self._subscribers:
            callback(self._model)

    def find(self, name: str) -> Any:
        return self._model if name == "tiny" else None

    get = find

    def serving(self, name: str) -> LoadedModel:
        if name != "tiny":
            raise NotFound("MODEL_NOT_FOUND", f"models/{name}", f"there is no model {name!r}")
        return LoadedModel(name, "r1", LIMITS, self._engine.client, cast(Tokenizer, None), Sampling())

    def subscribe(self, callback: Callable[[Any], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: None


Join = Callable[[StateFile, BackgroundWork], tuple[State, AdapterRegistry, AdapterRecords]]


def alone(state: StateFile, work: BackgroundWork) -> tuple[State, AdapterRegistry, AdapterRecords]:
    """The parts of a server that is no replica."""
    registry = AdapterRegistry()
    return state, registry, AdapterRecords(registry, state)


@dataclass
class Life:
    """The parts of the service that know adapters and routes."""

    directory: Path
    state: State
    registry: AdapterRegistry
    library: AdapterLibrary
    registrar: AdapterRegistrar
    work: BackgroundWork
    host: FakeHost
    book: RouteBook
    catalog: Catalog
    adapters: AdapterServicer
    routes: RouteServicer
    engine: FakeEngine

    @classmethod
    def begin(cls, directory: Path, join: Join = alone) -> "Life":
        """It knows what the state says, and has done nothing yet. `join`: makes it a replica of a fleet."""
        engine = FakeEngine()
        fake = FakeHost(engine)
        work, tenants = BackgroundWork(), Tenants()
        state, registry, records = join(StateFile(directory / "state"), work)
        depot = Depot(directory / "state" / "adapters")
        library = AdapterLibrary(AdapterSource([directory]), RemoteSources((), {}, 0), depot)
        host = cast(ModelHost, fake)
        texts = AdapterTexts(lambda version: str(library.directory(version)))
        deployer = AdapterDeployer(registry, library, host, records, texts, work, Histogram())
        registrar = AdapterRegistrar(registry, records, deployer, library, host, tenants, work)
        book = RouteBook(state)
        catalog = Catalog(fake, registry, book)  # type: ignore[arg-type]  # no engine follows its engine
        quota, forms = AdapterQuota(registry, library, tenants, state), Forms(TextWork.of(TemplateRenderer()))
        adapters = AdapterServicer(
            registry, records, registrar, deployer, library, host, tenants, quota, forms, 1 << 30
        )
        routes = RouteServicer(catalog, book, state, tenants, forms, deployer.prefetch)
        return cls(directory, state, registry, library, registrar, work, fake, book, catalog, adapters, routes, engine)

    async def start(self) -> None:
        await self.registrar.reconcile()
        await self.state.start()
        await self.registrar.sweep()
        self.host.start()

    async def end(self) -> None:
        """Once nothing is under way any more."""
        await self.until(lambda: self.work.is_done)
        await self.library.close()
        await self.work.close()
        await self.state.close()
        await self.engine.close()

    # ---- what a script may say -----------------------------------------------------------------------------------

    async def upload(self, name: str, content: int, pinned: bool = False) -> None:
        files = self._files(content)

        async def messages() -> AsyncIterator[UploadAdapterRequest]:
            yield UploadAdapterRequest(header=self._creation(name, pinned, source=""))
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                chunk = (files / file).read_bytes()
                yield UploadAdapterRequest(file=UploadFile(name=file, size_bytes=len(chunk)))
                yield UploadAdapterRequest(chunk=chunk)

        await self.adapters.UploadAdapter(messages(), CONTEXT)

    async def register(self, name: str, content: int, pinned: bool = False) -> None:
        await self.adapters.CreateAdapter(self._creation(name, pinned, self._files(content).name), CONTEXT)

    async def use(self, name: str, content: int) -> None:
        await self._update(Adapter(name=_name(name), version=self._version(name, content)), "version")

    async def pin(self, name: str, content: int, pinned: bool) -> None:
        await self._update(Adapter(name=self._version(name, content), pinned=pinned), "pinned")

    async def label(self, name: str, content: int) -> None:
        await self._update(Adapter(name=self._version(name, content), labels={"team": "a"}), "labels")

    async def change_all(self, name: str, content: int) -> None:
        changed = Adapter(name=_name(name), version=self._version(name, content), pinned=True, labels={"team": "b"})
        await self._update(changed, "version", "pinned", "labels")

    async def delete(self, name: str, content: int | None) -> None:
        deleted = _name(name) if content is None else self._version(name, content)
        await self.adapters.DeleteAdapter(DeleteAdapterRequest(name=deleted, wait=WAIT), CONTEXT)

    async def route(self, name: str, targets: Sequence[str], fallback: str) -> None:
        route = Route(name=f"tenants/shared/routes/{name}", targets=[RouteTarget(model=target) for target in targets])
        if fallback:
            route.fallback = fallback
        await self.routes.UpdateRoute(UpdateRouteRequest(route=route, allow_missing=True), CONTEXT)

    async def drop_route(self, name: str) -> None:
        await self.routes.DeleteRoute(DeleteRouteRequest(name=f"tenants/shared/routes/{name}"), CONTEXT)

    # ---- questions -----------------------------------------------------------------------------------------------

    def staying(self) -> list[AdapterVersion]:
        versions = self.registry.list_versions(include_versions=True)
        return [version for version in versions if version.state is not AdapterState.DELETING]

    def shape(self) -> Shape:
        """Everything that was asked for and not taken back; of adapters first which one, and whether it is current."""
        adapters = [[v.version_name, v.current, v.spec.pinned, dict(v.spec.labels)] for v in self.staying()]
        routes = [[route.name, [t.model for t in route.targets], route.fallback] for route in self.book.all()]
        return [*adapters, *routes]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(MOST_SECONDS):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.0005)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _files(self, content: int) -> Path:
        return self.directory / f"a{content}"

    def _version(self, name: str, content: int) -> str:
        return f"{_name(name)}@{digest(self._files(content))[:12]}"

    def _creation(self, name: str, pinned: bool, source: str) -> CreateAdapterRequest:
        adapter = Adapter(base_model="models/tiny", source=source, pinned=pinned)
        return CreateAdapterRequest(parent="tenants/shared", adapter_id=name, adapter=adapter, wait=WAIT)

    async def _update(self, adapter: Adapter, *fields: str) -> None:
        request = UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=fields))
        await self.adapters.UpdateAdapter(request, CONTEXT)


def _name(adapter: str) -> str:
    return f"tenants/shared/adapters/{adapter}"


class Points:
    """Counts what touches the disk below a directory, and kills this process at one of them."""

    def __init__(self, directory: Path, deadly: int) -> None:
        self.num = 0
        self._directory = str(directory)
        self._deadly = deadly
        sys.addaudithook(self._audit)

    def watch(self, connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(lambda statement: self._pass())

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(self._directory):
            self._pass()

    def _pass(self) -> None:
        self.num += 1
        if self.num == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)


Promise = Callable[[Any], None]


async def follow_script(life: Life, script: Sequence[Call], promise: Promise) -> None:
    await life.start()
    for method, arguments in script:
        before = life.shape()
        try:
            await getattr(life, method)(*arguments)
        except LoraplexError as error:
            if life.shape() != before:
                raise AssertionError(f"{method} {arguments} failed, and has changed something") from error
        promise(life.shape())
    await life.end()


async def _live(directory: Path, script: Sequence[Call], points: Points, promise: Promise) -> None:
    life = Life.begin(directory)
    assert isinstance(life.state, StateFile)
    points.watch(life.state._connection)
    await follow_script(life, script, promise)


def live(directory: Path, script: Sequence[Call], deadly: int) -> None:
    """One life in `directory`, to which is written what is there after each call, and how many points there were."""
    points = Points(directory / "state", deadly)
    with promising(directory) as promise:
        asyncio.run(_live(directory, script, points, promise))
        promise(points.num)


@contextmanager
def promising(directory: Path) -> Iterator[Promise]:
    """Write down what was promised, before anything else happens."""
    with (directory / "promises").open("w") as file:

        def promise(shape: Any) -> None:
            file.write(json.dumps(shape) + "\n")
            file.flush()

        yield promise
