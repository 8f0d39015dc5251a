"""What holds for all dialects: methods have rules, fields limits or reasons, and no name is in others' way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex_service.auth.access import PUBLIC, RULES
from loraplex_service.auth.config import AuthConfig
from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role
from loraplex_service.dialect_stubs.pool import service_of
from loraplex_service.dialects.services import BY_NAME
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.ports.config import DIALECTS
from loraplex_service.ports.receiving import ReceiveLimits
from loraplex_service.validation import dialects, limits
from loraplex_service.validation.checks import check_request
from loraplex_service.validation.limits import Entries, Text
from tests.service.control_plane import control_plane

SERVICES = (
    "inference.GRPCInferenceService",
    "vllm.Inference",
    "vllm.Control",
    "vllm.grpc.engine.VllmEngine",
    "openengine.v1.Inference",
    "openengine.v1.Control",
)
TABLE = {**limits.LIMITS, **dialects.LIMITS}
OF_SIZE = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    for name in SERVICES:
        for method in service_of(name).methods:
            yield f"/{name}/{method.name}", method


def request_fields() -> dict[str, FieldDescriptor]:
    """Every field of a request, but for what is in fields that are refused, and the entries of maps."""
    found: dict[str, FieldDescriptor] = {}
    waiting: list[Descriptor] = [method.input_type for _, method in methods()]
    seen = set[Descriptor]()
    while waiting:
        message = waiting.pop()
        if message in seen:
            continue
        seen.add(message)
        for field in message.fields:
            name = f"{dialects.kind_of(message)}.{field.name}"
            if not message.GetOptions().map_entry:
                found[name] = field
            if field.message_type is not None and name not in dialects.REFUSED:
                waiting.append(field.message_type)
    return found


FIELDS = request_fields()
PATHS = dict(methods())


def test_the_configuration_knows_the_dialects_that_there_are() -> None:
    assert tuple(BY_NAME) == DIALECTS


def test_every_method_has_a_rule() -> None:
    others = ("/loraplex.", "/grpc.")
    assert {path for path in RULES if not path.startswith(others)} == set(PATHS)


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_can_grow_has_a_limit_or_is_refused(name: str) -> None:
    field = FIELDS[name]
    if name in dialects.REFUSED:
        assert name not in TABLE
    elif field.is_repeated:
        limit = TABLE[name]
        assert isinstance(limit, Entries)
        kind = field.message_type
        is_map = kind is not None and kind.GetOptions().map_entry
        item = kind.fields_by_name["value"] if is_map and kind is not None else field
        assert (limit.keys is not None) == (is_map and kind.fields_by_name["key"].type in OF_SIZE)  # type: ignore[union-attr]
        assert item.type not in OF_SIZE or isinstance(limit.of, Text)
    elif field.type in OF_SIZE:
        assert isinstance(TABLE[name], Text)


def test_the_table_is_about_fields_that_there_are() -> None:
    assert dialects.LIMITS.keys() | dialects.REFUSED.keys() <= FIELDS.keys()


def set_to(field: FieldDescriptor, value: Any) -> Any:
    assert field.containing_type is not None
    message: Any = GetMessageClass(field.containing_type)()
    if field.is_repeated:
        getattr(message, field.name).extend([value])
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, value)
    return message


@pytest.mark.parametrize("name", dialects.REFUSED)
def test_a_field_that_is_refused_is_named(name: str) -> None:
    field = FIELDS[name]
    kinds: dict[int, Any] = {FieldDescriptor.CPPTYPE_STRING: "x", FieldDescriptor.CPPTYPE_BOOL: True}
    value = b"x" if field.type == FieldDescriptor.TYPE_BYTES else kinds.get(field.cpp_type, 1)
    with pytest.raises(FeatureUnsupported) as refused:
        check_request(set_to(field, value))
    assert refused.value.violation.field == field.name
    assert len(dialects.REFUSED[name]) > 10


@pytest.mark.parametrize("name", [name for name, limit in dialects.LIMITS.items() if isinstance(limit, Text)])
def test_a_longer_text_than_may_be_is_refused(name: str) -> None:
    limit, field = dialects.LIMITS[name], FIELDS[name]
    assert isinstance(limit, Text)
    text = "x" * (limit.most + 1)
    with pytest.raises(InvalidRequest, match=f"{field.name}: has {limit.most + 1}"):
        check_request(set_to(field, text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text))


@pytest.mark.parametrize("name", SERVICES)
def test_no_name_of_a_dialect_is_in_the_pool_that_all_share(name: str) -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindServiceByName(name)


@pytest.mark.parametrize("name", [path for path in PATHS if path.endswith(("Infer", "Generate", "GenerateStream"))])
def test_a_prompt_may_be_as_large_as_in_the_contract(name: str) -> None:
    assert ReceiveLimits().bytes_of(name) == ReceiveLimits().bytes_of("/loraplex.v1.InferenceService/Generate")


async def test_reflection_describes_what_is_spoken(channel: Any) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    asked += [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES]
    listed, *described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    assert {each.name for each in listed.list_services_response.service} >= set(SERVICES)
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in described)


async def codes(address: str, token: str | None) -> dict[str, str]:
    """How each method answers an empty request of this caller."""
    found = {}
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(address) as channel:
        for path, method in methods():
            request = GetMessageClass(method.input_type)()
            kinds: dict[tuple[bool, bool], Callable[..., Any]] = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, True): channel.stream_stream,
            }
            start = kinds[method.client_streaming, method.server_streaming](
                path, type(request).SerializeToString, GetMessageClass(method.output_type).FromString
            )
            # A stream of requests has none: a call that is refused may end before one is written.
            call = start(iter(()) if method.client_streaming else request, metadata=metadata)
            found[path] = "OK"
            try:
                await (call.read() if method.server_streaming else call)
            except grpc.aio.AioRpcError as error:
                found[path] = error.code().name
            call.cancel()
    return found


async def test_credentials_and_roles_count_as_they_do_in_the_contract(
    byte_tokenizer_directory: Path, tmp_path: Path
) -> None:
    token, key = make_key("acme", [Role.INFERENCE], None)
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(key,)))
    auth = AuthConfig(keys=str(tmp_path / "keys.yaml"))
    async with control_plane(byte_tokenizer_directory, tmp_path, dialects=DIALECTS, auth=auth) as control:
        strangers = await codes(control.addresses.data, None)
        callers = await codes(control.addresses.data, token)
    public = {path for path in PATHS if RULES[path] is PUBLIC}
    assert {path for path, code in strangers.items() if code != "UNAUTHENTICATED"} == public
    refused = {path for path, code in callers.items() if code == "PERMISSION_DENIED"}
    assert refused == {path for path in PATHS if RULES[path].role is Role.ADMIN}


async def test_nothing_is_spoken_that_is_not_switched_on(byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    async with control_plane(byte_tokenizer_directory, tmp_path) as control:
        assert set((await codes(control.addresses.data, None)).values()) == {"UNIMPLEMENTED"}
