"""What callers of HTTP are told when something goes wrong."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from loraplex import LoraplexError
from loraplex.v1.errors_pb2 import ErrorReason
from loraplex_service.admission.tenants import TenantConfig, Tenants
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.door import Door
from loraplex_service.errors import Unavailable
from loraplex_service.http.exchange import SMALL_BYTES, _peer
from loraplex_service.http.failures import BY_CODE, BY_REASON, failed
from loraplex_service.ports.interceptors import _caller
from loraplex_service.text import Tokenizer
from tests.service.data_plane import DataPlane, data_plane
from tests.service.http.caller import BODY_BYTES, Caller, caller_of
from tests.waits import MOST_SECONDS

REASONS = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()[1:]]


@pytest.fixture
async def other(plane: DataPlane) -> AsyncIterator[Caller]:
    async with caller_of(plane.address, "demo") as caller:
        yield caller


def error_of(code: grpc.StatusCode, reason: str, *details: Any) -> LoraplexError:
    status = Status(code=code.value[0], message="spec.sampling.top_p: is wrong")
    for detail in (ErrorInfo(reason=reason, domain="loraplex"), *details):
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    return LoraplexError(code, status)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_of_grpc_has_one_of_http(code: grpc.StatusCode) -> None:
    failure = failed(error_of(code, ""))
    assert failure.status == (BY_CODE[code].status if code in BY_CODE else 500)
    assert set(failure.body["error"]) == {"message", "type", "param", "code", "reason"}
    assert failure.body["error"]["code"]


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_told(reason: str) -> None:
    error = failed(error_of(grpc.StatusCode.UNAVAILABLE, reason)).body["error"]
    assert error["reason"] == reason
    assert error["code"] == (
        BY_REASON[reason].code if reason in BY_REASON and BY_REASON[reason].code else reason.lower()
    )


def test_reasons_with_words_of_their_own_exist() -> None:
    assert set(REASONS) >= BY_REASON.keys()


def test_when_to_try_again_is_told_in_whole_seconds() -> None:
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(1200)
    assert failed(error_of(grpc.StatusCode.UNAVAILABLE, "OVERLOADED", retry)).headers == {"retry-after": "2"}


def test_only_what_passes_is_told_as_a_limit_of_rate() -> None:
    passing = {
        reason for reason in REASONS if failed(error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)).status == 429
    }
    assert passing == {"TENANT_QUOTA", "SLOW_CONSUMER"}


def test_a_field_is_told_by_the_name_of_its_parameter() -> None:
    violation = BadRequest.FieldViolation(field="spec.sampling.top_p", description="is wrong")
    error = error_of(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", BadRequest(field_violations=[violation]))
    named = {"sampling.top_p": "top_p"}.get
    assert failed(error, named).body["error"]["param"] == "top_p"
    assert failed(error, named).body["error"]["message"] == "top_p: is wrong"
    assert failed(error).body["error"]["param"] == "sampling.top_p"


# ---- from the service ------------------------------------------------------------------------------------------------


async def test_a_value_outside_its_limits(caller: Caller) -> None:
    answer = await caller.chat(temperature=11)
    assert answer.status == 400
    assert (answer.error["param"], answer.error["code"]) == ("temperature", "invalid_value")
    assert answer.error["message"].startswith("temperature: ")


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_a_parameter_that_is_missing(caller: Caller, missing: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    answer = await caller.post("/v1/chat/completions", {**body, missing: None})
    assert answer.status == 400
    assert answer.error["param"] == missing


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"user": "a" * 300, "metadata": {"k": "v"}}, "user"),
        ({"user": "a", "metadata": {"k": "v" * 300}}, "metadata.k"),
        ({"user": "a", "metadata": {str(key): "v" for key in range(16)}}, "metadata"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools"),
    ],
    ids=["user", "metadata", "too many labels", "no messages", "a message", "tools"],
)
async def test_the_parameter_at_fault_is_named(caller: Caller, given: dict[str, Any], param: str) -> None:
    error = (await caller.chat(**given)).error
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


async def test_a_conversation_that_its_template_cannot_show_is_a_fault_of_the_messages(caller: Caller) -> None:
    error = (await caller.chat(continue_final_message=True, messages=[{"role": "tool", "tool_call_id": "a"}])).error
    assert error["param"].startswith("messages")


async def test_a_model_that_does_not_exist(caller: Caller) -> None:
    answer = await caller.chat(model="nobody", stream=True)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


async def test_a_model_that_is_not_loaded(caller: Caller) -> None:
    answer = await caller.chat(model="other")
    assert (answer.status, answer.error["reason"]) == (400, "MODEL_UNLOADED")


async def test_a_server_that_cannot_now_says_when_to_come_again(plane: DataPlane, other: Caller) -> None:
    plane.models.problems["demo"] = Unavailable("OVERLOADED", "the queue is full", retry_after_seconds=3)
    answer = await other.chat()
    assert (answer.status, answer.headers["retry-after"], answer.error["code"]) == (503, "3", "overloaded")


async def test_a_tenant_over_its_quota(byte_tokenizer: Tokenizer) -> None:
    tenants = Tenants({}, TenantConfig(requests_per_second=0.1))
    async with data_plane(byte_tokenizer, tenants=tenants) as plane, caller_of(plane.address, "demo") as caller:
        assert (await caller.complete()).status == 200
        answer = await caller.complete()
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    )
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_time_that_the_caller_sets_ends_its_request(plane: DataPlane, other: Caller) -> None:
    plane.engine.steps_allowed = 0
    body = {"model": "demo", "prompt": "ab"}
    answer = await other.post("/v1/completions", body, {"loraplex-timeout-seconds": "0.2"})
    assert answer.status == 504
    await plane.engine.until_idle()


async def test_what_fails_in_a_stream_is_its_last_event(plane: DataPlane, other: Caller) -> None:
    plane.engine.steps_allowed = 1
    asked = asyncio.create_task(other.complete(stream=True, max_tokens=50))
    await other.heard.wait()
    plane.entrance.end_all(Unavailable("DRAINING", "the server is shutting down"))
    answer = await asked
    assert answer.status == 200
    assert answer.events[-1]["error"]["reason"] == "DRAINING"
    assert b"[DONE]" not in answer.body


async def test_a_token_is_asked_for_and_none_is_known(byte_tokenizer: Tokenizer) -> None:
    door = Door(AuthConfig(trusted_peers=("10.0.0.0/8",)))
    async with data_plane(byte_tokenizer, door=door) as plane, caller_of(plane.address, "demo") as caller:
        for headers in ({}, {"authorization": "Bearer no"}, {"loraplex-tenant": "acme"}):
            answer = await caller.post("/v1/completions", {"model": "demo", "prompt": "x"}, headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_an_id_of_the_caller_reaches_the_service(caller: Caller) -> None:
    answer = await caller.post("/v1/completions", {"model": "tiny", "prompt": "x"}, {"x-request-id": "x" * 200})
    assert (answer.status, answer.error["param"]) == (400, "x-request-id")


# ---- from the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"model": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"temperature": ' + b"9" * 400 + b"}", 400),
        (b'{"logit_bias": {"1": ' + b"9" * 400 + b"}}", 400),
        (b'{"loraplex": {"sampling": {"temperature": ' + b"9" * 400 + b"}}}", 400),
        (b"x" * (BODY_BYTES + 1), 413),
    ],
    ids=["cut", "list", "bytes", "surrogate", "deep", "number", "real", "bias", "field", "large"],
)
async def test_a_body_that_cannot_be_read(caller: Caller, body: bytes, status: int) -> None:
    answer = await caller.post("/v1/completions", body)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"


async def until_taken(caller: Caller, size: int) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        while caller.door._room.taken < size:  # noqa: ASYNC110 - the room tells nobody
            await asyncio.sleep(0.01)


async def test_many_large_bodies_at_once_are_refused_and_leave_room_behind(caller: Caller) -> None:
    async with caller.held_up(BODY_BYTES), caller.held_up(BODY_BYTES):
        await until_taken(caller, 2 * (BODY_BYTES - SMALL_BYTES))
        answer = await caller.post("/tokenize", {"model": "tiny", "prompt": "x" * (BODY_BYTES // 2)})
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (await caller.post("/tokenize", {"model": "tiny", "prompt": "x"})).status == 200
    assert caller.door._room.taken == 0


async def test_a_body_that_is_only_promised_takes_no_room(caller: Caller) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(caller.held_up(1, declared=BODY_BYTES))
        assert caller.door._room.taken == 0
        large = {"model": "tiny", "prompt": "x" * (2 * SMALL_BYTES)}
        assert (await caller.post("/tokenize", large)).status == 200


async def test_a_large_body_of_a_caller_whom_nobody_knows_is_not_kept(byte_tokenizer: Tokenizer) -> None:
    door = Door(AuthConfig(trusted_peers=("10.0.0.0/8",)))
    async with data_plane(byte_tokenizer, door=door) as plane, caller_of(plane.address, "demo") as caller:
        answer = await caller.post("/v1/completions", b"x" * BODY_BYTES)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a"] * 257}),
        ("/v1/completions", {"prompt": [[1]] * 257}),
        ("/v1/embeddings", {"input": ["a"] * 257}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}] * 1025}),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "a"}}] * 129}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 65}),
    ],
    ids=["prompts", "tokens", "inputs", "messages", "tools", "biases", "stop tokens"],
)
async def test_a_list_beyond_its_limit_is_refused_before_anything_is_built(
    caller: Caller, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller.clients, "_target", "unix:/nowhere")
    answer = await caller.post(path, {"model": "tiny"} | body)
    assert (answer.status, answer.error["param"]) == (400, list(body)[-1])
    assert "entries; at most" in answer.error["message"]


async def test_what_many_prompts_share_may_not_become_too_large_once_in_each(caller: Caller) -> None:
    answer = await caller.complete(["a"] * 256, guided_regex="a" * (BODY_BYTES // 128))
    assert (answer.status, answer.error["code"]) == (413, "message_too_large")
    assert "all 256 prompts share" in answer.error["message"]


def nested(levels: int, value: Any = 1) -> Any:
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("parameter", "beyond"),
    [
        ("chat_template_kwargs", {"a": 10**400}),
        ("chat_template_kwargs", nested(900)),
        ("chat_template_kwargs", nested(32)),
        ("documents", [[[nested(300)]]]),
        ("loraplex", {"prompt": {"chat": {"templateKwargs": nested(300)}}}),
        ("tools", [{"type": "function", "function": {"function": [1]}}]),
        ("tools", [{"type": "function", "function": {"name": "a", "parameters": nested(900)}}]),
    ],
    ids=["number", "very deep", "deep", "documents", "field", "tool", "schema"],
)
async def test_what_no_message_can_hold_is_a_fault_of_the_request(caller: Caller, parameter: str, beyond: Any) -> None:
    answer = await caller.chat(**{parameter: beyond})
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "deep",
    [
        {"chat_template_kwargs": nested(31)},
        {"documents": [nested(30)]},
        {"loraplex": {"prompt": {"chat": {"templateKwargs": nested(28)}}}},
    ],
    ids=["variables", "documents", "field"],
)
async def test_what_is_as_deep_as_may_be_is_taken(caller: Caller, deep: dict[str, Any]) -> None:
    assert (await caller.chat(**deep)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-encoding": "gzip"},
        {"content-type": "application/json; charset=utf-16"},
    ],
)
async def test_a_body_that_is_no_json_by_its_headers(caller: Caller, headers: dict[str, str]) -> None:
    """A page in a browser may send text/plain to any address, and JSON only to those that allow it."""
    assert (await caller.post("/tokenize", {}, headers)).status == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
async def test_what_there_is_not(caller: Caller, method: str, path: str, status: int) -> None:
    answer = await caller.request(method, path, b"", {})
    assert answer.status == status
    assert path in answer.error["message"]


@pytest.mark.parametrize(("path", "allowed"), [("/v1/completions", "POST"), ("/v1/models", "GET, HEAD")])
async def test_the_methods_that_there_are_are_told(caller: Caller, path: str, allowed: str) -> None:
    answer = await caller.request("OPTIONS", path, b"", {})
    assert (answer.status, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models"])
async def test_what_can_be_read_can_be_asked_for_its_head(caller: Caller, path: str) -> None:
    assert (await caller.request("HEAD", path, b"", {})).status == 200


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer é"}, {"loraplex-timeout-seconds": "nan"}, {"loraplex-timeout-seconds": "soon"}],
)
async def test_a_header_that_cannot_be_passed_on(caller: Caller, headers: dict[str, str]) -> None:
    answer = await caller.post("/tokenize", {"model": "tiny", "prompt": "x"}, headers)
    assert (answer.status, answer.error["param"]) == (400, next(iter(headers)))


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/nothing"])
async def test_every_answer_has_an_id(caller: Caller, path: str) -> None:
    first, second = [await caller.get(path) for _ in range(2)]
    assert first.headers["x-request-id"] == first.headers["request-id"] != second.headers["x-request-id"]


async def test_a_word_that_is_a_field_elsewhere_stays_in_a_sentence() -> None:
    violation = BadRequest.FieldViolation(field="name", description="does not name an adapter")
    error = error_of(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER", BadRequest(field_violations=[violation]))
    error.status.message = "name: does not name an adapter; name: is long"
    told = failed(error, {"name": "lora_name"}.get).body["error"]["message"]
    assert told == "lora_name: does not name an adapter; lora_name: is long"


async def test_two_credentials_are_told_as_wrong_ones(caller: Caller) -> None:
    answer = await caller.get("/v1/models", {"x-api-key": "a", "authorization": "Bearer b"})
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


async def test_more_headers_than_grpc_takes(caller: Caller) -> None:
    answer = await caller.post("/tokenize", {"model": "tiny", "prompt": "x"}, {"tracestate": "x" * 8000})
    assert answer.status == 431


@pytest.mark.parametrize(("key", "status"), [("é", 400), ("x" * 20_000, 431)], ids=["no ASCII", "long"])
async def test_a_cache_key_that_no_header_can_hold_is_a_fault_of_the_request(
    caller: Caller, key: str, status: int
) -> None:
    answer = await caller.chat(prompt_cache_key=key)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert "prompt_cache_key" in answer.error["message"]


async def test_a_fault_of_the_door_says_nothing_of_it(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    caller.door._room = None  # type: ignore[assignment]
    with caplog.at_level(logging.CRITICAL):
        answer = await caller.post("/tokenize", {"model": "tiny", "prompt": "x"})
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "None" not in json.dumps(answer.json).replace("null", "")


# ---- whom the door speaks for ----------------------------------------------------------------------------------------


class Context:
    """What the service sees of a call."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, Any]:
        return {}


def caller_seen(peer: str, **metadata: str) -> str:
    return _caller(Context(peer), {key.replace("_", "-"): value for key, value in metadata.items()}).peer  # type: ignore[arg-type]


def test_the_door_says_whom_it_calls_for_and_nobody_else_is_believed() -> None:
    assert caller_seen("unix:", loraplex_peer="ipv4:10.1.2.3:4") == "ipv4:10.1.2.3:4"
    assert caller_seen("ipv4:10.9.9.9:4", loraplex_peer="ipv4:127.0.0.1:4") == "ipv4:10.9.9.9:4"


@pytest.mark.parametrize(("host", "peer"), [("10.1.2.3", "ipv4:10.1.2.3:7"), ("::1", "ipv6:%5B::1%5D:7")])
def test_an_address_is_written_as_grpc_writes_it(host: str, peer: str) -> None:
    assert _peer((host, 7)) == peer
