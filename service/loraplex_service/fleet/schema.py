"""The tables of a fleet and how they change from one version of Loraplex to the next.

Each step adds, so that replicas of the version before go on beside those of the new one: `readable_by` says which
schema a replica must know at least. A step that takes away what the version before uses comes one version later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """What makes one schema of the one before."""

    statements: tuple[str, ...]
    readable_by: int  # the oldest schema whose replicas work on the result


FIRST = Step(
    (
        # One row: the number and the mark of the last change. Whoever changes anything moves it on from those that it
        # knows, so changes have an order without gaps, and nobody changes what they have not seen.
        "CREATE TABLE loraplex_head (one boolean PRIMARY KEY DEFAULT true CHECK (one), fleet text NOT NULL, "
        "last bigint NOT NULL DEFAULT 0, mark text NOT NULL DEFAULT gen_random_uuid()::text, secret bytea NOT NULL)",
        "INSERT INTO loraplex_head (fleet, secret) VALUES (gen_random_uuid()::text, "
        "decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'))",
        # The changes of late. The same number with another mark is a change of another history: that of a database
        # which has lost its last changes, by a failover or with an older backup, and has gone on.
        "CREATE TABLE loraplex_changes (sequence bigint PRIMARY KEY, mark text NOT NULL, "
        "made timestamptz NOT NULL DEFAULT now())",
        "INSERT INTO loraplex_changes (sequence, mark) SELECT last, mark FROM loraplex_head",
        # A body that is NULL: the resource was deleted. Such rows are pruned when all have long seen them.
        "CREATE TABLE loraplex_resources (kind text, name text, body bytea, sequence bigint NOT NULL UNIQUE, "
        "writer text NOT NULL, PRIMARY KEY (kind, name))",
        "CREATE TABLE loraplex_replicas (id text PRIMARY KEY, address text NOT NULL, schema integer NOT NULL, "
        "seen timestamptz NOT NULL DEFAULT now())",
        "CREATE TABLE loraplex_buckets (name text PRIMARY KEY, level double precision NOT NULL, "
        "filled timestamptz NOT NULL DEFAULT clock_timestamp())",
    ),
    readable_by=1,
)
STEPS = (FIRST,)
_LOCK = 0x6C6F7261  # the advisory lock under which schemas change


class SchemaError(Exception):
    """The tables are of a version that this one cannot work with. The message says which of the two must change."""


def found_schema(connection: Any) -> tuple[int, int]:
    """The schema of the tables, and the oldest that works on them; (0, 0): there are no tables."""
    (there,) = connection.execute("SELECT to_regclass('loraplex_schema') IS NOT NULL").fetchone()
    if not there:
        return 0, 0
    version, readable_by = connection.execute("SELECT version, readable_by FROM loraplex_schema").fetchone()
    return version, readable_by


def migrate(connection: Any, steps: Sequence[Step] = STEPS) -> int:
    """Bring the tables to this version's schema, in one transaction. Returns the schema that they have then.

    Tables of a newer schema stay as they are. Raises SchemaError if that one cannot be used.
    """
    if found_schema(connection)[0] < len(steps):
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            _step_forward(connection, steps)
    version, readable_by = found_schema(connection)
    check_readable(version, readable_by, len(steps))
    return version


def check_readable(version: int, readable_by: int, known: int) -> None:
    """Raise SchemaError if who knows this schema cannot use the tables."""
    if readable_by > known:
        raise SchemaError(
            f"the database has schema {version}, which replicas that know schema {readable_by} or later can use; this "
            f"one knows {known}: upgrade it"
        )


def _step_forward(connection: Any, steps: Sequence[Step]) -> None:
    version, _ = found_schema(connection)
    if version == 0:
        connection.execute(
            "CREATE TABLE loraplex_schema (one boolean PRIMARY KEY DEFAULT true CHECK (one), version integer NOT NULL, "
            "readable_by integer NOT NULL)"
        )
        connection.execute("INSERT INTO loraplex_schema (version, readable_by) VALUES (0, 0)")
    for number, step in enumerate(steps[version:], version + 1):
        for statement in step.statements:
            connection.execute(statement)
        connection.execute("UPDATE loraplex_schema SET version = %s, readable_by = %s", (number, step.readable_by))
