"""The life of a replica that ends with SIGKILL at a statement of a change. Run as a process of its own."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from loraplex_adapters.registry import AdapterRegistry
from loraplex_adapters.shared_registry import SharedAdapterRegistry
from loraplex_service.adapters.background import BackgroundWork
from loraplex_service.adapters.records import AdapterRecords
from loraplex_service.adapters.shared_records import SharedRecords
from loraplex_service.fleet.database import Cursor, Database
from loraplex_service.fleet.state import FleetState
from loraplex_service.state import State, StateFile
from tests.service.killed_life import Call, Life, follow_script, promising


class Statements:
    """Counts the statements of changes, and kills this process at one of them."""

    def __init__(self, deadly: int) -> None:
        self.num = 0
        self._deadly = deadly

    def pass_one(self) -> None:
        self.num += 1
        if self.num == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedConnection:
    """A connection on which each statement of a change counts, and so do its beginning and its end."""

    def __init__(self, connection: Any, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements

    def execute(self, *statement: Any) -> Any:
        self._statements.pass_one()
        return self._connection.execute(*statement)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._connection.transaction():
            self._statements.pass_one()
            yield
            self._statements.pass_one()
        self._statements.pass_one()


class WatchedDatabase(Database):
    statements: Statements

    def _commit(self, connection: Any, *change: Any) -> Cursor:
        return super()._commit(WatchedConnection(connection, self.statements), *change)


def joining(dsn: str, statements: Statements) -> Callable[..., tuple[State, AdapterRegistry, AdapterRecords]]:
    def database(listens: bool) -> Database:
        made = WatchedDatabase(dsn, str(os.getpid()), listens)
        made.statements = statements
        return made

    def join(local: StateFile, work: BackgroundWork) -> tuple[State, AdapterRegistry, AdapterRecords]:
        registry, state = SharedAdapterRegistry(), FleetState(local, database)
        return state, registry, SharedRecords(registry, state, work)

    return join


async def _live(directory: Path, dsn: str, script: Sequence[Call], statements: Statements, promise: Any) -> None:
    await follow_script(Life.begin(directory, joining(dsn, statements)), script, promise)


def live(directory: Path, dsn: str, script: Sequence[Call], deadly: int) -> None:
    """One life, of which is written down what is there after each call, and how many statements there were."""
    statements = Statements(deadly)
    with promising(directory) as promise:
        asyncio.run(partial(_live, directory, dsn, script, statements, promise)())
        promise(statements.num)
