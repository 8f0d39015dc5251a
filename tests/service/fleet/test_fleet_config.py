"""What the configuration says of a fleet, and what is wrong with it."""

from pathlib import Path

import pytest

from loraplex_service.config import ServiceConfig, load_config
from loraplex_service.config_file import ConfigError

STATE = "state: postgresql://somebody:hunter-two@db/loraplex"
TLS = "tls: {certificate: tls.crt, key: tls.key}"


def load(directory: Path, *lines: str) -> ServiceConfig:
    (directory / "tiny").mkdir()
    file = directory / "loraplex.yaml"
    file.write_text("\n".join(("models: [{name: tiny, model: ./tiny}]", *lines)))
    return load_config(file, {})


def test_the_authority_of_replicas_is_found_beside_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, STATE, TLS, "fleet_ca: ca.crt").fleet_ca == str(tmp_path / "ca.crt")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["fleet_listen: 127.0.0.1:0"], "fleet_listen: there is no fleet; set state to its database"),
        (["fleet_ca: ca.crt"], "fleet_ca: there is no fleet; set state to its database"),
        ([STATE.replace("postgresql", "mysql")], "state: postgresql://USER@HOST/DATABASE is expected"),
        ([STATE, "fleet_address: 10.0.0.7:1"], "fleet_address: there is no fleet_listen"),
        ([STATE, "fleet_ca: ca.crt"], "fleet_ca: replicas have no certificates without tls; set that"),
        ([STATE, "fleet_server_name: a"], "fleet_server_name: replicas have no certificates without tls; set that"),
    ],
)
def test_what_does_not_fit_together_is_named_without_the_password(
    tmp_path: Path, lines: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, *lines)
    assert problem in str(raised.value)
    assert "hunter-two" not in str(raised.value)
