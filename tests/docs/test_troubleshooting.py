"""docs/troubleshooting.md has an entry for each reason of an error: its code, what it means and what to do."""

import re

import pytest

from loraplex.v1.errors_pb2 import ErrorReason
from tests.docs.pages import ROOT, section

PAGE = ROOT / "docs" / "troubleshooting.md"
PROTO = (ROOT / "proto" / "loraplex" / "v1" / "errors.proto").read_text()
REASONS = [name.removeprefix("ERROR_REASON_") for name in dict(ErrorReason.items()) if not name.endswith("UNSPECIFIED")]


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_has_its_entry_with_the_code_of_the_contract(reason: str) -> None:
    entry = section(PAGE, f"### {reason}").strip()
    comment = re.search(rf"((?:  //[^\n]*\n)+)  ERROR_REASON_{reason} = ", PROTO)
    assert comment is not None
    code = re.search(r"[A-Z_]{6,}(?=[:.])", comment[1])
    assert code is not None
    assert entry.startswith(f"`{code[0]}`"), f"{reason} is {code[0]}"
    assert len(entry.split()) > 12, "what it means, and what to do"


def test_no_entry_is_of_a_reason_that_there_is_not() -> None:
    assert set(re.findall(r"^### ([A-Z_]+)$", PAGE.read_text(), re.MULTILINE)) == set(REASONS)
