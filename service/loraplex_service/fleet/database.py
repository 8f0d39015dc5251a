"""One connection to PostgreSQL, used by one thread at a time, and the statements of a fleet.

Nothing here knows the event loop. A connection that hangs is ended from outside, by `abandon`.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from loraplex_service.fleet.schema import STEPS, SchemaError, Step, check_readable, migrate

T = TypeVar("T")

CHANNEL = "loraplex_changes"
CONNECT_SECONDS = 5
STATEMENT_MILLISECONDS = 5000
MAX_BODY_BYTES = 16 << 20  # of one resource: a row beyond it is passed over
ROWS_AT_ONCE = 16
PEER_SECONDS = 15.0  # for which a replica counts after it was last seen
HISTORY_SECONDS = 86400.0  # for which changes are told one by one
SETTINGS = {
    "statement_timeout": STATEMENT_MILLISECONDS,
    "lock_timeout": STATEMENT_MILLISECONDS,
    "idle_in_transaction_session_timeout": STATEMENT_MILLISECONDS,
}


class DatabaseAway(Exception):  # noqa: N818  (named for what happened)
    """The database cannot be used now. The message holds no credentials."""


class Unsettled(DatabaseAway):
    """The connection was lost while a change was committed: it may be in force, or not."""


class Stale(Exception):  # noqa: N818
    """A change was refused, because others have changed something that the writer has not seen."""


class Cursor(NamedTuple):
    """How far changes are known: the last of them."""

    number: int
    mark: str  # of this one change; "": more are to be read before there is one


START = Cursor(0, "")  # nothing is known


class Row(NamedTuple):
    """The last change of one resource."""

    kind: str
    name: str
    body: bytes | None  # None: it is deleted, or
    size: int  # its body has so many bytes, which are too many
    sequence: int

    @property
    def is_too_large(self) -> bool:
        return self.size > MAX_BODY_BYTES


class News(NamedTuple):
    """What has changed since a cursor."""

    fleet: str
    rows: list[Row]
    cursor: Cursor  # up to which these rows tell everything
    whole: set[tuple[str, str]] | None  # all resources that there are, where the cursor said nothing; None: not so
    behind: int  # changes that are not among these rows yet
    schema: int  # of the tables


def checked_dsn(dsn: str) -> str:
    """Return a connection string as libpq reads it. Raises ValueError, which says nothing of what is in it."""
    try:
        return str(make_conninfo(dsn))
    except psycopg.Error:
        raise ValueError("it is no connection string that PostgreSQL's libpq reads") from None


class Database:
    """A connection that is made when it is needed, and made anew after it was lost."""

    def __init__(self, dsn: str, replica: str, listens: bool = False, steps: Sequence[Step] = STEPS) -> None:
        """`replica`: the name of this process, as other replicas see it. `listens`: whether `news` is asked for.

        Raises ValueError.
        """
        self._dsn = checked_dsn(dsn)
        self._password = str(conninfo_to_dict(self._dsn).get("password") or "")
        self._replica = replica
        self._listens = listens
        self._steps = steps
        self._connection: psycopg.Connection[Any] | None = None
        self._closed = False
        self._guard = threading.Lock()  # of the two above: `abandon` is called by another thread

    # ---- what replicas do --------------------------------------------------------------------------------------------

    def commit(self, cursor: Cursor, kind: str, name: str, body: bytes | None) -> Cursor:
        """Write one change, if nothing has changed since `cursor`. Returns the cursor of the change.

        Raises Stale, DatabaseAway, Unsettled.
        """
        connection = self._open()
        try:
            return self._commit(connection, cursor, kind, name, body)
        except psycopg.Error as error:
            refused = error.sqlstate is not None and not connection.broken
            self._lose(connection)
            if refused:
                raise DatabaseAway(self._said(error)) from None
        return self._settled(cursor, kind, name, body)

    def news(self, cursor: Cursor, wait_seconds: float = 0.0, going_on: bool = False) -> News:
        """What has changed since a cursor, after waiting so long for a change. Raises DatabaseAway, SchemaError.

        `going_on`: the cursor is of earlier news, which had too many changes for one answer.
        """
        return self._do(lambda connection: self._news(connection, cursor, wait_seconds, going_on))

    def beat(self, address: str) -> None:
        """Say that this replica lives. Raises DatabaseAway."""
        self._do(lambda connection: self._beat(connection, address))

    def peers(self) -> list[str]:
        """The addresses of the other replicas, the latest to be seen first. Raises DatabaseAway."""
        return self._do(self._peers)

    def settle(self, name: str, rate: float, capacity: float, owed: float, missing: float) -> float:
        """Pay what is owed to a bucket, and take as much as is missing, or as there is; negative: give it back.

        Returns what was taken. Raises DatabaseAway.
        """
        return self._do(lambda connection: _settled_bucket(connection, name, rate, capacity, owed, missing))

    def leave(self) -> None:
        """Say that this replica is gone. Raises DatabaseAway."""
        self._do(lambda connection: connection.execute("DELETE FROM loraplex_replicas WHERE id = %s", (self._replica,)))

    def secret(self) -> bytes:
        """What replicas prove to each other that they know. Raises DatabaseAway."""
        return self._do(lambda connection: bytes(connection.execute("SELECT secret FROM loraplex_head").fetchone()[0]))

    def abandon(self) -> None:
        """End the connection, from any thread: whatever waits for it fails. It is made anew when it is needed."""
        with self._guard:
            connection = self._connection
            if connection is None or connection.closed:
                return
            with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection for good, once no thread uses it."""
        self._closed = True
        if self._connection is not None:
            self._lose(self._connection)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[Any], T]) -> T:
        connection = self._open()
        try:
            return work(connection)
        except psycopg.Error as error:
            self._lose(connection)
            raise DatabaseAway(self._said(error)) from None

    def _open(self) -> "psycopg.Connection[Any]":
        if self._closed:
            raise DatabaseAway("the server is shutting down")
        connection = self._connection
        if connection is None or connection.closed:
            connection = self._connect()
        return connection

    def _connect(self) -> "psycopg.Connection[Any]":
        try:
            connection = psycopg.connect(
                self._dsn,
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name=f"loraplex {self._replica}",
                prepare_threshold=None,  # a pooler between the two keeps none
            )
        except psycopg.Error as error:
            raise DatabaseAway(self._said(error)) from None
        with self._guard:
            self._connection = connection
        try:
            self._set_up(connection)
        except psycopg.Error as error:
            self._lose(connection)
            raise DatabaseAway(self._said(error)) from None
        except SchemaError:
            self._lose(connection)
            raise
        return connection

    def _set_up(self, connection: "psycopg.Connection[Any]") -> None:
        for name, value in SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, str(value)))
        migrate(connection, self._steps)
        if self._listens:
            connection.execute(f"LISTEN {CHANNEL}")

    def _lose(self, connection: "psycopg.Connection[Any]") -> None:
        with self._guard, suppress(psycopg.Error):
            connection.close()

    def _said(self, error: psycopg.Error) -> str:
        """The first line of an error, without the password, should it be there."""
        text = (error.diag.message_primary or str(error) or type(error).__name__).strip().splitlines()[0]
        return text.replace(self._password, "***") if self._password else text

    def _commit(self, connection: Any, cursor: Cursor, kind: str, name: str, body: bytes | None) -> Cursor:
        with connection.transaction():
            found = connection.execute(
                "UPDATE loraplex_head SET last = last + 1, mark = gen_random_uuid()::text "
                "WHERE last = %s AND mark = %s AND (SELECT readable_by FROM loraplex_schema) <= %s "
                "RETURNING last, mark",
                (*cursor, len(self._steps)),
            ).fetchone()
            if found is None:
                raise Stale
            made = Cursor(*found)
            connection.execute("INSERT INTO loraplex_changes (sequence, mark) VALUES (%s, %s)", made)
            connection.execute(
                "INSERT INTO loraplex_resources (kind, name, body, sequence, writer) VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT (kind, name) DO UPDATE SET body = excluded.body, sequence = excluded.sequence, "
                "writer = excluded.writer",
                (kind, name, body, made.number, self._replica),
            )
            connection.execute("SELECT pg_notify(%s, '')", (CHANNEL,))
        return made

    def _settled(self, cursor: Cursor, kind: str, name: str, body: bytes | None) -> Cursor:
        """Find out what became of a change during which the connection was lost, and write it if it is not there."""
        try:
            connection = self._open()
            found = connection.execute(
                "SELECT sequence, mark FROM loraplex_resources JOIN loraplex_changes USING (sequence) WHERE kind = %s "
                "AND name = %s AND writer = %s AND sequence = %s AND body IS NOT DISTINCT FROM %s",
                (kind, name, self._replica, cursor.number + 1, body),
            ).fetchone()
            return self._commit(connection, cursor, kind, name, body) if found is None else Cursor(*found)
        except psycopg.Error as error:
            raise Unsettled(self._said(error)) from None
        except DatabaseAway as error:
            raise Unsettled(str(error)) from None

    def _news(self, connection: Any, cursor: Cursor, wait_seconds: float, going_on: bool) -> News:
        fleet, last, schema = self._head(connection)
        if wait_seconds and last == cursor:
            for _ in connection.notifies(timeout=wait_seconds, stop_after=1):
                pass
            fleet, last, schema = self._head(connection)
        whole = None
        if last != cursor and not going_on and not _is_of_history(connection, cursor):
            found = connection.execute("SELECT kind, name FROM loraplex_resources WHERE body IS NOT NULL")
            whole, cursor = set(found.fetchall()), START
        rows = _rows(connection, cursor, last)
        if len(rows) < ROWS_AT_ONCE or rows[-1].sequence == last.number:
            return News(fleet, rows, last, whole, 0, schema)
        known = rows[-1].sequence
        return News(fleet, rows, Cursor(known, ""), whole, last.number - known, schema)

    def _head(self, connection: Any) -> tuple[str, Cursor, int]:
        """The fleet, its last change and the schema. Raises SchemaError if others have changed it too far meanwhile."""
        fleet, last, mark, schema, readable_by = connection.execute(
            "SELECT fleet, last, mark, version, readable_by FROM loraplex_head, loraplex_schema"
        ).fetchone()
        check_readable(schema, readable_by, len(self._steps))
        return fleet, Cursor(last, mark), schema

    def _beat(self, connection: Any, address: str) -> None:
        connection.execute(
            "INSERT INTO loraplex_replicas (id, address, schema) VALUES (%s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET address = excluded.address, schema = excluded.schema, seen = now()",
            (self._replica, address, len(self._steps)),
        )
        connection.execute(
            "DELETE FROM loraplex_replicas WHERE seen < now() - make_interval(secs => %s)", (60 * PEER_SECONDS,)
        )
        connection.execute("DELETE FROM loraplex_buckets WHERE filled < now() - interval '30 days'")  # they are full
        self._prune(connection)

    def _peers(self, connection: Any) -> list[str]:
        found = connection.execute(
            "SELECT left(address, 300) FROM loraplex_replicas WHERE id <> %s AND address <> '' "
            "AND seen > now() - make_interval(secs => %s) ORDER BY seen DESC LIMIT 64",
            (self._replica, PEER_SECONDS),
        )
        return [address for (address,) in found.fetchall()]

    def _prune(self, connection: Any) -> None:
        """Forget changes of long ago. A replica that knows none of those that are left reads everything anew."""
        connection.execute(
            "DELETE FROM loraplex_changes WHERE made < now() - make_interval(secs => %s) "
            "AND sequence < (SELECT last FROM loraplex_head)",
            (HISTORY_SECONDS,),
        )
        connection.execute(
            "DELETE FROM loraplex_resources WHERE body IS NULL "
            "AND sequence <= (SELECT min(sequence) FROM loraplex_changes)"
        )


def _settled_bucket(connection: Any, name: str, rate: float, capacity: float, owed: float, missing: float) -> float:
    with connection.transaction():
        (level,) = connection.execute(  # an update of nothing, to hold the row: others may be about to delete it
            "INSERT INTO loraplex_buckets AS bucket (name, level) VALUES (%s, %s) "
            "ON CONFLICT (name) DO UPDATE SET filled = bucket.filled RETURNING least(%s::float8, bucket.level "
            "+ %s::float8 * greatest(0, extract(epoch FROM clock_timestamp() - bucket.filled))::float8)",
            (name, capacity, capacity, rate),
        ).fetchone()
        taken = min(missing, max(0.0, level - owed))
        connection.execute(
            "UPDATE loraplex_buckets SET level = %s, filled = clock_timestamp() WHERE name = %s",
            (min(capacity, level - owed - taken), name),
        )
    return float(taken)


def _is_of_history(connection: Any, cursor: Cursor) -> bool:
    found = connection.execute("SELECT FROM loraplex_changes WHERE sequence = %s AND mark = %s", cursor)
    return found.fetchone() is not None


def _rows(connection: Any, cursor: Cursor, last: Cursor) -> list[Row]:
    found = connection.execute(
        "SELECT kind, name, CASE WHEN octet_length(body) <= %s THEN body END, coalesce(octet_length(body), 0), "
        "sequence FROM loraplex_resources WHERE sequence > %s AND sequence <= %s ORDER BY sequence LIMIT %s",
        (MAX_BODY_BYTES, cursor.number, last.number, ROWS_AT_ONCE),
        binary=True,
    )
    return [Row(*row) for row in found.fetchall()]
