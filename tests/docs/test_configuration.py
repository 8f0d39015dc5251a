"""docs/configuration-keys.md is what the classes of the configuration say, and what they say of their keys holds."""

import re
import runpy
from typing import Any, get_args

import msgspec
import pytest

from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig
from loraplex_service.config import ServiceConfig
from loraplex_service.config_checks import Section, Shape, sections
from loraplex_service.picker.config import PickerConfig
from tests.docs.pages import ROOT, table_rows

SCRIPT = runpy.run_path(str(ROOT / "docs" / "configuration_keys.py"))
PAGE = ROOT / "docs" / "configuration-keys.md"
SECTIONS = list(dict.fromkeys(section for whole in (ServiceConfig, PickerConfig) for _, section in sections(whole)))


def cells() -> dict[str, list[str]]:
    """What the page says of each key of the server's file, by its path."""
    text = PAGE.read_text().partition("## The file of the picker")[0]
    return {row[0].strip("`"): row for row in table_rows(text)}


def test_the_page_is_what_the_classes_say() -> None:
    assert PAGE.read_text() == SCRIPT["page"](), "run docs/configuration_keys.py"


def test_a_key_that_stands_in_the_wrong_place_is_sent_to_one_that_the_page_has() -> None:
    paths = {path: path.rpartition(".")[2] for path in cells()}
    elsewhere = sorted(set(paths.values()) - {field.name for field in msgspec.structs.fields(ServiceConfig)})
    assert len(elsewhere) > 80
    for key in elsewhere:
        shape = Shape(ServiceConfig)
        shape.pruned({"models": [], key: 1}, ServiceConfig)
        [said] = [found for mistake in shape.mistakes for found in re.findall("it belongs in (.*)", mistake)]
        assert paths.get(f"{said}.{key}") == key


def test_what_a_comment_says_above_and_beside_a_field_is_its_meaning() -> None:
    rows = cells()
    assert rows["limits.template_workers"][4] == "processes that render chat templates"
    assert rows["models[].device"][4].endswith(
        "([sizing: several models on one machine](sizing.md#several-models-on-one-machine))"
    )


def test_types_defaults_and_bounds_are_those_of_the_class() -> None:
    rows = cells()
    assert rows["models[].name"][1:4] == ["text", "–", ""]
    assert rows["models[].dtype"][1:4] == ["text", "`auto`", "`auto`, `float32`, `bfloat16`, `float16`"]
    assert rows["limits.upload_bytes"][1:4] == ["whole number", "2 GiB", "at least 0"]
    assert rows["tenants.*.weight"][1:4] == ["number", "1", "from 0.001 to 1000"]
    assert rows["supervision.stop_seconds"][1:4] == ["number", "10", "0, or from 0.001 to 2000000"]
    assert rows["auth.certificates[].roles"][1:4] == ["list: text", "`[inference]`", "`inference`, `adapters`, `admin`"]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_what_a_section_states_of_its_keys_is_of_keys_that_it_has(section: Section) -> None:
    stated = {**getattr(section, "BOUNDS", {}), **getattr(section, "CHOICES", {})}
    assert stated.keys() <= set(section.__struct_fields__)


@pytest.mark.parametrize("section", [EngineConfig, DraftConfig])
def test_every_number_of_an_engine_has_bounds_that_the_engine_checks(section: Any) -> None:
    fields = msgspec.structs.fields(section)
    numbers = {field.name for field in fields if {int, float} & {field.type, *get_args(field.type)}}
    assert section.BOUNDS.keys() == numbers
