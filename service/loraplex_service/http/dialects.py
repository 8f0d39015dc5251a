"""All that bodies may have: the tables of all endpoints, which docs/http.md and the OpenAPI document are made of."""

from loraplex_service.http import tables
from loraplex_service.http.adapters import LOAD, UNLOAD
from loraplex_service.http.messages.table import COUNT, MESSAGES
from loraplex_service.http.parameters import Table
from loraplex_service.http.responses.table import RESPONSES
from loraplex_service.http.tinker.table import TABLES as TINKER

TABLES = (*tables.TABLES, RESPONSES, MESSAGES, COUNT, LOAD, UNLOAD, *TINKER)


def rendered(table: Table) -> list[str]:
    """The table as lines of Markdown."""
    lines = ["| parameter | becomes | |", "|---|---|---|"]
    for parameter in table.parameters:
        becomes = f"`{parameter.becomes}`" if parameter.becomes else "–"
        lines.append(f"| `{parameter.name}` | {becomes} | {parameter.note} |")
    return lines
