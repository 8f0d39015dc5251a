"""The tables of a fleet: made when they are missing, brought forward, and refused by who is too old."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from loraplex_service.fleet.database import START, Cursor, Database, DatabaseAway, Stale, checked_dsn
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


def last(database: Database) -> Cursor:
    return database.news(START).cursor


def test_the_first_to_come_makes_the_tables(connect: Connect, database: TestDatabase) -> None:
    one = connect()
    assert one.news(START).rows == []
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(1, 1)]


def test_the_version_before_goes_on_beside_the_new_one(connect: Connect, database: TestDatabase) -> None:
    old = connect()
    one = old.commit(last(old), "route", "a", b"1")
    new = connect(ADDS)
    two = new.commit(one, "route", "b", b"2")
    three = old.commit(two, "route", "c", b"3")
    assert (one.number, two.number, three.number) == (1, 2, 3)
    assert [row.name for row in connect().news(START).rows] == ["a", "b", "c"]
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(2, 1)]


def test_two_versions_before_are_refused_and_told_why(connect: Connect) -> None:
    connect(ADDS, TAKES_AWAY).news(START)
    connect(ADDS).news(START)
    with pytest.raises(
        SchemaError, match=r"has schema 3, which .* schema 2 or later can use; this one knows 1: upgrade"
    ):
        connect().news(START)


def test_a_step_that_fails_leaves_the_tables_as_they_were(connect: Connect, database: TestDatabase) -> None:
    connect().news(START)
    broken = Step((*ADDS.statements, "SELECT nothing FROM nowhere"), readable_by=2)
    with pytest.raises(DatabaseAway, match="nowhere"):
        connect(broken).news(START)
    assert database.ask("SELECT version, readable_by FROM loraplex_schema") == [(1, 1)]
    connect(ADDS).news(START)


def test_nobody_changes_what_they_have_not_seen(connect: Connect) -> None:
    one, two = connect(), connect()
    seen = last(two)
    made = one.commit(seen, "route", "a", b"1")
    with pytest.raises(Stale):
        two.commit(seen, "route", "b", b"2")
    assert two.news(seen) == two.news(START)._replace(whole=None)
    assert last(two) == made


def test_a_database_that_lost_its_last_changes_and_went_on_is_read_anew(
    connect: Connect, database: TestDatabase
) -> None:
    one, two = connect(), connect()
    kept = one.commit(last(one), "route", "kept", b"1")
    lost = one.commit(kept, "route", "lost", b"2")
    database.go_back(*kept)
    other = two.commit(kept, "route", "other", b"3")
    assert (other.number, last(two)) == (lost.number, other)
    with pytest.raises(Stale):
        one.commit(lost, "route", "a", b"4")
    two.commit(other, "route", "later", b"5")
    news = one.news(lost)
    assert news.whole == {("route", "kept"), ("route", "other"), ("route", "later")}
    assert [row.name for row in news.rows] == ["kept", "other", "later"]


def test_changes_of_long_ago_are_forgotten_and_who_knows_no_later_ones_reads_everything(
    connect: Connect, database: TestDatabase
) -> None:
    one = connect()
    old = one.commit(last(one), "route", "a", b"1")
    gone = one.commit(old, "route", "a", None)
    database.ask("UPDATE loraplex_changes SET made = made - interval '10 days'")
    one.beat("")
    assert database.ask("SELECT sequence FROM loraplex_changes") == [(gone.number,)]
    assert database.ask("SELECT FROM loraplex_resources") == []
    assert one.news(old).whole == set()
    assert one.news(gone).whole is None


def test_who_is_connected_is_refused_too_once_the_tables_are_too_new(connect: Connect) -> None:
    old = connect()
    seen = last(old)
    connect(ADDS, TAKES_AWAY).news(START)
    with pytest.raises(SchemaError, match="upgrade it"):
        old.news(seen)
    with pytest.raises(Stale):
        old.commit(seen, "route", "a", b"1")


def test_many_changes_come_in_several_answers(connect: Connect) -> None:
    one = connect()
    made = last(one)
    for number in range(40):
        made = one.commit(made, "route", f"{number:02}", b"1")
    names: list[str] = []
    news = one.news(START)
    while True:
        names += [row.name for row in news.rows]
        if not news.behind:
            break
        news = one.news(news.cursor, going_on=True)
    assert names == [f"{number:02}" for number in range(40)]
    assert news.cursor == made


def test_no_error_has_the_password() -> None:
    secret = "hunter-two"
    for dsn in (f"postgresql://a:{secret}@127.0.0.1:1/x", f"postgresql://a:{secret}%zz@h/x"):
        with pytest.raises((DatabaseAway, ValueError)) as raised:
            Database(dsn, "test").news(START)
        assert secret not in str(raised.value)
        assert raised.value.__cause__ is None
    with pytest.raises(ValueError, match="no connection string"):
        checked_dsn("postgresql://h/x?no_such_parameter=1")
