"""The alerts: they ask for what the metrics page has, each has a runbook, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT, anchors
from tests.helm.conftest import CHART, Chart
from tests.helm.test_chart import MODELS
from tests.service.telemetry.test_dashboard import documented

FILE = CHART / "alerts" / "loraplex.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks.md"
CASES = Path(__file__).parent / "alert_cases.yaml"
PARTS = ("**It means**", "**Look at**", "**Do**")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(params=rules(), ids=lambda rule: rule["alert"])
def rule(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def test_every_metric_and_label_of_an_alert_is_on_the_page(rule: dict[str, Any]) -> None:
    page = documented()
    names = {
        re.sub(r"_seconds_(bucket|count|sum)$", "_seconds", name) for name in re.findall(r"loraplex_\w+", rule["expr"])
    }
    assert names
    assert names <= page.keys()
    labels = set(re.findall(r"(\w+)(?:=~?|!=)\"", rule["expr"]))
    labels |= {label for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(", ")} - {"le"}
    labels |= set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert labels <= set().union(*(page[name] for name in names))


def test_every_alert_has_a_runbook_that_says_what_to_do(rule: dict[str, Any]) -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOKS.read_text(), re.MULTILINE | re.DOTALL))
    for part in PARTS:
        assert part in sections[rule["alert"]]


def test_every_runbook_is_of_an_alert() -> None:
    assert anchors(RUNBOOKS) - {"runbooks"} == {rule["alert"].lower() for rule in rules()}


def test_the_chart_installs_the_alerts_with_the_addresses_of_their_runbooks(chart: Chart) -> None:
    values = {
        "prometheusRule": {"enabled": True, "runbooks": "https://wiki/runbooks", "labels": {"release": "prometheus"}}
    }
    found = chart.render(MODELS | values).get("PrometheusRule", "prod-loraplex")
    assert found["metadata"]["labels"]["release"] == "prometheus"
    installed = [rule for group in found["spec"]["groups"] for rule in group["rules"]]
    for given, rule in zip(rules(), installed, strict=True):
        address = f"https://wiki/runbooks#{given['alert'].lower()}"
        assert rule == given | {"annotations": given["annotations"] | {"runbook_url": address}}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus's promtool is not installed")
@pytest.mark.parametrize(
    "command", [["check", "rules", FILE], ["test", "rules", CASES]], ids=["valid", "when they fire"]
)
def test_prometheus_finds_the_alerts_right(command: list[str | Path]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load(CASES.read_text())
    fired = {each["alertname"] for test in cases["tests"] for each in test["alert_rule_test"] if each.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}
