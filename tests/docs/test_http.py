"""docs/http.md has every parameter of every endpoint, as the tables say that read them."""

import pytest

from loraplex_service.http.dialects import TABLES, rendered
from loraplex_service.http.failures import BY_CODE, BY_REASON, FAULT
from loraplex_service.http.parameters import Table
from loraplex_service.http.service import FORWARDED, TIMEOUT
from tests.docs.pages import ROOT, section, table_rows

PAGE = ROOT / "docs" / "http.md"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path)
def test_the_page_has_the_table_of_an_endpoint(table: Table) -> None:
    shown = section(PAGE, f"### {table.path}").strip().splitlines()
    assert shown == rendered(table), "the page must have the lines on the right"


def test_the_page_names_every_status_that_a_failed_call_may_have() -> None:
    statuses = {int(status) for row in table_rows(section(PAGE, "## Errors")) for status in row[0].split(",")}
    assert statuses >= {kind.status for kind in (*BY_CODE.values(), *BY_REASON.values(), FAULT)} - {409}


def test_the_page_names_every_header_that_is_passed_on() -> None:
    named = section(PAGE, "## Headers")
    assert [header for header in (*FORWARDED, TIMEOUT) if f"`{header}`" not in named] == []
