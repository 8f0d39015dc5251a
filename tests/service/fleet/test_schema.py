"""The tables of a fleet: made when they are missing, brought forward, and refused by who is too old."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from loraplex_service.fleet.database import Database, DatabaseAway, Stale, checked_dsn
from loraplex_service.fleet.schema import FIRST, SchemaError, Step
from tests.service.fleet.conftest import TestDatabase

ADDS = Step(("ALTER TABLE loraplex_resources ADD COLUMN note text",), readable_by=1)
TAKES_AWAY = Step(("ALTER TABLE loraplex_resources DROP COLUMN note",), readable_by=2)


Connect = Callable[..., Database]


@pytest.fixture
def connect(database: TestDatabase) -> Iterator[Connect]:
    """Connects a replica that knows these steps beyond the first."""
    with ExitStack() as stack:

        def connect(*steps: Step) -> Database:
            return stack.enter_context(closing(Database(database.dsn, "test", steps=(FIRST, *steps))))

        yield connect


def test_the_first_to_come_makes_the_tables(connect: Connect, database: TestDatabase) -> None:
    one = connect()
    assert one.news(0).rows == []
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(1, 1)]


def test_the_version_before_goes_on_beside_the_new_one(connect: Connect, database: TestDatabase) -> None:
    old = connect()
    assert old.commit(0, "route", "a", b"1") == 1
    new = connect(ADDS)
    assert new.commit(1, "route", "b", b"2") == 2
    assert old.commit(2, "route", "c", b"3") == 3
    assert [row.name for row in connect().news(0).rows] == ["a", "b", "c"]
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(2, 1)]


def test_two_versions_before_are_refused_and_told_why(connect: Connect) -> None:
    connect(ADDS, TAKES_AWAY).news(0)
    connect(ADDS).news(0)
    with pytest.raises(
        SchemaError, match=r"has schema 3, which .* schema 2 or later can use; this one knows 1: upgrade"
    ):
        connect().news(0)


def test_a_step_that_fails_leaves_the_tables_as_they_were(connect: Connect, database: TestDatabase) -> None:
    connect().news(0)
    broken = Step((*ADDS.statements, "SELECT nothing FROM nowhere"), readable_by=2)
    with pytest.raises(DatabaseAway, match="nowhere"):
        connect(broken).news(0)
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(1, 1)]
    connect(ADDS).news(0)


def test_nobody_changes_what_they_have_not_seen(connect: Connect) -> None:
    one, two = connect(), connect()
    one.commit(0, "route", "a", b"1")
    with pytest.raises(Stale):
        two.commit(0, "route", "b", b"2")
    assert two.news(0).cursor == 1


def test_many_changes_come_in_several_answers(connect: Connect) -> None:
    one = connect()
    for number in range(40):
        one.commit(number, "route", f"{number:02}", b"1")
    names: list[str] = []
    news = one.news(0)
    while True:
        names += [row.name for row in news.rows]
        if not news.behind:
            break
        news = one.news(news.cursor, going_on=True)
    assert names == [f"{number:02}" for number in range(40)]
    assert news.cursor == 40


def test_no_error_has_the_password() -> None:
    secret = "hunter-two"
    for dsn in (f"postgresql://a:{secret}@127.0.0.1:1/x", f"postgresql://a:{secret}%zz@h/x"):
        with pytest.raises((DatabaseAway, ValueError)) as raised:
            Database(dsn, "test").news(0)
        assert secret not in str(raised.value)
        assert raised.value.__cause__ is None
    with pytest.raises(ValueError, match="no connection string"):
        checked_dsn("postgresql://h/x?no_such_parameter=1")
