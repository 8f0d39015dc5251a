"""A life of the service's knowledge of adapters that ends with SIGKILL at a chosen point. Run as a process of its own.

It registers, swaps and deletes as the control plane does, and writes down each promise once it is made.
Points are everything that touches the disk: files opened, made, renamed and removed, and the statements of the
database.
"""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from adapters.depot import Depot
from adapters.registry import AdapterRegistry, AdapterSpec, AdapterState, AdapterVersion
from adapters.remote import RemoteSources
from adapters.source import CONFIG_FILE, WEIGHTS_FILE, AdapterSource
from service.adapter_files import AdapterLibrary
from service.deployment import AdapterDeployer
from service.hosting import ModelHost
from service.state import StateFile
from service.tenants import Tenants
from tests.service.fake_engine import LIMITS, FakeEngine

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class FakeHost:
    """Hosts "tiny", with a fake engine."""

    def __init__(self, engine: FakeEngine) -> None:
        supervisor = SimpleNamespace(limits=LIMITS)
        config = SimpleNamespace(adapter_host_bytes=1 << 30)
        self._model = SimpleNamespace(name="tiny", client=engine.client, supervisor=supervisor, config=config)

    def find(self, name: str) -> Any:
        return self._model if name == "tiny" else None

    get = find

    def subscribe(self, callback: Callable[[Any], None]) -> Callable[[], None]:
        return lambda: None


@dataclass
class Life:
    """The parts of the service that know adapters."""

    state: StateFile
    registry: AdapterRegistry
    library: AdapterLibrary
    deployer: AdapterDeployer
    engine: FakeEngine

    @classmethod
    def begin(cls, directory: Path) -> "Life":
        engine = FakeEngine()
        state = StateFile(directory / "state")
        registry = AdapterRegistry()
        depot = Depot(directory / "state" / "adapters")
        library = AdapterLibrary(AdapterSource([directory]), RemoteSources((), {}, 0), depot)
        host = cast(ModelHost, FakeHost(engine))
        return cls(state, registry, library, AdapterDeployer(registry, library, host, state, Tenants()), engine)

    async def end(self) -> None:
        await self.deployer.close()
        await self.state.close()
        await self.engine.close()

    # ---- what the control plane does -----------------------------------------------------------------------------

    async def upload(self, name: str, content: Path) -> None:
        spec = AdapterSpec("tiny", "")
        async with self.library.gather() as gathering:
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                await gathering.append(file, (content / file).read_bytes())
            files = await gathering.check("upload")
            version = self.deployer.create("shared", name, spec, files)
        await self._active(version)

    async def register(self, name: str, source: str) -> None:
        async with self.library.find(source) as files:
            version = self.deployer.create("shared", name, AdapterSpec("tiny", source), files)
        await self._active(version)

    async def _active(self, version: AdapterVersion) -> None:
        await self.state.saved()
        await self.until(lambda: self.version(version).state is AdapterState.ACTIVE)
        await self.state.saved()

    async def use(self, version_name: str) -> None:
        self.registry.set_current(version_name)
        await self.state.saved()

    async def label(self, name: str) -> None:
        self.registry.update(name, labels={"team": "a"})
        await self.state.saved()

    async def delete(self, name: str) -> None:
        versions = self.registry.delete(name)
        await self.state.saved()
        await self.until(lambda: not any(self.is_there(version) for version in versions))
        await self.state.saved()

    # ---- questions -----------------------------------------------------------------------------------------------

    def version(self, version: AdapterVersion) -> AdapterVersion:
        return self.registry.get(f"{version.name}@{version.key.digest}")

    def is_there(self, version: AdapterVersion) -> bool:
        return any(other.key == version.key for other in self.registry.list_versions(include_versions=True))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.0005)

    def shape(self) -> list[list[Any]]:
        """Every version that is not leaving: its name, and whether it is the current one."""
        versions = self.registry.list_versions(include_versions=True)
        return [[v.version_name, v.current] for v in versions if v.state is not AdapterState.DELETING]


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


async def _live(directory: Path, points: Points, promise: Callable[[str, Any], None]) -> None:
    life = Life.begin(directory)
    points.watch(life.state._connection)
    await life.deployer.reconcile()
    contents = [directory / "a0", directory / "a1"]

    async def do(what: str, work: Awaitable[None]) -> None:
        await work
        promise(what, life.shape())

    await do("upload the first version", life.upload("pirate", contents[0]))
    first = life.registry.get("tenants/shared/adapters/pirate")
    await do("upload the second version", life.upload("pirate", contents[1]))
    second = life.registry.get("tenants/shared/adapters/pirate")
    await do("move the alias back", life.use(first.version_name))
    await do("register a directory", life.register("local", "a0"))
    await do("label it", life.label("tenants/shared/adapters/local"))
    await do("delete the second version", life.delete(second.version_name))
    await do("upload the same content again", life.upload("again", contents[1]))
    await do("delete the whole adapter", life.delete("tenants/shared/adapters/pirate"))
    await life.end()


def live(directory: Path, deadly: int) -> None:
    """One life in `directory`, to which everything that was promised is written, and how many points there were."""
    points = Points(directory / "state", deadly)
    with (directory / "promises").open("a") as file:

        def promise(what: str, shape: Any) -> None:
            file.write(json.dumps([what, shape]) + "\n")
            file.flush()

        asyncio.run(_live(directory, points, promise))
        file.write(json.dumps(["points", points.num]) + "\n")
