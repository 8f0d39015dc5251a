"""Which names and which pages a server without credentials answers to."""

from typing import Any

import pytest

from loraplex_service.app import _hosts
from loraplex_service.auth.config import AuthConfig
from loraplex_service.config import ServiceConfig
from loraplex_service.http.failures import Refusal
from loraplex_service.http.hosts import Hosts
from loraplex_service.ports.config import TlsConfig

HOSTS = Hosts(("llm.Internal",))


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "10.1.2.3:80", "[::1]:8000", "LLM.internal:8000", "llm.internal"]
)
def test_an_address_and_a_name_of_the_server_are_taken(host: str) -> None:
    HOSTS.check({"host": host})
    HOSTS.check({"host": host, "origin": f"http://{host}"})


@pytest.mark.parametrize(
    "host", ["example.org:8000", "localhost.example.org", "127.0.0.1.example.org", "[::1", "", "a@b", "llm.internal.de"]
)
def test_another_name_is_refused(host: str) -> None:
    with pytest.raises(Refusal) as raised:
        HOSTS.check({"host": host})
    assert (raised.value.status, raised.value.param) == (403, "host")


@pytest.mark.parametrize(
    "origin", ["http://example.org", "http://localhost:3000", "null", "http://localhost", "file://"]
)
def test_a_page_of_another_site_is_refused(origin: str) -> None:
    with pytest.raises(Refusal) as raised:
        HOSTS.check({"host": "localhost:8000", "origin": origin})
    assert (raised.value.status, raised.value.param) == (403, "origin")


def test_a_page_of_a_name_that_the_server_is_given_is_taken() -> None:
    HOSTS.check({"host": "127.0.0.1:8000", "origin": "https://llm.internal"})


def test_where_credentials_are_asked_for_any_name_will_do() -> None:
    Hosts().check({"host": "example.org", "origin": "http://example.com"})


def test_a_caller_who_names_no_host_is_no_browser() -> None:
    HOSTS.check({})


TLS = TlsConfig(certificate="server.crt", key="server.key")
KEYS = AuthConfig(keys="keys.yaml")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ("localhost", "llm")),
        ({"auth": AuthConfig(trusted_peers=("127.0.0.0/8",))}, ("localhost", "llm")),
        ({"auth": KEYS}, None),
        ({"tls": TLS}, None),
    ],
    ids=["open", "trusted", "keys", "certificate"],
)
def test_names_count_where_a_page_could_do_what_its_reader_may(config: dict[str, Any], names: Any) -> None:
    assert _hosts(ServiceConfig(models=(), http_hosts=("llm",), **config), "localhost:8000") == names
