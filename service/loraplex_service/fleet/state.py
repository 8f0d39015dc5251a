"""The state of one replica of a fleet: the database's, and its own file with what it knew last and found out itself.

A change that a caller asks for is committed to the database first, and only if this replica has seen all changes
before it; else it catches up and the change is looked at again. What others change comes in by `follow`. What a replica
notes of its own (what its engine said of an adapter) goes to its file alone, which it also starts from.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

from loraplex_service.fleet.database import (
    CONNECT_SECONDS,
    START,
    Cursor,
    Database,
    DatabaseAway,
    News,
    Row,
    Stale,
    Unsettled,
)
from loraplex_service.fleet.figures import FleetFigures
from loraplex_service.fleet.schema import SchemaError
from loraplex_service.state import RETRY_SECONDS, Followed, StateFile, UnsettledChange, unwritable

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

CURSOR_KIND, CURSOR_NAME = "fleet", "cursor"  # in the replica's own file: which fleet it belongs to
WAIT_SECONDS = 0.5  # for a change; then it is asked for, should a notification be lost
AWAY_SECONDS = 0.5  # until the database is tried again
PATIENCE_SECONDS = 3.0 + CONNECT_SECONDS  # for one piece of work in the database
TRIES = 50  # of one change that others come before
BEAT_SECONDS = 3.0


class FleetState:
    """The state of a replica. For one event loop; PostgreSQL is used in threads."""

    def __init__(self, local: StateFile, make: Callable[[bool], Database]) -> None:
        """`local`: the replica's own file. `make`: a connection of its own; with True one that hears of changes."""
        self._local = local
        self._writer, self._follower = make(False), make(True)
        self._threads = {database: ThreadPoolExecutor(1, "fleet") for database in (self._writer, self._follower)}
        self.address = ""  # where other replicas reach this one; "": nowhere
        self._followed: dict[str, Followed] = {}
        self._applying = asyncio.Lock()
        self._cursor = START
        self._going_on = False  # whether there was more than the last news had
        self._fleet = local.read(CURSOR_KIND).get(CURSOR_NAME)  # None: it has not joined one yet
        self._names: set[tuple[str, str]] = set()  # of what is shared and known here
        self._unread: set[tuple[str, str]] = set()  # of what is shared, and not known here
        self._following: asyncio.Task[None] | None = None
        self._beat_at = 0.0
        self._found_fleet = b""
        self._peers: list[str] = []  # the addresses of the other replicas
        self.secret = b""
        self.figures = FleetFigures()

    # ---- as with a file ----------------------------------------------------------------------------------------------

    def read(self, kind: str) -> dict[str, bytes]:
        """What this replica knows of all resources of a kind, by name. Raises OSError if it cannot be read."""
        return self._local.read(kind)

    def set_aside(self, kind: str, name: str, body: bytes, error: Exception) -> str:
        """Do as `StateFile.set_aside`."""
        return self._local.set_aside(kind, name, body, error)

    def put(self, kind: str, name: str, body: bytes) -> None:
        """Note what this replica alone has to know."""
        self._local.put(kind, name, body)

    def delete(self, kind: str, name: str) -> None:
        """Note that this replica need not know a resource any more."""
        self._local.delete(kind, name)

    def size(self, tenant: str) -> int:
        """The bytes of all resources of a tenant."""
        return self._local.size(tenant)

    async def saved(self) -> None:
        """Do as `StateFile.saved`, of what was noted here."""
        await self._local.saved()

    # ---- shared ------------------------------------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Whether all that others have changed is known, but for a moment."""
        return self.figures.connected

    def follow(self, kind: str, changed: Followed) -> None:
        """Have the changes by others told: the name of a resource and its body; None: it is gone."""
        self._followed[kind] = changed

    async def change(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a change after all earlier ones, and again if others came before it in the fleet.

        Raises Unavailable (STATE_UNWRITABLE) while the database cannot be used.
        """

        async def until_it_counts() -> T:
            for _ in range(TRIES):
                if not self.figures.connected:
                    raise unwritable("the database of the fleet cannot be reached")
                try:
                    return await work()
                except Stale:
                    await self._catch_up_for_change()
            raise unwritable("other replicas make too many changes at once")

        return await self._local.change(until_it_counts)

    async def save(self, kind: str, name: str, body: bytes | None) -> None:
        """Commit the coming body of a resource for the whole fleet; None: its deletion. Call it within `change`.

        Raises Unavailable (STATE_UNWRITABLE); Stale, for `change` to take.
        """
        if (kind, name) in self._unread:
            raise unwritable(f"the {kind} {name} has a change that this replica cannot read; others may be newer")
        async with self._applying:  # so that it is not taken for the change of another
            try:
                number = await self._run(self._writer, self._writer.commit, self._cursor, kind, name, body)
            except Unsettled as error:
                message = f"the database was lost while the change was written ({error}); look whether it is in force"
                raise UnsettledChange("STATE_UNWRITABLE", message, RETRY_SECONDS) from error
            except (DatabaseAway, SchemaError) as error:
                logger.error("a change of the %s %s cannot be saved, and is refused: %s", kind, name, error)
                raise unwritable(str(error)) from error
            self._move(number)
            self._keep_name(kind, name, body is not None)
            if body is None:
                self._local.delete(kind, name)
            else:
                self._local.put(kind, name, body)

    async def _catch_up_for_change(self) -> None:
        try:
            await self._catch_up()
        except (DatabaseAway, SchemaError) as error:
            raise unwritable(error) from error

    async def settle(self, name: str, rate: float, capacity: float, owed: float, missing: float) -> float:
        """Do as `Database.settle`. Raises DatabaseAway, at once if that is known."""
        if not self.figures.connected:
            raise DatabaseAway("it cannot be reached")
        try:
            return await self._run(self._writer, self._writer.settle, name, rate, capacity, owed, missing)
        except SchemaError as error:
            raise DatabaseAway(str(error)) from error

    async def peers(self) -> list[str]:
        """The addresses of the other replicas as they are now, or as they were when the database was there."""
        if self.figures.connected:
            with suppress(DatabaseAway, SchemaError):
                self._know_peers(await self._run(self._writer, self._writer.peers))
        return self._peers

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Catch up, and follow from then on. What a server had on its own before it joined is brought along.

        Without the database it starts with what it knew last. Raises OSError if it has never known anything, or if
        the database is of another fleet or schema.
        """
        own = {(kind, name): body for kind in self._followed for name, body in self._local.read(kind).items()}
        if self._fleet is not None:
            self._names, own = set(own), {}
        try:
            await self._catch_up()
            await self._beat()
            await self._bring_along(own)
        except SchemaError as error:
            raise OSError(f"state: {error}") from error
        except DatabaseAway as error:
            if self._fleet is None:
                raise OSError(f"state: the database cannot be used: {error}") from error
            self._away(error)
        self._following = asyncio.create_task(self._follow(), name="fleet")

    async def close(self) -> None:
        """End what is under way, and write what is left to the replica's own file."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._local.close()
        with suppress(DatabaseAway):
            if self.figures.connected:
                await self._run(self._writer, self._writer.leave)
        for database, thread in self._threads.items():
            database.abandon()
            await asyncio.to_thread(thread.shutdown)
            database.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                if loop.time() > self._beat_at:
                    await self._beat()
                await self._catch_up(WAIT_SECONDS)
            except Exception as error:  # whatever the database holds, a replica goes on
                self._away(error)
                await asyncio.sleep(AWAY_SECONDS)

    async def _bring_along(self, own: dict[tuple[str, str], bytes]) -> None:
        """Give the fleet what this server had before it joined, and the fleet has not under the same name."""
        for (kind, name), body in own.items():
            if (kind, name) not in self._names:
                await self.change(partial(self._bring, kind, name, body))
        if self._fleet is None:
            self._fleet = self._found_fleet
            self._local.put(CURSOR_KIND, CURSOR_NAME, self._fleet)

    async def _bring(self, kind: str, name: str, body: bytes) -> None:
        if (kind, name) not in self._names:
            await self.save(kind, name, body)
            self._followed[kind](name, body)

    async def _beat(self) -> None:
        if not self.secret:
            self.secret = await self._run(self._follower, self._follower.secret)
        await self._run(self._follower, self._follower.beat, self.address)
        self._know_peers(await self._run(self._follower, self._follower.peers))
        self._beat_at = asyncio.get_running_loop().time() + BEAT_SECONDS

    def _know_peers(self, addresses: list[str]) -> None:
        self._peers, self.figures.peers = addresses, len(addresses)

    async def _catch_up(self, wait_seconds: float = 0.0) -> None:
        """Apply what has changed. Raises DatabaseAway, SchemaError."""
        while True:
            before = self._cursor
            news = await self._news(wait_seconds)
            async with self._applying:
                if self._cursor == before:  # else some of it has been applied meanwhile
                    await self._apply(news)
            if not self.figures.connected:
                logger.info("the replica follows its fleet, whose database has schema %d", news.schema)
            self.figures.connected, self.figures.schema = True, news.schema
            if not news.behind:
                return

    async def _news(self, wait_seconds: float) -> News:
        try:
            return await self._run(self._follower, self._follower.news, self._cursor, wait_seconds, self._going_on)
        except DatabaseAway:
            if self._going_on:  # what comes next may be of another history
                self._move(START)
                self._going_on = False
            raise

    async def _apply(self, news: News) -> None:
        self._check_fleet(news.fleet)
        self.figures.behind = len(news.rows) + news.behind
        if news.whole is not None:  # before it has joined, there is nothing that it knows of
            for kind, name in sorted(self._names - news.whole):
                self._tell(Row(kind, name, None, 0, 0))
            self._unread &= news.whole
        for number, row in enumerate(news.rows):
            self._tell(row)
            if number % 4 == 3:
                await asyncio.sleep(0)  # others have their turn
        self._move(news.cursor)
        self._going_on = news.behind > 0
        self.figures.behind = news.behind

    def _tell(self, row: Row) -> None:
        """Bring one change into force. One that cannot be read is passed over: it must not end a replica."""
        followed = self._followed.get(row.kind)
        try:
            if row.is_too_large:
                raise ValueError(f"it has {row.size} bytes")
            if followed is not None:
                followed(row.name, row.body)
                self._keep_name(row.kind, row.name, row.body is not None)
        except Exception as error:  # whatever a row says
            self._unread.add((row.kind, row.name))
            self.figures.passed_over += 1
            logger.error("the change of the %s %.200r in the fleet is passed over: %s", row.kind, row.name, error)
        else:
            self._unread.discard((row.kind, row.name))
            self.figures.applied += 1

    def _keep_name(self, kind: str, name: str, there: bool) -> None:
        (self._names.add if there else self._names.discard)((kind, name))

    def _move(self, cursor: Cursor) -> None:
        self._cursor, self.figures.cursor = cursor, cursor.number

    def _check_fleet(self, fleet: str) -> None:
        """Raise SchemaError for the database of another fleet: its truth is not about this replica's files."""
        self._found_fleet = fleet.encode()
        if self._fleet not in (None, self._found_fleet):
            raise SchemaError(
                "the database belongs to another fleet than state_directory; give the server another state_directory"
            )

    def _away(self, error: Exception) -> None:
        if self.figures.connected or not self.figures.lost:
            logger.error("the fleet's database cannot be used, and changes are refused until it can: %s", error)
        self.figures.lost += 1
        self.figures.connected = False

    async def _run(self, database: Database, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work in the thread of a connection. One that hangs is ended. Raises DatabaseAway."""
        doing = asyncio.get_running_loop().run_in_executor(self._threads[database], lambda: work(*args, **kwargs))
        try:
            await asyncio.wait({doing}, timeout=PATIENCE_SECONDS)
        finally:
            await _ended(doing, database)
        return await doing


async def _ended(doing: "asyncio.Future[Any]", database: Database) -> None:
    """Wait for the end of work, whose connection is ended until it has: it may make another, which hangs as well."""
    while not doing.done():
        database.abandon()
        await asyncio.wait({doing}, timeout=PATIENCE_SECONDS)
    doing.exception()  # seen, even if its caller went away
