"""docs/configuration.md has every key of the configuration, each with the default that it has, and no other."""

import re
from typing import Any

import msgspec
import pytest

from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.auth.config import AuthConfig
from loraplex_service.config import ENVIRONMENT_PREFIX, LimitsConfig, ServiceConfig
from loraplex_service.config_checks import sections
from loraplex_service.models.config import HostedModelConfig, SupervisionConfig
from loraplex_service.telemetry.config import OtlpConfig, UsageConfig
from tests.docs.pages import ROOT, section, table_rows

SECTIONS = {kind.__name__: kind for _, kind in sections(ServiceConfig)}
PAGE = ROOT / "docs" / "configuration.md"
TABLES: dict[str, type[msgspec.Struct]] = {
    "## Top level": ServiceConfig,
    "## `models`": HostedModelConfig,
    "## `auth`": AuthConfig,
    "## `tenants`": TenantConfig,
    "## `limits`": LimitsConfig,
    "## `supervision`": SupervisionConfig,
    "## `usage`": UsageConfig,
    "## `otlp`": OtlpConfig,
}
# Sections whose keys stand in a sentence and in examples instead of a table of their own.
IN_PROSE = {
    "TlsConfig": "`tls`",
    "DraftConfig": "| `drafts`",
    "AdapterConfig": "## `adapters`",
    "ConstraintConfig": "## `adapters`",
    "JwtConfig": "## `auth`",
    "CertificateConfig": "## `auth`",
}
SECTIONS_OF_THEIR_OWN = {"adapters", "tenants", "other_tenants", "limits", "supervision", "usage", "otlp"}
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
BY_ITSELF = "decided when it starts"  # a default in words, of a key that is None in the code


def keys_of(heading: str) -> dict[str, str]:
    """The keys of a section's first table, and what stands in the column of defaults."""
    rows = table_rows(section(PAGE, heading).partition("\n### ")[0])
    return {name: cells[1] for cells in rows for name in re.findall(r"`(\w+)`", cells[0])}


def default_of(text: str) -> Any:
    """The value that a cell of the column of defaults stands for."""
    number = re.fullmatch(r"([\d,.]+)(?: ([KMG]iB))?", text)
    if number:
        value = float(number[1].replace(",", ""))
        return value * UNITS.get(number[2], 1)
    if text in ("none", "any"):
        return None
    if listed := re.fullmatch(r"`\[([^`]*)\]`", text):
        return tuple(listed[1].split(", "))
    if quoted := re.fullmatch(r"`([^`]*)`", text):
        return {"true": True, "false": False}.get(quoted[1], quoted[1])
    return BY_ITSELF


@pytest.mark.parametrize("heading", TABLES)
def test_a_table_has_the_keys_of_its_section_and_no_other(heading: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(TABLES[heading])}
    missing = fields - keys_of(heading).keys() - (SECTIONS_OF_THEIR_OWN if TABLES[heading] is ServiceConfig else set())
    assert not missing, "are not documented"
    assert keys_of(heading).keys() <= fields, "are documented and do not exist"


@pytest.mark.parametrize("heading", TABLES)
def test_a_table_states_the_defaults_that_hold(heading: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(TABLES[heading])}
    for key, text in keys_of(heading).items():
        field, stated = fields[key], default_of(text)
        if field.required:
            assert text == "–", key
        elif stated is None:
            assert not field.default or field.default is msgspec.NODEFAULT, key
        elif stated != BY_ITSELF:
            assert field.default == stated, key
        elif text:
            assert field.default in (None, "", ()), f"{key} has the default {field.default!r}, the page says: {text}"


@pytest.mark.parametrize("name", IN_PROSE)
def test_keys_without_a_table_are_named(name: str) -> None:
    kind = SECTIONS[name]
    page = PAGE.read_text()
    start = page.index(IN_PROSE[name])
    for field in msgspec.structs.fields(kind):
        assert re.search(rf"`{field.name}`|\b{field.name}:", page[start:]), f"{name}.{field.name}"


def test_every_section_is_documented() -> None:
    assert SECTIONS.keys() == {kind.__name__ for kind in TABLES.values()} | IN_PROSE.keys()


def test_the_page_names_the_variables_that_are_read() -> None:
    listed = set(re.findall(r"`(LORAPLEX_\w+)`", section(PAGE, "# Configuration").partition("\n## ")[0]))
    scalars = (str, bool, int, float, str | None)
    read = {
        ENVIRONMENT_PREFIX + field.name.upper()
        for field in msgspec.structs.fields(ServiceConfig)
        if field.type in scalars
    }
    assert listed - {"LORAPLEX_CONFIG"} == read
