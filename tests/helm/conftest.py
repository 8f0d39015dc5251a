"""Renders the chart with Helm's own engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "helm" / "loraplex"


class Manifests:
    """What a release consists of."""

    def __init__(self, files: dict[str, str]) -> None:
        self.documents = [
            document
            for name, text in files.items()
            if not name.endswith("NOTES.txt")
            for document in yaml.safe_load_all(text)
            if document is not None
        ]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        found = [d for d in self.documents if d["kind"] == kind and d["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {name}"
        return found[0]

    def kinds(self) -> set[str]:
        return {document["kind"] for document in self.documents}


class Chart:
    def __init__(self, chart: helm_python.Chart) -> None:
        self._chart = chart

    def notes(self, values: dict[str, Any]) -> str:
        """What is said once a release is installed."""
        files = self._chart.render(values, name="prod", namespace="serving")
        return next(text for name, text in files.items() if name.endswith("NOTES.txt"))

    def render(self, values: dict[str, Any]) -> Manifests:
        return Manifests(self._chart.render(values, name="prod", namespace="serving"))


@pytest.fixture(scope="session")
def chart() -> Iterator[Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield Chart(loaded)
