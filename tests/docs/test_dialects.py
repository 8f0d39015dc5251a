"""docs/dialects.md has every field of a generation in each dialect, as the tables say that read them."""

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor

from loraplex_service.dialects.fields import Fields
from loraplex_service.dialects.tables import TABLES
from loraplex_service.validation.dialects import REFUSED, kind_of
from tests.docs.pages import ROOT, section

PAGE = ROOT / "docs" / "dialects.md"


def refused(message: Descriptor, inside: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a request that are always refused, and why."""
    for field in message.fields:
        name = f"{kind_of(message)}.{field.name}"
        if name in REFUSED:
            yield inside + field.name, REFUSED[name]
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from refused(field.message_type, f"{inside}{field.name}.")


def rendered(fields: Fields, request: Descriptor) -> list[str]:
    lines = ["| field | becomes | |", "|---|---|---|"]
    for entry in fields.all:
        becomes = f"`{entry.becomes}`" if entry.becomes else "–"
        lines.append(f"| `{entry.name}` | {becomes} | {entry.note} |")
    return lines + [f"| `{name}` | – | refused: {why} |" for name, why in refused(request)]


@pytest.mark.parametrize(("fields", "request_"), TABLES, ids=lambda part: getattr(part, "full_name", ""))
def test_the_page_has_the_table_of_a_generation(fields: Fields, request_: Descriptor) -> None:
    shown = section(PAGE, f"#### {request_.full_name}").strip().splitlines()
    assert shown == rendered(fields, request_), "the page must have the lines on the right"
