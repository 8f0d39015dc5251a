"""The compose file of one machine: what it mounts is there, and its parts find each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplex_service.config import load_config
from tests.packaging.test_wheels import ROOT

FOLDER = ROOT / "compose"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found["services"] | {"volumes": found["volumes"]}


def mounts(services: dict[str, Any], name: str) -> dict[str, str]:
    """From the place in the container to what is mounted there."""
    return {each.split(":")[1]: each.split(":")[0] for each in services[name]["volumes"]}


def test_everything_that_is_mounted_is_there(services: dict[str, Any]) -> None:
    sources = [source for name in ("loraplex", "prometheus", "grafana") for source in mounts(services, name).values()]
    assert [each for each in sources if each.startswith(".") and not (FOLDER / each).exists()] == []
    assert {each for each in sources if not each.startswith(".")} == services["volumes"].keys()


def test_every_port_is_this_machines_alone(services: dict[str, Any]) -> None:
    ports = [port for name in ("loraplex", "prometheus", "grafana") for port in services[name]["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_service_accepts_its_configuration() -> None:
    config = load_config(FOLDER / "loraplex.yaml", {"LORAPLEX_INSECURE": "true"})
    assert config.metrics_listen is not None


def test_prometheus_scrapes_the_page_and_has_the_alerts(services: dict[str, Any]) -> None:
    prometheus = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config = load_config(FOLDER / "loraplex.yaml", {"LORAPLEX_INSECURE": "true"})
    assert config.metrics_listen is not None
    port = config.metrics_listen.rpartition(":")[2]
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [f"loraplex:{port}"]
    (rules,) = prometheus["rule_files"]
    assert (FOLDER / mounts(services, "prometheus")[rules]).read_text().startswith("#")


def test_grafana_has_the_charts_dashboard(services: dict[str, Any]) -> None:
    provider = FOLDER / "grafana/provisioning/dashboards/loraplex.yaml"
    path = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    assert (FOLDER / mounts(services, "grafana")[path] / "loraplex.json").exists()
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == str(Path(path) / "loraplex.json")


def test_containers_have_longer_to_end_than_streams_have(services: dict[str, Any]) -> None:
    config = load_config(FOLDER / "loraplex.yaml", {"LORAPLEX_INSECURE": "true"})
    assert float(services["loraplex"]["stop_grace_period"].removesuffix("s")) > config.drain_grace_seconds
