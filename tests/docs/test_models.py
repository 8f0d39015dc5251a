"""docs/models.md names every architecture that loads, and no other."""

import re

from loraplex_engine.models.registry import ARCHITECTURES
from tests.docs.pages import ROOT
from tests.reference.borrowed import BORROWED

PAGE = ROOT / "docs" / "models.md"
HEADING = "\n## Everything else"


def test_the_table_has_what_loads() -> None:
    named = re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", native_part())
    assert sorted(named) == sorted(ARCHITECTURES)


def test_what_transformers_computes_is_named_if_it_is_compared() -> None:
    named = re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", borrowed_part())
    compared = {type(make()).__name__ for make in BORROWED.values()}
    assert set(named) <= compared
    assert compared <= {*named, *ARCHITECTURES}


def native_part() -> str:
    return PAGE.read_text().partition(HEADING)[0]


def borrowed_part() -> str:
    return PAGE.read_text().partition(HEADING)[2]
