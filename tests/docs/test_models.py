"""docs/models.md names every architecture that loads, and no other."""

import re

from loraplex_engine.models.registry import ARCHITECTURES
from tests.docs.pages import ROOT


def test_the_table_has_what_loads() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    named = re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", page)
    assert sorted(named) == sorted(ARCHITECTURES)
