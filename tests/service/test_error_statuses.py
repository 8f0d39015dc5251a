"""Every error that a caller of the data plane can get: code, reason, details."""

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any

import grpc
import msgspec
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RequestInfo, ResourceInfo, RetryInfo

from loraplex.v1.errors_pb2 import ErrorReason
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import PartialUsage, StreamGenerateRequest
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import AdaptersChanged, AdapterStatus, WantAdapter
from loraplex_service.admission.admission import AdmissionLimits
from loraplex_service.errors import (
    MAX_STATUS_BYTES,
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    EngineError,
    FailedPrecondition,
    FeatureUnsupported,
    InvalidRequest,
    LoraplexError,
    NotFound,
    PermissionDenied,
    PromptTooLong,
    QuotaExceeded,
    SlowConsumer,
    Unauthenticated,
    Unavailable,
    Violation,
    to_status,
)
from loraplex_service.text import Tokenizer
from loraplex_service.validation import checks
from tests.service.data_plane import DataPlane, Failure, data_plane, failure, make_spec

Code = grpc.StatusCode


async def both_ways(plane: DataPlane, spec: GenerateSpec, **call: Any) -> Failure:
    """The failure of a spec, which is the same for Generate and for StreamGenerate."""
    unary = await failure(plane.generate(spec, **call))
    stream = await failure(plane.stream(spec, **call))
    assert (unary.code, unary.reason, unary.message) == (stream.code, stream.reason, stream.message)
    return stream


# ---- INVALID_ARGUMENT, UNIMPLEMENTED ---------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


INVALID: list[tuple[Mapping[str, Any], str]] = [
    ({"model": ""}, "spec.model"),
    ({"model": "a/b"}, "spec.model"),
    ({"prompt": {}}, "spec.prompt"),
    ({"prompt": {"text": ""}}, "spec.prompt.text"),
    ({"prompt": {"token_ids": {}}}, "spec.prompt.token_ids"),
    ({"prompt": {"token_ids": {"ids": [258]}}}, "spec.prompt.token_ids.ids"),
    ({"prompt": {"token_ids": {"ids": [1]}, "add_special_tokens": True}}, "spec.prompt.add_special_tokens"),
    ({"prompt": {"text": "a", "truncate_to_tokens": 0}}, "spec.prompt.truncate_to_tokens"),
    ({"prompt": {"chat": {}}}, "spec.prompt.chat.messages"),
    ({"prompt": {"chat": {"messages": [{"content": "hi"}]}}}, "spec.prompt.chat.messages[0].role"),
    (
        {
            "prompt": {
                "chat": {
                    "messages": [{"role": "user", "content": "hi"}],
                    "add_generation_prompt": True,
                    "continue_final_message": True,
                }
            }
        },
        "spec.prompt.chat.continue_final_message",
    ),
    (
        {"prompt": {"chat": {"messages": [{"role": "a", "tool_calls": [{"arguments_json": "["}]}]}}},
        "spec.prompt.chat.messages[0].tool_calls[0].arguments_json",
    ),
    ({"sampling": {"temperature": -0.1}}, "spec.sampling.temperature"),
    ({"sampling": {"temperature": NAN}}, "spec.sampling.temperature"),
    ({"sampling": {"temperature": INF}}, "spec.sampling.temperature"),
    ({"sampling": {"top_p": 0.0}}, "spec.sampling.top_p"),
    ({"sampling": {"top_p": 1.01}}, "spec.sampling.top_p"),
    ({"sampling": {"top_k": -1}}, "spec.sampling.top_k"),
    ({"sampling": {"min_p": 1.5}}, "spec.sampling.min_p"),
    ({"sampling": {"typical_p": 0.0}}, "spec.sampling.typical_p"),
    ({"sampling": {"repetition_penalty": 0.0}}, "spec.sampling.repetition_penalty"),
    ({"sampling": {"repetition_penalty": 1e-39}}, "spec.sampling.repetition_penalty"),
    ({"sampling": {"presence_penalty": 2.1}}, "spec.sampling.presence_penalty"),
    ({"sampling": {"frequency_penalty": -NAN}}, "spec.sampling.frequency_penalty"),
    ({"sampling": {"n": 0}}, "spec.sampling.n"),
    ({"sampling": {"n": 17}}, "spec.sampling.n"),
    ({"sampling": {"logit_bias": {5: 101.0}}}, "spec.sampling.logit_bias[5]"),
    ({"sampling": {"logit_bias": {5: NAN}}}, "spec.sampling.logit_bias[5]"),
    ({"sampling": {"logit_bias": {258: 1.0}}}, "spec.sampling.logit_bias"),
    ({"sampling": {"allowed_token_ids": [2**32 - 1]}}, "spec.sampling.allowed_token_ids"),
    ({"sampling": {"allowed_token_ids": range(1025)}}, "spec.sampling.allowed_token_ids"),
    ({"sampling": {"allowed_token_ids": [257]}, "stopping": {"min_tokens": 2}}, "spec.sampling.allowed_token_ids"),
    (
        {"sampling": {"allowed_token_ids": [5, 257]}, "stopping": {"min_tokens": 1, "stop_token_ids": [5]}},
        "spec.sampling.allowed_token_ids",
    ),
    ({"stopping": {"max_tokens": -1}}, "spec.stopping.max_tokens"),
    ({"stopping": {"max_tokens": -(2**31)}}, "spec.stopping.max_tokens"),
    ({"stopping": {"max_tokens": 3, "min_tokens": 4}}, "spec.stopping.min_tokens"),
    ({"stopping": {"min_tokens": 2**31 - 1}}, "spec.stopping.min_tokens"),
    ({"stopping": {"min_tokens": -1}}, "spec.stopping.min_tokens"),
    ({"stopping": {"stop": [""]}}, "spec.stopping.stop[0]"),
    ({"stopping": {"stop": ["a", "é" * 129]}}, "spec.stopping.stop[1]"),
    ({"stopping": {"stop": ["a"] * 17}}, "spec.stopping.stop"),
    ({"stopping": {"stop_token_ids": [258]}}, "spec.stopping.stop_token_ids"),
    ({"stopping": {"stop_token_ids": range(65)}}, "spec.stopping.stop_token_ids"),
    ({"stopping": {"time_limit": {"seconds": 0}}}, "spec.stopping.time_limit"),
    ({"stopping": {"time_limit": {"seconds": -1}}}, "spec.stopping.time_limit"),
    ({"output": {"top_logprobs": 21}}, "spec.output.top_logprobs"),
    ({"output": {"top_logprobs": 2, "logprobs": False}}, "spec.output.top_logprobs"),
    ({"output": {"prompt_logprobs": -1}}, "spec.output.prompt_logprobs"),
    ({"cache": {"salt": "s" * 129}}, "spec.cache.salt"),
    ({"adapter_policy": {"on_cold": 9}}, "spec.adapter_policy.on_cold"),
    ({"adapter_policy": {"max_load_wait": {"nanos": -1}}}, "spec.adapter_policy.max_load_wait"),
    ({"priority": 101}, "spec.priority"),
    ({"client_request_id": "r" * 129}, "spec.client_request_id"),
    ({"labels": {"k" * 64: "v"}}, "spec.labels"),
    ({"labels": {"k": "v" * 257}}, "spec.labels[k]"),
    ({"labels": {str(index): "v" for index in range(17)}}, "spec.labels"),
]


@pytest.mark.parametrize(("fields", "path"), INVALID)
async def test_invalid_field_is_named(plane: DataPlane, fields: Mapping[str, Any], path: str) -> None:
    failed = await both_ways(plane, make_spec(**fields))
    assert (failed.code, failed.reason, failed.fields) == (Code.INVALID_ARGUMENT, "INVALID_PARAMETER", [path])
    assert path in failed.message
    assert not plane.engine.requests


@pytest.mark.parametrize("stream", [{"min_tokens_per_chunk": 0}, {"max_chunk_delay": {"seconds": 11}}])
async def test_invalid_stream_option_is_named(plane: DataPlane, stream: Mapping[str, Any]) -> None:
    failed = await failure(plane.stream(make_spec(stream=stream)))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, [f"spec.stream.{next(iter(stream))}"])


async def test_stream_options_mean_nothing_to_generate(plane: DataPlane) -> None:
    failed = await failure(plane.generate(make_spec(stream={"min_tokens_per_chunk": 2})))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["spec.stream"])


async def test_all_invalid_fields_are_named_at_once(plane: DataPlane) -> None:
    failed = await both_ways(plane, make_spec(sampling={"n": 0, "top_p": 5.0}, priority=1000))
    assert set(failed.fields) == {"spec.sampling.n", "spec.sampling.top_p", "spec.priority"}


async def test_unsupported_field_is_refused_by_name(plane: DataPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "UNSUPPORTED_FIELDS", ("Chat.tools",))
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "f"}]}
    failed = await both_ways(plane, make_spec(prompt={"chat": chat}))
    assert (failed.code, failed.reason) == (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED")
    assert failed.fields == ["spec.prompt.chat.tools"]


@pytest.mark.parametrize(
    ("constraint", "field", "problem"),
    [
        ({}, "", "is empty"),
        ({"choices": {}}, ".choices.values", "is empty"),
        ({"regex": "(?=a)b"}, ".regex", "look-ahead"),
        ({"regex": "a\\"}, ".regex", "escapes nothing"),
        ({"grammar": 'start ::= "a"'}, ".grammar", "No 'root' rule found"),
        ({"grammar": "root ::= a\n" + 'a ::= "a"\n' * 1000}, ".grammar", "1001 rules; at most 1000"),
        ({"json_schema": "{"}, ".json_schema", "not JSON"),
        ({"json_schema": "[]"}, ".json_schema", "must be a JSON object"),
        ({"json_schema": '{"const": NaN}'}, ".json_schema", "not JSON compliant"),
        ({"json_schema": '{"items":' * 70 + "{}" + "}" * 70}, ".json_schema", "nested more than 64 levels"),
        ({"json_schema": '{"x-guidance": {"lenient": true}}'}, ".json_schema", "x-guidance at /"),
        ({"json_schema": '{"properties": {"not": {"not": {}}}}'}, ".json_schema", "not at /properties/not;"),
        ({"json_schema": '{"$ref": "http://localhost/x"}'}, ".json_schema", "http://localhost/x"),
    ],
)
async def test_a_constraint_that_cannot_be_kept_to_is_refused(
    plane: DataPlane, constraint: dict[str, Any], field: str, problem: str
) -> None:
    failed = await both_ways(plane, make_spec(constraint=constraint))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, [f"spec.constraint{field}"])
    assert problem in failed.message


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": '{"type": "object", "properties": {"a": {"$ref": "#"}}}'},
        {"json_object": {}},
        {"regex": "[a-z]+/"},
        {"choices": {"values": ["a/b", '"']}},
        {"grammar": 'root ::= "a" root | "b"'},
    ],
)
async def test_an_engine_is_told_the_form_of_every_output(plane: DataPlane, constraint: dict[str, Any]) -> None:
    await plane.generate(make_spec(constraint=constraint, sampling={"n": 2}))
    first, second = plane.engine.requests
    assert first.grammar == second.grammar != ""


async def test_a_field_of_a_newer_contract_is_refused_not_ignored(plane: DataPlane) -> None:
    newer = make_spec().SerializeToString() + b"\xa2\x06\x01x"  # field 100, a string
    failed = await both_ways(plane, GenerateSpec.FromString(newer))
    assert (failed.code, failed.fields) == (Code.UNIMPLEMENTED, ["spec.100"])


async def test_prompt_that_leaves_no_room_names_tokens_and_limit(plane: DataPlane) -> None:
    failed = await both_ways(plane, make_spec("x" * 128, stopping={}))
    assert (failed.code, failed.reason, failed.fields) == (Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", ["spec.prompt"])
    assert dict(failed.detail(ErrorInfo()).metadata) == {"prompt_tokens": "128", "limit_tokens": "127"}
    assert "128 tokens" in failed.message


async def test_the_longest_prompt_has_room_for_one_token(plane: DataPlane) -> None:
    response = await plane.generate(make_spec("x" * 127, stopping={}))
    assert response.usage.completion_tokens == 1


async def test_prompt_and_output_that_do_not_fit_together(plane: DataPlane) -> None:
    failed = await both_ways(plane, make_spec("x" * 100, stopping={"max_tokens": 29}))
    assert (failed.reason, failed.fields) == ("PROMPT_TOO_LONG", ["spec.stopping.max_tokens"])
    assert "room for 28" in failed.message


async def test_a_chat_that_the_template_refuses_is_the_callers_mistake(plane: DataPlane) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"messages": 1}}
    failed = await both_ways(plane, make_spec(prompt={"chat": chat}))
    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["spec.prompt.chat"])


async def test_numbers_that_are_no_json_in_template_variables_do_no_harm(plane: DataPlane) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "template_kwargs": {"a": NAN, "b": [INF, 1e308, {}]}}
    assert (await plane.generate(make_spec(prompt={"chat": chat}))).usage.completion_tokens == 5


# ---- who, and what ---------------------------------------------------------------------------------------------------


async def test_tenant_that_is_no_tenant_id(plane: DataPlane) -> None:
    failed = await both_ways(plane, make_spec(), metadata=(("loraplex-tenant", "A:b"),))
    assert (failed.code, failed.reason) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")


@pytest.mark.parametrize("name", ["tenants/acme/adapters/x", "tenants/acme/adapters/pirate", "tenants/acme/routes/r"])
async def test_what_belongs_to_others_is_denied_whether_it_exists_or_not(plane: DataPlane, name: str) -> None:
    plane.add_adapter("acme/pirate")
    failed = await both_ways(plane, make_spec(model=name))
    assert (failed.code, failed.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")


@pytest.mark.parametrize(
    ("name", "reason", "kind"),
    [
        ("nothing", "MODEL_NOT_FOUND", "loraplex.v1.Model"),
        ("models/nothing", "MODEL_NOT_FOUND", "loraplex.v1.Model"),
        ("tenants/default/adapters/nothing", "ADAPTER_NOT_FOUND", "loraplex.v1.Adapter"),
        ("pirate@000000000000", "ADAPTER_NOT_FOUND", "loraplex.v1.Adapter"),
        ("tenants/shared/routes/nothing", "ROUTE_NOT_FOUND", "loraplex.v1.Route"),
    ],
)
async def test_not_found_names_the_resource(plane: DataPlane, name: str, reason: str, kind: str) -> None:
    plane.add_adapter()
    failed = await both_ways(plane, make_spec(model=name))
    assert (failed.code, failed.reason) == (Code.NOT_FOUND, reason)
    resource = failed.detail(ResourceInfo())
    assert (resource.resource_type, resource.resource_name.rpartition("/")[2]) == (kind, name.rpartition("/")[2])


async def test_the_models_own_state_reaches_the_caller(plane: DataPlane) -> None:
    for error in (
        FailedPrecondition("MODEL_UNLOADED", "load it first"),
        Unavailable("MODEL_LOADING", "soon", retry_after_seconds=2.5),
        Unavailable("ENGINE_RESTARTING", "soon"),
    ):
        plane.models.problems["demo"] = error
        failed = await both_ways(plane, make_spec())
        assert (failed.code, failed.reason) == (error.code, error.reason)


# ---- adapters --------------------------------------------------------------------------------------------------------


async def test_an_adapter_is_loaded_and_used(plane: DataPlane) -> None:
    version = plane.add_adapter()
    call = plane.stub.StreamGenerate(StreamGenerateRequest(spec=make_spec(model="pirate")))
    events = [event async for event in call]
    assert plane.engine.requests[0].adapter == version.key
    assert version.key in plane.engine.adapters
    assert events[0].started.target.adapter_version == version.version_name
    assert events[0].started.HasField("adapter_load_duration")
    assert dict(await call.trailing_metadata())["loraplex-adapter-version"] == version.version_name


async def test_an_adapter_that_is_still_being_read_is_waited_for(plane: DataPlane) -> None:
    version = plane.add_adapter(active=False)
    plane.engine.loads_allowed = False
    spec = make_spec(model="pirate", adapter_policy={"on_cold": "ON_COLD_FAIL"})
    assert (await both_ways(plane, spec)).reason == "ADAPTER_COLD"
    waiting = asyncio.ensure_future(plane.generate(make_spec(model="pirate")))
    await plane.engine.until(lambda: not plane.admission.idle)
    plane.engine.allow_loads()
    assert (await waiting).target.adapter_version == version.version_name


async def test_an_adapter_that_is_being_deleted_is_not_found(plane: DataPlane) -> None:
    version = plane.add_adapter()
    plane.registry.delete(version.name)
    failed = await both_ways(plane, make_spec(model=version.name))
    assert (failed.code, failed.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_the_callers_own_adapter_comes_before_the_shared_one_and_that_before_a_model(plane: DataPlane) -> None:
    shared = plane.add_adapter("shared/demo", "cd" * 32)
    assert (await plane.generate(make_spec(model="demo"))).target.adapter_version == shared.version_name
    own = plane.add_adapter("default/demo", "ef" * 32)
    assert (await plane.generate(make_spec(model="demo"))).target.adapter_version == own.version_name
    assert (await plane.generate(make_spec(model="models/demo"))).target.adapter_version == ""


async def test_a_version_is_named_by_the_first_digits_of_its_digest(plane: DataPlane) -> None:
    old = plane.add_adapter("shared/pirate", "ab" * 32)
    new = plane.add_adapter("shared/pirate", "cd" * 32)
    for name, version in {
        "pirate": new,
        "pirate@abababababab": old,
        "tenants/shared/adapters/pirate": new,
        "tenants/shared/adapters/pirate@abababababab": old,
    }.items():
        assert (await plane.generate(make_spec(model=name))).target.adapter_version == version.version_name


async def test_an_adapter_deleted_while_the_prompt_was_rendered_is_not_found(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = plane.add_adapter()

    async def render_and_delete(*_: object) -> list[int]:
        plane.registry.delete(version.name)
        return [1]

    monkeypatch.setattr("loraplex_service.requests.prepared.prompt_tokens", render_and_delete)
    failed = await failure(plane.generate(make_spec(model="pirate")))
    assert (failed.code, failed.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_an_adapter_unloaded_in_the_same_moment_is_loaded_again(plane: DataPlane) -> None:
    version = plane.add_adapter()
    plane.engine.loads_allowed = False
    unloading: list[asyncio.Task[None]] = []

    def unload(_: object) -> None:
        unloading.append(asyncio.ensure_future(plane.engine.client.adapters.unload(version.key)))
        gone = AdapterStatus(version.key, 1, Residency.DISK)
        plane.engine.client.deliver(AdaptersChanged([gone]))

    plane.engine.client.adapters.start_loading(version.key, "/adapters/pirate").add_done_callback(unload)
    waiting = asyncio.ensure_future(plane.generate(make_spec(model="pirate")))
    await asyncio.sleep(0)
    plane.engine.allow_loads()
    assert (await waiting).target.adapter_version == version.version_name
    await unloading[0]
    loads = [message for message in plane.engine.received if isinstance(message, WantAdapter) and message.path]
    assert len(loads) == 2


async def test_an_adapter_that_is_there_is_not_waited_for(plane: DataPlane) -> None:
    plane.add_adapter()
    await plane.generate(make_spec(model="pirate"))
    response = await plane.generate(make_spec(model="pirate"))
    assert not response.timings.HasField("adapter_load_duration")


async def test_an_adapter_that_failed_says_why(plane: DataPlane) -> None:
    version = plane.add_adapter(active=False)
    plane.registry.fail(version.key, ["tensor x is NaN"])
    failed = await both_ways(plane, make_spec(model="pirate"))
    assert (failed.code, failed.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_INVALID")
    assert "tensor x is NaN" in failed.message


async def test_an_adapter_that_the_engine_rejects_says_why(plane: DataPlane) -> None:
    version = plane.add_adapter()
    plane.engine.rejected_adapters[version.spec.source] = ["q_proj: wrong shape"]
    failed = await both_ways(plane, make_spec(model="pirate"))
    assert (failed.code, failed.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_INVALID")
    assert "q_proj: wrong shape" in failed.message


async def test_cold_adapter_fails_at_once_if_asked_to_and_is_there_for_the_next_call(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    version = plane.add_adapter()
    spec = make_spec(model="pirate", adapter_policy={"on_cold": "ON_COLD_FAIL"})
    failed = await both_ways(plane, spec)
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, "ADAPTER_COLD")
    plane.engine.allow_loads()
    await plane.engine.until(lambda: version.key in plane.engine.client.adapters.loaded)
    assert (await plane.generate(spec)).target.adapter_version == version.version_name


async def test_cold_adapter_is_waited_for_only_so_long(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    plane.add_adapter()
    spec = make_spec(model="pirate", adapter_policy={"max_load_wait": {"nanos": 10_000_000}})
    assert (await both_ways(plane, spec)).reason == "ADAPTER_COLD"


async def test_cold_adapter_can_be_gone_without(plane: DataPlane) -> None:
    plane.engine.loads_allowed = False
    plane.add_adapter()
    response = await plane.generate(make_spec(model="pirate", adapter_policy={"on_cold": "ON_COLD_USE_BASE"}))
    assert (response.target.fell_back_to_base, response.target.adapter_version) == (True, "")
    assert plane.engine.requests[0].adapter is None


async def test_a_version_in_use_is_counted(plane: DataPlane) -> None:
    version = plane.add_adapter()
    plane.engine.steps_allowed = 0
    running = asyncio.ensure_future(plane.generate(make_spec(model="pirate")))
    await plane.engine.until(lambda: bool(plane.engine.sequences))
    assert plane.registry.get(version.version_name).num_requests == 1
    plane.engine.allow_steps(10)
    await running
    assert plane.registry.get(version.version_name).num_requests == 0


# ---- RESOURCE_EXHAUSTED, UNAVAILABLE, INTERNAL -----------------------------------------------------------------------


async def test_too_much_at_once_is_overloaded_and_says_when_to_come_again(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, AdmissionLimits(sequences=0.5, retry_after_seconds=2.5)) as plane:
        plane.engine.steps_allowed = 0
        running = [asyncio.ensure_future(plane.generate(make_spec())) for _ in range(2)]
        await plane.engine.until(lambda: len(plane.engine.sequences) == 2)
        failed = await both_ways(plane, make_spec())
        assert (failed.code, failed.reason) == (Code.UNAVAILABLE, "OVERLOADED")
        assert failed.detail(RetryInfo()).retry_delay.ToMilliseconds() == 2500
        assert failed.metadata["grpc-retry-pushback-ms"] == "2500"
        plane.engine.allow_steps(100)
        await asyncio.gather(*running)
        assert (await plane.generate(make_spec())).usage.completion_tokens == 5


async def test_the_cache_bounds_what_is_admitted(byte_tokenizer: Tokenizer) -> None:
    async with data_plane(byte_tokenizer, AdmissionLimits(sequences=100, cache_tokens=0.1)) as plane:  # 102 tokens
        plane.engine.steps_allowed = 0
        running = asyncio.ensure_future(plane.generate(make_spec("x" * 60)))
        await plane.engine.until(lambda: bool(plane.engine.sequences))
        assert (await both_ways(plane, make_spec("x" * 60))).reason == "OVERLOADED"
        plane.engine.allow_steps(100)
        await running


async def test_an_engine_that_dies_ends_its_streams_with_what_they_used(plane: DataPlane) -> None:
    plane.engine.steps_allowed = 2
    running = asyncio.ensure_future(failure(plane.stream(make_spec())))
    await plane.engine.until(lambda: plane.engine.steps_allowed == 0)
    plane.engine.client.fail(Unavailable("ENGINE_RESTARTING", "the engine ended; it is starting again"))
    failed = await running
    assert (failed.code, failed.reason) == (Code.UNAVAILABLE, "ENGINE_RESTARTING")
    assert failed.has_detail(RetryInfo)
    later = await both_ways(plane, make_spec())
    assert later.reason == "ENGINE_RESTARTING"
    assert not later.has_detail(PartialUsage)


async def test_a_request_that_fails_in_the_engine_fails_alone(plane: DataPlane) -> None:
    plane.engine.errors.append("logits are NaN")
    failed = await failure(plane.stream(make_spec()))
    assert (failed.code, failed.reason) == (Code.INTERNAL, "ENGINE_ERROR")
    assert failed.detail(RequestInfo()).request_id == failed.metadata["loraplex-request-id"]
    assert (await plane.generate(make_spec())).outputs[0].text == "abcab"


def with_head(plane: DataPlane, vocab_size: int) -> None:
    """Give the model a head of another size than its tokenizer, which has 258 ids."""
    model = plane.models.models["demo"]
    limits = msgspec.structs.replace(model.limits, vocab_size=vocab_size)
    plane.models.models["demo"] = dataclasses.replace(model, limits=limits)


async def test_a_token_that_the_tokenizer_has_and_the_model_lacks_is_named(plane: DataPlane) -> None:
    with_head(plane, 257)
    failed = await failure(plane.generate(make_spec(prompt={"text": "a<eos>"})))
    assert (failed.reason, failed.fields) == ("INVALID_PARAMETER", ["spec.prompt.text"])
    assert "holds '<eos>', token 257 of the tokenizer; the model has 257 tokens" in failed.message


async def test_what_pads_the_head_beyond_the_tokenizer_is_never_drawn(plane: DataPlane) -> None:
    with_head(plane, 320)
    await plane.generate(make_spec())
    assert plane.engine.requests[0].sampling.num_token_ids == 258
    failed = await failure(plane.generate(make_spec(sampling={"allowed_token_ids": [258, 319]})))
    assert failed.fields == ["spec.sampling.allowed_token_ids"]


async def test_a_head_as_large_as_the_tokenizer_needs_no_mask(plane: DataPlane) -> None:
    await plane.generate(make_spec())
    assert plane.engine.requests[0].sampling.num_token_ids is None


async def test_an_error_of_the_engine_names_the_model(plane: DataPlane) -> None:
    plane.engine.errors.append("its logits are not finite numbers")
    failed = await failure(plane.stream(make_spec()))
    assert failed.message.endswith(" to models/demo: its logits are not finite numbers")


async def test_an_error_of_the_engine_names_the_adapter(plane: DataPlane) -> None:
    plane.engine.errors.append("its logits are not finite numbers")
    version = plane.add_adapter()
    failed = await failure(plane.stream(make_spec(model="pirate")))
    assert failed.message.endswith(f" to models/demo with {version.version_name}: its logits are not finite numbers")


async def test_a_fault_of_the_service_is_internal_and_shows_no_secret(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("password")

    monkeypatch.setattr("loraplex_service.requests.prepared.prompt_tokens", broken)
    failed = await failure(plane.stream(make_spec()))
    assert (failed.code, failed.reason) == (Code.INTERNAL, "ENGINE_ERROR")
    assert failed.detail(RequestInfo()).request_id == failed.metadata["loraplex-request-id"]
    assert "password" not in failed.message
    [record] = plane.errors.records
    assert record.exc_info is not None
    assert failed.detail(RequestInfo()).request_id in record.getMessage()
    plane.errors.records.clear()


# ---- the map itself --------------------------------------------------------------------------------------------------

HUGE = "päth\n%" * 5000
ERRORS: list[LoraplexError] = [
    InvalidRequest(*(Violation(HUGE, HUGE) for _ in range(100))),
    PromptTooLong(HUGE, HUGE, 10**9, 10**9),
    FeatureUnsupported(HUGE),
    Unauthenticated(HUGE),
    PermissionDenied(HUGE, "SOURCE_NOT_ALLOWED"),
    NotFound("ADAPTER_NOT_FOUND", HUGE, HUGE),
    FailedPrecondition("ADAPTER_INVALID", HUGE),
    AlreadyExists("ADAPTER", HUGE, HUGE),
    Aborted(HUGE),
    QuotaExceeded(HUGE, HUGE, 1.0),
    SlowConsumer(HUGE),
    Unavailable("OVERLOADED", HUGE),
    DeadlineExceeded(HUGE),
    EngineError(HUGE),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_status_is_small_and_has_error_info_whatever_it_quotes(error: LoraplexError) -> None:
    status = to_status(error, "id")
    assert status.ByteSize() < MAX_STATUS_BYTES
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert f"ERROR_REASON_{info.reason}" in ErrorReason.keys()  # noqa: SIM118 - an enum wrapper has no `in`
    assert len(status.details) >= len(error.details())


def test_details_that_are_too_much_are_left_out_and_error_info_stays() -> None:
    class TalkativeError(LoraplexError):
        def details(self) -> list[Message]:
            return [ResourceInfo(description="x" * MAX_STATUS_BYTES)]

    status = to_status(TalkativeError("ENGINE_ERROR", "what happened"), "id")
    assert status.message == "what happened"
    assert [detail.TypeName() for detail in status.details] == [ErrorInfo.DESCRIPTOR.full_name]
