"""The chart: every variant renders to valid objects and to a configuration that the service accepts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from loraplex_service.cli import main
from loraplex_service.config import ServiceConfig, load_config
from tests.docs.test_commands import check_loraplex
from tests.helm.conftest import CHART, Chart, Manifests
from tests.service.telemetry.test_dashboard import documented

KUBERNETES = "1.30"  # the oldest that the chart installs on
CUSTOM = {  # their schemas come apart
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
}
DIGEST = "sha256:" + 64 * "a"

MODELS: dict[str, Any] = {
    "models": [{"name": "llama-8b", "model": "org/llama-8b", "kv_cache_fraction": 0.9}],
    "tls": {"enabled": True, "secretName": "certificate"},
    "auth": {"keysSecret": "keys"},
}
CLAIMS = {name: {"enabled": True} for name in ("models", "adapters")}
ADAPTERS = {
    "persistence": CLAIMS,
    "adapters": [{"name": "acme/legal", "model": "llama-8b", "source": "/var/lib/loraplex/adapters/legal"}],
}
MACHINES: dict[str, Any] = {
    "models": [MODELS["models"][0] | {"tensor_parallel": 4, "machines": 2}],
    "machines": {"secretName": "group"},
}
KEDA = {"kind": "keda", "prometheusUrl": "http://prometheus:9090"}
VARIANTS: dict[str, dict[str, Any]] = {
    "smallest": {},
    "gpu": {"gpu": {"enabled": True, "count": 2, "runtimeClassName": "nvidia"}},
    "claims": {"persistence": CLAIMS | {"state": {"enabled": True}}},
    "claims of others": {"persistence": {"models": {"enabled": True, "existingClaim": "shared", "readOnly": True}}},
    "adapters": ADAPTERS,
    "two models": {"models": [*MODELS["models"], {"name": "qwen", "model": "org/qwen", "load": False}]},
    "no protection": {"tls": {"enabled": False}, "auth": {"keysSecret": ""}, "insecure": True},
    "mutual tls": {
        "tls": {"enabled": True, "secretName": "certificate", "requireClientCertificate": True},
        "envoy": {"enabled": True, "tlsSecretName": "front"},
    },
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "keda": {"autoscaling": KEDA},
    "envoy": {"replicas": 3, "envoy": {"enabled": True}},
    "picker": {"envoy": {"enabled": True}, "picker": {"enabled": True}, "http": {"enabled": True}},
    "picker of a gateway": {"picker": {"enabled": True}, "imagePullSecrets": [{"name": "registry"}]},
    "envoy in front of other servers": {
        "envoy": {"enabled": True, "endpoints": [{"host": "10.0.0.1", "port": 50051, "healthPort": 50053}]}
    },
    "monitoring": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "alerts": {"prometheusRule": {"enabled": True}},
    "dashboard": {"dashboard": {"enabled": True}},
    "a pinned image": {"image": {"digest": DIGEST}},
    "http": {"http": {"enabled": True}},
    "a fleet": {"replicas": 3, "state": {"secretName": "database"}},
    "dialects": {"dialects": ["kserve_v2"]},
    "machines": MACHINES | {"replicas": 2, "persistence": CLAIMS, "gpu": {"enabled": True}},
    "placement": {
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "serving",
        "imagePullSecrets": [{"name": "registry"}],
        "extraEnv": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
        "podAnnotations": {"team": "serving"},
        "podLabels": {"tier": "front"},
    },
    "closed": {"networkPolicy": {"dataFrom": [{"podSelector": {}}], "adminFrom": [{"podSelector": {}}]}},
    "open": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "tokens of an identity provider": {
        "auth": {"keysSecret": "", "jwt": {"issuer": "i", "audience": "a", "jwks": "https://identity/keys"}}
    },
    "an identity provider of one's own": {
        "auth": {
            "jwtSecret": "provider",
            "jwt": {
                "issuer": "i",
                "audience": "a",
                "jwks": "https://identity.internal/keys",
                "jwks_ca": "/etc/loraplex/jwt/ca.crt",
            },
        }
    },
    "everything": ADAPTERS
    | {
        "gpu": {"enabled": True},
        "autoscaling": KEDA,
        "envoy": {"enabled": True, "tlsSecretName": "front"},
        "picker": {"enabled": True},
        "serviceMonitor": {"enabled": True},
        "dashboard": {"enabled": True},
        "config": {"limits": {"in_flight_sequences": 2.0}, "supervision": {"failed_starts": 3}},
    },
}


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def release(chart: Chart, request: pytest.FixtureRequest) -> Manifests:
    return chart.render(MODELS | request.param)


def config_of(release: Manifests, directory: Path) -> ServiceConfig:
    """As the service reads it, with the mounted directories somewhere that exists."""
    text = release.get("ConfigMap", "prod-loraplex")["data"]["loraplex.yaml"]
    file = directory / "loraplex.yaml"
    file.write_text(text.replace("/var/lib/loraplex", str(directory)).replace("/etc/loraplex", str(directory)))
    (directory / "machines").mkdir()
    (directory / "machines" / "secret").write_text(64 * "0")
    (directory / "adapters" / "legal").mkdir(parents=True)
    (directory / "keys").mkdir()
    (directory / "keys" / "keys.yaml").touch()
    (directory / "jwt").mkdir()
    (directory / "jwt" / "ca.crt").touch()
    variables = environment_of(release)
    if "LORAPLEX_MACHINES_SECRET" in variables:
        variables["LORAPLEX_MACHINES_SECRET"] = str(directory / "machines" / "secret")
    return load_config(file, variables)


def environment_of(release: Manifests) -> dict[str, str]:
    """What the pod's environment says in place of the configuration, with the address of a database for a secret."""
    variables = pod_of(release)["containers"][0]["env"]
    given = {each["name"]: each.get("value", "postgresql://loraplex@db/loraplex") for each in variables}
    if "LORAPLEX_STATE" in given:
        pytest.importorskip("psycopg")  # without it the service refuses a fleet
    return {name: value.replace("$(POD_IP)", "10.0.0.7") for name, value in given.items() if "LORAPLEX_" in name}


def templates_of(release: Manifests) -> list[dict[str, Any]]:
    """Those of all pods, the servers' first."""
    groups = [d["spec"]["leaderWorkerTemplate"] for d in release.documents if d["kind"] == "LeaderWorkerSet"]
    deployments = sorted(
        (d for d in release.documents if d["kind"] == "Deployment"), key=lambda d: str(d["metadata"]["name"])
    )
    of_groups = [group[part] for group in groups for part in ("leaderTemplate", "workerTemplate")]
    return of_groups + [d["spec"]["template"] for d in deployments]


def pod_of(release: Manifests) -> dict[str, Any]:
    """A server's."""
    spec: dict[str, Any] = templates_of(release)[0]["spec"]
    return spec


def test_every_variant_is_valid_for_kubernetes(release: Manifests) -> None:
    for document in release.documents:
        if document["kind"] in CUSTOM:
            assert document["apiVersion"] == CUSTOM[document["kind"]]
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for template in templates_of(release):
        pod = {"apiVersion": "v1", "kind": "Pod"} | template
        kubernetes_validate.validate(pod | {"metadata": pod["metadata"] | {"name": "a"}}, KUBERNETES, strict=True)


def test_the_service_accepts_the_configuration_of_every_variant(release: Manifests, tmp_path: Path) -> None:
    assert config_of(release, tmp_path).models[0].name == "llama-8b"


def test_the_state_is_kept_on_its_claim(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | {"persistence": {"state": {"enabled": True}}})
    assert config_of(release, tmp_path).state_directory == str(tmp_path / "state")
    assert {"name": "state", "mountPath": "/var/lib/loraplex/state", "readOnly": False} in pod_of(release)[
        "containers"
    ][0]["volumeMounts"]


def test_replicas_share_the_database_of_a_secret_and_reach_each_other_alone(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | VARIANTS["a fleet"])
    config, pod = config_of(release, tmp_path), pod_of(release)
    assert (config.state, config.fleet_address) == ("postgresql://loraplex@db/loraplex", "10.0.0.7:50054")
    assert config.state_directory == "/var/cache/loraplex/state"  # on a volume of the pod's own
    [variable] = [each for each in pod["containers"][0]["env"] if each["name"] == "LORAPLEX_STATE"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "database", "key": "url"}
    assert {"name": "database", "mountPath": "/etc/loraplex/state", "readOnly": True} in pod["containers"][0][
        "volumeMounts"
    ]
    rules = release.get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
    [callers] = [rule["from"] for rule in rules if rule["ports"] == [{"port": "fleet"}]]
    own = release.get("Deployment", "prod-loraplex")["spec"]["selector"]["matchLabels"]
    assert callers == [{"podSelector": {"matchLabels": own}}]


def test_replicas_know_each_other_by_the_name_of_their_service(chart: Chart, tmp_path: Path) -> None:
    tls = {"tls": {"enabled": True, "secretName": "certificates"}}
    config = config_of(chart.render(MODELS | VARIANTS["a fleet"] | tls), tmp_path)
    assert (config.fleet_server_name, config.fleet_ca) == ("prod-loraplex", "/etc/loraplex/tls/ca.crt")


def test_the_machines_of_a_model_are_a_group_of_pods(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | VARIANTS["machines"])
    config = config_of(release, tmp_path)
    spec = release.get("LeaderWorkerSet", "prod-loraplex-machines")["spec"]
    assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (2, config.models[0].machines)
    assert config.machines_listen == "10.0.0.7:50055"
    server, follower = (template["spec"] for template in templates_of(release))
    assert follower["containers"][0]["resources"] == server["containers"][0]["resources"]
    mounts = [each["containers"][0]["volumeMounts"] for each in (server, follower)]
    for path in ("/etc/loraplex/machines", "/var/lib/loraplex/models"):
        assert len({str(each) for one in mounts for each in one if each["mountPath"] == path}) == 1
    assert {each["name"] for each in follower["volumes"]} == {"scratch", "shared-memory", "machines", "models"}


def test_a_follower_is_given_what_its_command_needs_beside_the_groups_own(
    chart: Chart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = chart.render(MODELS | MACHINES)
    container = templates_of(release)[1]["spec"]["containers"][0]
    secret = tmp_path / "secret"
    secret.write_text(64 * "0")
    given = {"LORAPLEX_MACHINES_SECRET": str(secret), "POD_IP": "10.0.0.8"}
    assert given.keys() <= {each["name"] for each in container["env"]}
    group = {"LWS_LEADER_ADDRESS": "group-0.group.serving", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(list(command)))
    assert CliRunner(env=given | group).invoke(main, container["args"]).exit_code == 0
    [command] = started
    assert {"--leader=group-0.group.serving:50055", "--machines=2", "--index=1", "--host=10.0.0.8"} <= {*command}


def test_the_machines_of_a_model_reach_each_other_at_any_port_and_nobody_else_reaches_them(chart: Chart) -> None:
    release = chart.render(MODELS | MACHINES)
    server, follower = (
        {"podSelector": {"matchLabels": {k: v for k, v in template["metadata"]["labels"].items() if "app." in k}}}
        for template in templates_of(release)
    )
    to_servers = release.get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
    assert [rule["from"] for rule in to_servers if "ports" not in rule] == [[follower]]
    to_followers = release.get("NetworkPolicy", "prod-loraplex-followers")["spec"]
    assert {"podSelector": to_followers["podSelector"]} == follower
    assert to_followers["ingress"] == [{"from": [server, follower]}]
    service = release.get("Service", "prod-loraplex")["spec"]["selector"]
    assert {"podSelector": {"matchLabels": service}} == server


def test_a_follower_outlives_the_streams_of_its_server(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | MACHINES)
    config, follower = config_of(release, tmp_path), templates_of(release)[1]["spec"]
    waits = follower["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert follower["terminationGracePeriodSeconds"] > waits
    assert waits >= config.lame_duck_seconds + config.drain_grace_seconds


def test_the_files_of_an_identity_provider_are_mounted_where_the_configuration_names_them(chart: Chart) -> None:
    release = chart.render(MODELS | VARIANTS["an identity provider of one's own"])
    pod = pod_of(release)
    assert {"name": "jwt", "mountPath": "/etc/loraplex/jwt", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert {"name": "jwt", "secret": {"secretName": "provider"}} in pod["volumes"]


def test_nothing_is_written_beside_the_configuration(chart: Chart, tmp_path: Path) -> None:
    """It lies on a ConfigMap, which cannot be written to."""
    assert config_of(chart.render(MODELS), tmp_path).state_directory == ""


def test_every_port_that_something_refers_to_is_one_that_the_service_listens_on(
    release: Manifests, tmp_path: Path
) -> None:
    config = config_of(release, tmp_path)
    container = pod_of(release)["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listening = {
        key: int(address.rpartition(":")[2])
        for key, address in (
            ("data", config.listen),
            ("admin", config.admin_listen),
            ("health", config.health_listen or ":0"),
            ("metrics", config.metrics_listen or ":0"),
            ("http", config.http_listen),
            ("fleet", config.fleet_listen),
            ("machines", config.machines_listen),
        )
        if address is not None
    }
    assert ports == listening
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"] == {"port": listening["health"], "service": probe.removesuffix("Probe")}


@pytest.mark.parametrize(
    ("values", "calls"),
    [
        ({}, 64),
        ({"envoy": {"enabled": True}}, 256),
        ({"envoy": {"enabled": True}, "config": {"limits": {"connections": 7}}}, 256),
        ({"envoy": {"enabled": True}, "config": {"limits": {"calls_per_connection": 7}}}, 7),
    ],
    ids=["alone", "behind envoy", "beside other limits", "as the values say"],
)
def test_servers_behind_envoy_take_more_calls_on_a_connection(
    chart: Chart, tmp_path: Path, values: dict[str, Any], calls: int
) -> None:
    limits = config_of(chart.render(MODELS | values), tmp_path).limits
    assert limits.calls_per_connection == calls
    assert limits.connections == values.get("config", {}).get("limits", {}).get("connections", 1024)


def test_a_pod_has_time_to_drain(release: Manifests, tmp_path: Path) -> None:
    config, pod = config_of(release, tmp_path), pod_of(release)
    before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] + config.lame_duck_seconds
    assert pod["terminationGracePeriodSeconds"] > before + config.drain_grace_seconds


def test_a_changed_configuration_replaces_the_pods(chart: Chart) -> None:
    def checksum(values: dict[str, Any]) -> str:
        release = chart.render(MODELS | values)
        annotations: dict[str, str] = release.get("Deployment", "prod-loraplex")["spec"]["template"]["metadata"][
            "annotations"
        ]
        return annotations["checksum/config"]

    assert checksum({}) == checksum({"replicas": 2})
    assert checksum({}) != checksum({"logLevel": "DEBUG"})


def test_a_gpu_is_asked_for_beside_the_other_resources(chart: Chart) -> None:
    release = chart.render(MODELS | {"gpu": {"enabled": True, "count": 2}})
    assert pod_of(release)["containers"][0]["resources"] == {
        "requests": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": 2},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": 2},
    }


def test_pods_run_without_privileges_on_a_read_only_root(release: Manifests) -> None:
    pods = [template["spec"] for template in templates_of(release)]
    for pod in [*pods, *(d["spec"] for d in release.documents if d["kind"] == "Pod")]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "loraplex:0.1.0"),
        ({"tag": "0.1.0-cpu"}, "loraplex:0.1.0-cpu"),
        ({"repository": "mirror/loraplex", "digest": DIGEST}, f"mirror/loraplex:0.1.0@{DIGEST}"),
    ],
)
def test_an_image_is_named_by_its_tag_and_by_its_digest_where_one_is_given(
    chart: Chart, image: dict[str, str], reference: str
) -> None:
    release = chart.render(MODELS | {"image": image, "picker": {"enabled": True}})
    assert pod_of(release)["containers"][0]["image"] == reference
    assert release.get("Pod", "prod-loraplex-health")["spec"]["containers"][0]["image"] == reference
    picker = release.get("Deployment", "prod-loraplex-picker")["spec"]["template"]["spec"]
    assert picker["containers"][0]["image"] == reference


def test_a_server_ends_before_another_one_takes_its_state(chart: Chart) -> None:
    def strategy(values: dict[str, Any]) -> Any:
        return chart.render(MODELS | values).get("Deployment", "prod-loraplex")["spec"]["strategy"]

    assert strategy({"persistence": {"state": {"enabled": True}}}) == {"type": "Recreate"}
    assert strategy({})["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("name", ["Deployment prod-loraplex-picker", "Pod prod-loraplex-health"])
def test_what_serves_no_model_needs_no_cache_of_kernels(chart: Chart, name: str) -> None:
    found = chart.render(MODELS | {"picker": {"enabled": True}}).get(*name.split())
    spec = found["spec"] if found["kind"] == "Pod" else found["spec"]["template"]["spec"]
    assert [container["command"] for container in spec["containers"]] == [["loraplex"]]


def test_helm_test_asks_the_probes_port_whether_requests_are_admitted(release: Manifests) -> None:
    pod = release.get("Pod", "prod-loraplex-health")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    arguments = pod["spec"]["containers"][0]["args"]
    check_loraplex(list(arguments))
    host, _, port = arguments[arguments.index("--server") + 1].partition(":")
    service = release.get("Service", host.split(".")[0])
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]
    assert host == f"{service['metadata']['name']}.serving.svc"


@pytest.mark.parametrize("values", [MODELS, MODELS | MACHINES], ids=["one", "several"])
def test_the_first_command_of_the_notes_waits_for_what_the_release_has(chart: Chart, values: dict[str, Any]) -> None:
    command = next(line.split() for line in chart.notes(values).splitlines() if line.startswith("  "))
    kind, name = next(word for word in command if "/" in word).split("/")
    assert command[:3] == ["kubectl", "--namespace", "serving"]
    assert [d for d in chart.render(values).documents if (d["kind"].lower(), d["metadata"]["name"]) == (kind, name)]


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_replicas_are_scaled_by_metrics_that_the_server_shows(chart: Chart, kind: str) -> None:
    release = chart.render(MODELS | {"autoscaling": KEDA | {"kind": kind}})
    kinds = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}
    names = set(re.findall(r"loraplex_\w+", str(release.get(kinds[kind], "prod-loraplex")["spec"])))
    assert len(names) == 2
    assert names <= documented().keys()


def test_the_administration_is_closed_to_other_pods(chart: Chart) -> None:
    policy = chart.render(MODELS).get("NetworkPolicy", "prod-loraplex")
    admin = [rule for rule in policy["spec"]["ingress"] if rule["ports"] == [{"port": "admin"}]]
    own = {"app.kubernetes.io/name": "loraplex", "app.kubernetes.io/instance": "prod"}
    assert admin == [
        {
            "ports": [{"port": "admin"}],
            "from": [{"podSelector": {"matchLabels": own | {"app.kubernetes.io/component": "server"}}}],
        }
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"models": []}, "models"),
        ({"models": [{"name": "Llama 8B", "model": "org/x"}]}, "models/0/name"),
        ({"models": [{"name": "a"}]}, "model"),
        ({"replicas": 0}, "replicas"),
        ({"image": {"digest": "latest"}}, "image/digest"),
        ({"replica": 2}, "replica"),
        ({"gpu": {"enabled": "yes"}}, "gpu/enabled"),
        ({"ports": {"data": 70000}}, "ports/data"),
        ({"persistence": {"models": {"size": "big"}}}, "persistence/models/size"),
        ({"persistence": {"models": {"accessModes": ["Everybody"]}}}, "persistence/models/accessModes"),
        ({"drain": {"graceSeconds": -1}}, "drain/graceSeconds"),
        ({"tls": {"enabled": True, "secretName": ""}}, "tls.secretName"),
        ({"tls": {"enabled": False}}, "insecure"),
        ({"auth": {"keysSecret": ""}}, "insecure"),
        ({"auth": {"keysSecret": "keys", "jwtSecret": "provider"}}, "auth.jwtSecret"),
        ({"config": {"listen": "0.0.0.0:1"}}, "config.listen"),
        ({"autoscaling": {"kind": "vpa"}}, "autoscaling/kind"),
        ({"autoscaling": {"kind": "keda"}}, "autoscaling.prometheusUrl"),
        ({"autoscaling": {"minReplicas": 5, "maxReplicas": 2}}, "autoscaling.minReplicas"),
        ({"envoy": {"balanceFactor": 50}}, "envoy/balanceFactor"),
        ({"envoy": {"endpoints": [{"host": "a", "port": 1}]}}, "healthPort"),
        ({"replicas": 2, "persistence": {"state": {"enabled": True}}}, "persistence.state"),
        ({"config": {"state": "postgresql://u:p@database/l"}}, "config.state: use state.secretName"),
        ({"config": {"object_store": {"aws_secret_access_key": "s"}}}, "config.object_store.aws_secret_access_key"),
        ({"config": {"otlp": {"endpoint": "http://c:4317", "headers": {"authorization": "s"}}}}, "config.otlp.headers"),
        ({"ports": {"admin": 50051}}, "ports: admin and data are both 50051"),
        ({"models": MACHINES["models"]}, "machines.secretName"),
        (MACHINES | {"models": 2 * MACHINES["models"]}, "models: llama-8b, llama-8b have machines above 1, as one may"),
        (MACHINES | {"autoscaling": KEDA}, "autoscaling: it is for servers of one pod each"),
        (MACHINES | {"config": {"machines_listen": "10.0.0.5:1"}}, "config.machines_listen: the chart sets this key"),
        ({"ports": {"machines": 50054}}, "ports: fleet and machines are both 50054"),
        ({"http": {"enabled": True, "port": 9464}}, "ports: http and metrics are both 9464"),
        ({"adapters": ADAPTERS["adapters"]}, "persistence.adapters.enabled"),
        (
            {
                "envoy": {"enabled": True},
                "tls": {"enabled": True, "secretName": "c", "requireClientCertificate": True},
            },
            "envoy.tlsSecretName",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(chart: Chart, values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        chart.render(MODELS | values)
    assert named in str(caught.value)


def test_what_only_the_service_knows_is_refused_by_the_service(chart: Chart, tmp_path: Path) -> None:
    release = chart.render(MODELS | {"models": [{"name": "a", "model": "org/a", "kv_cache_fracton": 0.9}]})
    with pytest.raises(ValueError, match=r"kv_cache_fracton.*did you mean 'kv_cache_fraction'"):
        config_of(release, tmp_path)


def test_the_chart_passes_helms_own_lint() -> None:
    report = helm_python.lint(CHART, MODELS, strict=True, kube_version=f"v{KUBERNETES}.0")
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []  # 1: "an icon is recommended"


def test_every_value_is_described() -> None:
    text = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [key for key in values if f"`{key}" not in text] == []


def test_http_is_offered_where_it_is_switched_on(chart: Chart) -> None:
    def of(values: dict[str, Any]) -> tuple[list[str], list[Any]]:
        release = chart.render(MODELS | values)
        ports = release.get("Service", "prod-loraplex")["spec"]["ports"]
        rules = release.get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
        return [port["name"] for port in ports], [rule["from"] for rule in rules if rule["ports"] == [{"port": "http"}]]

    assert of({}) == (["grpc"], [])
    assert of({"http": {"enabled": True}}) == (["grpc", "http"], [[{"podSelector": {}}]])


@pytest.mark.parametrize(
    ("http", "is_managed"),
    [
        ({"enabled": True}, False),
        ({"enabled": True, "admin": True}, True),
        ({"enabled": False, "admin": True}, False),
    ],
)
def test_adapters_are_managed_over_http_where_that_is_switched_on(
    chart: Chart, tmp_path: Path, http: dict[str, Any], is_managed: bool
) -> None:
    assert config_of(chart.render(MODELS | {"http": http}), tmp_path).http_admin is is_managed


def test_http_is_called_by_the_names_of_the_service_and_by_further_ones(chart: Chart, tmp_path: Path) -> None:
    names = config_of(
        chart.render(MODELS | {"http": {"enabled": True, "hosts": ["llm.internal"]}}), tmp_path
    ).http_hosts
    assert names[-1] == "llm.internal"
    assert [name.count(".") for name in names[:-1]] == [0, 1, 2, 4]


@pytest.mark.parametrize("named", [[], [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]])
def test_http_past_envoy_is_for_those_alone_who_are_named(chart: Chart, named: list[Any]) -> None:
    values = {"http": {"enabled": True}, "envoy": {"enabled": True}, "networkPolicy": {"dataFrom": named}}
    rules = chart.render(MODELS | values).get("NetworkPolicy", "prod-loraplex")["spec"]["ingress"]
    assert [rule["from"] for rule in rules if rule["ports"] == [{"port": "http"}]] == ([named] if named else [])
