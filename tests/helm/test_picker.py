"""The endpoint picker in the chart, and the Envoy that asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from loraplex_service.picker.config import PickerConfig, load_picker_config
from tests.envoy import assert_envoy_takes
from tests.helm.conftest import Chart, Manifests
from tests.helm.test_chart import MODELS

PICKER: dict[str, Any] = {"envoy": {"enabled": True}, "picker": {"enabled": True}}
FIXED = {"host": "10.0.0.1", "port": 1, "healthPort": 2, "metricsPort": 3, "httpPort": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpc": PICKER,
    "grpc and http": PICKER | {"http": {"enabled": True}},
    "dialects": PICKER | {"http": {"enabled": True}, "dialects": ["kserve_v2"]},
    "without tls": PICKER | {"http": {"enabled": True}, "tls": {"enabled": False}, "insecure": True},
    "fixed servers": PICKER | {"http": {"enabled": True}, "envoy": {"enabled": True, "endpoints": [FIXED]}},
}


def config_of(release: Manifests, directory: Path) -> PickerConfig:
    file = directory / "picker.yaml"
    file.write_text(release.get("ConfigMap", "prod-loraplex-picker")["data"]["picker.yaml"])
    return load_picker_config(file)


@pytest.mark.parametrize("values", [{}, *VARIANTS.values()], ids=["no picker", *VARIANTS])
def test_envoy_takes_its_configuration(chart: Chart, values: dict[str, Any], tmp_path: Path) -> None:
    release = chart.render(MODELS | {"envoy": {"enabled": True}} | values)
    text = release.get("ConfigMap", "prod-loraplex-envoy")["data"]["envoy.yaml"]
    assert_envoy_takes(text, tmp_path)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=list(VARIANTS))
def test_the_picker_takes_its_configuration(chart: Chart, values: dict[str, Any], tmp_path: Path) -> None:
    release = chart.render(MODELS | values)
    config = config_of(release, tmp_path)
    deployment = release.get("Deployment", "prod-loraplex-picker")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.listen == f"0.0.0.0:{ports['picker']}"
    assert config.metrics_listen == f"0.0.0.0:{ports['metrics']}"


def test_the_picker_looks_where_the_servers_listen(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | VARIANTS["grpc and http"])
    [replicas] = config_of(release, tmp_path).replicas
    container = release.get("Deployment", "prod-loraplex")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert replicas.host == "prod-loraplex-replicas.serving.svc"
    assert (replicas.data_port, replicas.http_port) == (ports["data"], ports["http"])
    assert (replicas.health_port, replicas.metrics_port) == (ports["health"], ports["metrics"])


def test_http_goes_through_envoy_where_the_picker_reads_its_bodies(chart: Chart) -> None:
    def allowed(values: dict[str, Any]) -> list[str]:
        release = chart.render(MODELS | {"http": {"enabled": True}} | values)
        rules = release.get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
        peers = [peer for rule in rules if rule["ports"] == [{"port": "http"}] for peer in rule["from"]]
        return [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in peers]

    assert allowed({"envoy": {"enabled": True}}) == []
    assert allowed(PICKER) == ["envoy"]


def test_the_picker_reaches_metrics_that_are_not_for_everybody(chart: Chart) -> None:
    values = PICKER | {"networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]}}
    rules = chart.render(MODELS | values).get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
    [peers] = [rule["from"] for rule in rules if rule["ports"] == [{"port": "metrics"}]]
    assert peers[1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "picker"


def test_only_who_routes_reaches_the_picker(chart: Chart) -> None:
    gateway = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}
    release = chart.render(MODELS | {"picker": {"enabled": True, "from": [gateway]}})
    rules = release.get("NetworkPolicy", "prod-loraplex-picker")["spec"]["ingress"]
    [peers] = [rule["from"] for rule in rules if rule["ports"] == [{"port": "picker"}]]
    assert peers[1:] == [gateway]
    assert peers[0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "envoy"


def test_servers_say_by_whose_names_their_metrics_go(chart: Chart) -> None:
    labels = chart.render(MODELS).get("Deployment", "prod-loraplex")["spec"]["template"]["metadata"]["labels"]
    assert labels["llm-d.ai/engine-type"] == "vllm"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"picker": {"balanceFactor": 50}}, "picker/balanceFactor"),
        (
            {"picker": {"enabled": True}, "envoy": {"endpoints": [{"host": "a", "port": 1, "healthPort": 2}]}},
            "metricsPort",
        ),
        (
            PICKER | {"http": {"enabled": True}, "envoy": {"enabled": True, "endpoints": [FIXED | {"httpPort": None}]}},
            "httpPort",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(chart: Chart, values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError, match=named):
        chart.render(MODELS | values)


@pytest.mark.parametrize(
    ("dialects", "first"), [([], {"prefix": "/loraplex.v1."}), (["kserve_v2"], {"prefix": "/", "grpc": {}})]
)
def test_grpc_of_other_systems_passes_envoy_where_the_servers_speak_it(
    chart: Chart, dialects: list[str], first: dict[str, Any]
) -> None:
    release = chart.render(MODELS | PICKER | {"http": {"enabled": True}, "dialects": dialects})
    config = yaml.safe_load(release.get("ConfigMap", "prod-loraplex-envoy")["data"]["envoy.yaml"])
    [listener] = config["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert routes[0]["match"] == first
    assert [route["route"]["cluster"] for route in routes] == ["replicas", "replicas", "replicas-http"]


def test_a_release_without_a_picker_has_nothing_of_it(chart: Chart) -> None:
    release = chart.render(MODELS | {"envoy": {"enabled": True}})
    assert "picker" not in yaml.safe_dump_all(release.documents)
