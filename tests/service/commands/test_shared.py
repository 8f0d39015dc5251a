"""What commands print of others' names and texts: whole, and without what would steer a terminal."""

import io
import json
from contextlib import redirect_stdout

import click
import grpc
import pytest
from google.rpc import status_pb2

from loraplex import LoraplexError
from loraplex.v1.models_pb2 import Model
from loraplex_service.commands.shared import ServerAccess, call_failures, echo_text, print_json, print_table

HOSTILE = "a\x1b]0;owned\x07\x9b2J\r[red]b"
SHOWN = "a\\u001b]0;owned\\u0007\\u009b2J\\u000d[red]b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_spells_out_what_would_steer_a_terminal_and_takes_nothing_for_markup() -> None:
    with redirect_stdout(io.StringIO()) as printed:
        print_table(("name", HOSTILE), [(HOSTILE, "x")])
    head, row = printed.getvalue().splitlines()
    assert head.split() == ["name", SHOWN]
    assert row.split() == [SHOWN, "x"]


def test_a_narrow_terminal_shows_names_whole_on_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "tenants/shared/adapters/pirate@3f2a81c09d4e"
    cells = (name, "models/storyteller", "ACTIVE", "host", "16", "*", "yes")
    with redirect_stdout(Terminal()) as printed:
        print_table(("version", "model", "state", "where", "rank", "current", "pinned"), [cells])
    folded = "".join(line[: line.index("  ")] if "  " in line else line for line in printed.getvalue().splitlines()[1:])
    assert "…" not in printed.getvalue()
    assert folded.startswith(name)


def test_a_terminal_is_not_steered_by_what_a_model_wrote() -> None:
    with redirect_stdout(Terminal()) as printed:
        echo_text(f"{HOSTILE}\n\tend")
    assert printed.getvalue() == f"{SHOWN}\n\tend\n"


def test_a_program_reads_what_a_model_wrote_as_it_is() -> None:
    with redirect_stdout(io.StringIO()) as printed:
        echo_text(HOSTILE, nl=False)
    assert printed.getvalue() == HOSTILE


def test_json_stays_json_and_steers_nothing() -> None:
    with redirect_stdout(Terminal()) as printed:
        print_json(Model(name=HOSTILE))
    assert json.loads(printed.getvalue()) == {"name": HOSTILE}
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(printed.getvalue())


def test_an_error_spells_out_what_the_server_said() -> None:
    access = ServerAccess("127.0.0.1:1", None, None, None, None, None, None, None)
    with pytest.raises(click.ClickException) as raised, call_failures(access):
        raise LoraplexError(grpc.StatusCode.INTERNAL, status_pb2.Status(message=HOSTILE))
    assert SHOWN in raised.value.message
