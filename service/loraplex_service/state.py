"""The state that survives a restart: the bodies of resources, by kind and name, in one SQLite file.

Changes are noted in memory and written by a separate thread; changes noted together are written in one transaction. So
the file always holds a state that the service had at some moment, whenever it is killed. A change that a caller asks
for is written first (`save`), and comes into force after that.
"""

import asyncio
import logging
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loraplex_service.errors import Unavailable

logger = logging.getLogger(__name__)

FILE_NAME = "state.sqlite3"
IN_MEMORY = ":memory:"
SCHEMA_VERSION = 1
RETRY_SECONDS = 5.0  # after which callers may try again

T = TypeVar("T")
_Key = tuple[str, str]  # kind, name
Followed = Callable[[str, bytes | None], None]  # told the name of a resource and its body; None: it is gone


class State(Protocol):
    """The bodies of resources, by kind and name: those of one server, or those that a fleet shares."""

    @property
    def is_current(self) -> bool:
        """Whether all that others have changed is known."""

    def read(self, kind: str) -> dict[str, bytes]:
        """See `StateFile.read`, as for the methods below."""

    def set_aside(self, kind: str, name: str, body: bytes, error: Exception) -> str: ...

    def put(self, kind: str, name: str, body: bytes) -> None: ...

    def delete(self, kind: str, name: str) -> None: ...

    def size(self, tenant: str) -> int: ...

    async def change(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T: ...

    async def save(self, kind: str, name: str, body: bytes | None) -> None: ...

    async def saved(self) -> None: ...

    def follow(self, kind: str, changed: Followed) -> None:
        """Have changes told that others make."""

    async def start(self) -> None:
        """Begin to follow others. Raises OSError for a state that cannot be used."""

    async def close(self) -> None: ...


class UnsettledChange(Unavailable):
    """Whether the change is in force will only be known later."""


class StateFile:
    """The state file. For one event loop; one thread at a time uses SQLite."""

    def __init__(self, directory: Path | None) -> None:
        """`directory`: None: everything is kept in memory alone, and nothing survives.

        Raises OSError for a file that cannot be used, for example because another server uses it.
        """
        self._file = IN_MEMORY if directory is None else str(directory / FILE_NAME)
        self._connection = _open(self._file, directory)
        self._writer = ThreadPoolExecutor(1, "state")
        self._sizes: defaultdict[str, dict[_Key, int]] = defaultdict(dict)  # of bodies, by tenant
        for kind, name, size in self._select("SELECT kind, name, length(body) FROM resources"):
            self._sizes[_tenant_of(name)][kind, name] = size
        self._changes: dict[_Key, bytes | None] = {}  # noted and not yet being written; None: deleted
        self._changing = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._num_noted = 0
        self._num_saved = 0
        self._writing: asyncio.Task[sqlite3.Error | None] | None = None

    def read(self, kind: str) -> dict[str, bytes]:
        """The saved bodies of all resources of a kind, by name. Raises OSError if they cannot be read."""
        query = "SELECT name, CAST(body AS BLOB) FROM resources WHERE kind = ? ORDER BY name"
        return dict(self._select(query, kind))

    def set_aside(self, kind: str, name: str, body: bytes, error: Exception) -> str:
        """Keep a copy of a body that cannot be read, and log that. Returns the problem as text.

        The body itself stays until another is saved under its name.
        """
        problem = f"its record in {self._file} ({kind} {name!r}) is damaged: {error}"
        logger.error("%s %s cannot be brought back: %s; a copy is kept as 'damaged %s'", kind, name, problem, kind)
        self.put(f"damaged {kind}", name, body)
        return f"{problem}; register it again, or delete it"

    def put(self, kind: str, name: str, body: bytes) -> None:
        """Note the new body of a resource. Changes noted before the caller next awaits are written together."""
        self._note((kind, name), body)

    def delete(self, kind: str, name: str) -> None:
        """Note that a resource is gone."""
        self._note((kind, name), None)

    async def change(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a change after all earlier ones have ended, even if its caller goes away meanwhile."""

        async def alone() -> T:
            async with self._changing:
                return await work()

        task = asyncio.create_task(alone())
        self._under_way.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: "asyncio.Task[Any]") -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if its caller went away

    async def save(self, kind: str, name: str, body: bytes | None) -> None:
        """Write the coming body of a resource to the disk; None: its deletion.

        Raises Unavailable (STATE_UNWRITABLE).
        """
        key = (kind, name)
        superseded = {key: self._changes.pop(key)} if key in self._changes else {}
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._commit, {key: body})
        except sqlite3.Error as error:
            self._changes = superseded | self._changes
            logger.error("a change of the %s %s cannot be saved, and is refused: %s", kind, name, error)
            raise unwritable(error) from error
        self._keep_size(key, body)

    def size(self, tenant: str) -> int:
        """The bytes of all resources of a tenant."""
        return sum(self._sizes[tenant].values()) if tenant in self._sizes else 0

    async def saved(self) -> None:
        """Wait until everything that was noted before the call is on the disk.

        Raises Unavailable (STATE_UNWRITABLE) if writing fails. The changes stay noted, and the next call or change
        tries again.
        """
        wanted = self._num_noted
        while self._num_saved < wanted:
            error = await asyncio.shield(self._write_soon())
            if error is not None:
                raise unwritable(error) from error

    @property
    def is_current(self) -> bool:
        return True

    def follow(self, kind: str, changed: Followed) -> None:
        """Nobody else writes this file: there is nothing to tell."""

    async def start(self) -> None:
        """There is nobody to follow."""

    async def close(self) -> None:
        """Write what is left and close the file."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        with suppress(Unavailable):  # it is in the log
            await self.saved()
        self._writer.shutdown()
        self._connection.close()

    def _select(self, query: str, *values: str) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise OSError(f"state_directory: {self._file} is damaged: {error}") from error

    def _note(self, key: _Key, body: bytes | None) -> None:
        self._changes[key] = body
        self._keep_size(key, body)
        self._num_noted += 1
        self._write_soon()

    def _keep_size(self, key: _Key, body: bytes | None) -> None:
        sizes = self._sizes[_tenant_of(key[1])]
        if body is None:
            sizes.pop(key, None)
        else:
            sizes[key] = len(body)

    def _write_soon(self) -> "asyncio.Task[sqlite3.Error | None]":
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return self._writing

    async def _write(self) -> sqlite3.Error | None:
        changes, self._changes = self._changes, {}
        number = self._num_noted
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._commit, changes)
        except sqlite3.Error as error:
            self._changes = changes | self._changes
            logger.error("adapters and routes cannot be saved, a restart would lose their last changes: %s", error)
            return error
        finally:
            self._writing = None
        self._num_saved = number
        if self._changes:
            self._write_soon()
        return None

    def _commit(self, changes: dict[_Key, bytes | None]) -> None:
        if self._file != IN_MEMORY and not Path(self._file).exists():  # SQLite would go on writing what nobody finds
            raise sqlite3.OperationalError(f"{self._file} was removed; start the server again to have a new one")
        gone = [key for key, body in changes.items() if body is None]
        there = [(*key, body) for key, body in changes.items() if body is not None]
        with self._connection:  # one transaction
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("DELETE FROM resources WHERE kind = ? AND name = ?", gone)
            self._connection.executemany("INSERT OR REPLACE INTO resources VALUES (?, ?, ?)", there)


def unwritable(error: object) -> Unavailable:
    """The error for a change that is not in force, because of this."""
    message = f"the server cannot save the change now ({error}), so it is not in force; try again later"
    return Unavailable("STATE_UNWRITABLE", message, RETRY_SECONDS)


def _tenant_of(name: str) -> str:
    """The tenant in a name of the form tenants/{tenant}/… or {tenant}/…."""
    return name.removeprefix("tenants/").partition("/")[0]


def _open(file: str, directory: Path | None) -> sqlite3.Connection:
    try:
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(file, timeout=0, check_same_thread=False, isolation_level=None)
        # Held from the first write on, for as long as the process lives: two servers on one file would each overwrite
        # what the other knows.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        _check_schema(connection, file)
    except (sqlite3.Error, OSError) as error:
        busy = getattr(error, "sqlite_errorname", "") == "SQLITE_BUSY"
        why = "another server is using it" if busy else str(error)
        raise OSError(f"state_directory: {file} cannot be used: {why}") from error
    return connection


def _check_schema(connection: sqlite3.Connection, file: str) -> None:
    connection.execute("BEGIN IMMEDIATE")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > SCHEMA_VERSION:
        raise OSError(
            f"{file} was written by a newer version of Loraplex (schema {found}, this one knows {SCHEMA_VERSION}): "
            "start that one, or use a copy of the state_directory from before it"
        )
    connection.execute(
        "CREATE TABLE IF NOT EXISTS resources (kind TEXT, name TEXT, body BLOB NOT NULL, PRIMARY KEY (kind, name))"
    )
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
