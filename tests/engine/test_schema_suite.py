"""The JSON Schema test suite, which nobody here wrote, through the masks: what it calls valid can be drawn, and what it
calls invalid cannot.

It is fetched from npm's registry, which has that of draft 4; `LORAPLEX_SCHEMA_SUITE` names a folder with another one.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.v1.generation_pb2 import Constraint
from loraplex_engine.scheduling.form import Form
from loraplex_service.requests.forms import checked_grammar
from tests.engine.forms import EOS, TOKENS
from tests.engine.masks import Masks

pytestmark = pytest.mark.slow

SPELLINGS = 300  # of one value, at most
ANNOTATED = "format.json"  # by default formats are annotations, and outputs keep to them all the same


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("LORAPLEX_SCHEMA_SUITE"):
        return Path(named)
    npm, place = shutil.which("npm"), tmp_path_factory.mktemp("suite")
    if npm is None:
        pytest.skip("needs npm")
    done = subprocess.run([npm, "pack", "json-schema-test-suite@0.0.10"], cwd=place, capture_output=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm has no registry here: {done.stderr.decode(errors='replace')[:300]}")
    with tarfile.open(next(place.glob("*.tgz"))) as archive:
        archive.extractall(place, filter="data")
    return place / "package" / "tests" / "draft4"


def spellings(value: Any) -> Iterator[Any]:
    """The value with its properties in any order, which schemas do not ask for, and with whole numbers as such."""
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for parts in itertools.product(*(list(itertools.islice(spellings(value[name]), 6)) for name in names)):
                yield dict(zip(names, parts, strict=True))
    elif isinstance(value, list):
        for parts in itertools.product(*(list(itertools.islice(spellings(part), 6)) for part in value)):
            yield list(parts)
    else:
        yield value
        if isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53:
            yield int(value)


def test_what_is_valid_can_be_drawn_and_what_is_invalid_cannot(
    suite: Path, record_property: Callable[[str, object], None]
) -> None:
    masks = Masks(TOKENS, EOS)

    def can_be_drawn(form: Form, value: Any) -> bool:
        texts = (
            json.dumps(spelt, ensure_ascii=False, separators=(",", colon)).encode()
            for spelt in itertools.islice(spellings(value), SPELLINGS)
            for colon in (":", ": ")
        )
        return any(masks.takes(form, text) for text in texts)

    counts: Counter[str] = Counter()
    wrong: list[str] = []
    reasons: list[str] = []
    for file in sorted(suite.glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            counts["schemas"] += 1
            try:
                grammar = checked_grammar(Constraint(json_schema=json.dumps(case["schema"])))
            except ValueError as error:
                counts["refused"] += 1
                reasons.append(str(error))
                continue
            form = masks.form(grammar)
            for test in case["tests"]:
                counts["valid" if test["valid"] else "invalid"] += 1
                is_right = can_be_drawn(form, test["data"]) == test["valid"]
                if not is_right and not (test["valid"] and file.name == ANNOTATED):
                    wrong.append(f"{file.name}: {case['description']}: {test['description']}: {test['valid']}")
                elif not is_right:
                    counts["formats kept to"] += 1
    record_property("counts", dict(counts))
    print(dict(counts))
    assert wrong == []
    assert all(reasons)
    assert min(counts["valid"], counts["invalid"]) > 90
