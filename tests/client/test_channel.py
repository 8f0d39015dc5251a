"""What accompanies every call."""

import json
from typing import Any

from loraplex.channel import SERVICE_CONFIG, Connection


def metadata(connection: Connection, **call: Any) -> dict[str, str]:
    arguments: Any = {**call}
    return dict(connection.arguments(arguments)["metadata"])


def test_credentials_tenant_and_routing_key() -> None:
    connection = Connection("x:1", token="secret", tenant="acme")
    assert metadata(connection, routing_key="k", metadata={"traceparent": "t"}) == {
        "authorization": "Bearer secret",
        "loraplex-tenant": "acme",
        "loraplex-routing-key": "k",
        "traceparent": "t",
    }


def test_nothing_is_sent_that_was_not_set() -> None:
    assert metadata(Connection("x:1")) == {}


def test_a_token_that_changes_is_asked_for_each_time() -> None:
    tokens = iter(["first", "second"])
    connection = Connection("x:1", token=lambda: next(tokens))
    assert [metadata(connection)["authorization"] for _ in range(2)] == ["Bearer first", "Bearer second"]


def test_the_timeout_of_the_call_comes_before_the_client_s() -> None:
    connection = Connection("x:1", timeout=5)
    assert connection.arguments({})["timeout"] == 5
    assert connection.arguments({"timeout": 1})["timeout"] == 1
    assert connection.arguments({"timeout": None})["timeout"] is None


def test_options_of_the_caller_come_before_the_defaults() -> None:
    connection = Connection("x:1", options={"grpc.max_receive_message_length": 7, "grpc.primary_user_agent": "me"})
    options = dict(connection.channel_options())
    assert options["grpc.max_receive_message_length"] == 7
    assert options["grpc.primary_user_agent"] == "me"
    assert json.loads(options["grpc.service_config"]) == SERVICE_CONFIG
