"""The Grafana dashboard asks for nothing that the metrics page does not have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.service.control.test_metrics_page import DOCUMENTED

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "helm" / "loraplex" / "dashboards" / "loraplex.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


def queries(dashboard: dict[str, Any]) -> list[str]:
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return targets + variables


def documented() -> dict[str, set[str]]:
    """Each name that the page has (the tests of the page see to that), with its labels."""
    rows = re.findall(r"^\| `(loraplex_\w+)` \| ?([\w, ]*?) ?\|", DOCUMENTED.read_text(), re.MULTILINE)
    return {name: set(labels.split(", ")) if labels else set() for name, labels in rows}


def test_every_metric_of_a_query_is_on_the_page(dashboard: dict[str, Any]) -> None:
    names = {name for query in queries(dashboard) for name in re.findall(r"(?:loraplex_|vllm:)\w+", query)}
    assert len(names) > 15
    assert {re.sub(r"_seconds_(bucket|count|sum)$", "_seconds", name) for name in names} <= documented().keys()


def test_every_label_of_a_query_is_one_of_its_metrics(dashboard: dict[str, Any]) -> None:
    page = documented()
    for query in queries(dashboard):
        for name, selector in re.findall(r"(loraplex_\w+)\{([^}]*)\}", query):
            used = set(re.findall(r"(\w+)=~?\"", selector))
            assert used <= page[re.sub(r"_seconds_(bucket|count|sum)$", "_seconds", name)], query


def test_panels_do_not_overlap_and_have_ids_of_their_own(dashboard: dict[str, Any]) -> None:
    cells = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in cells, panel["title"]
                assert x < 24
                cells.add((x, y))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
