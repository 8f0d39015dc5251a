"""A valid request of every method with one field changed: the answer blames that field, or the state, never the server.

What is not valid whatever a server knows (a number that is none, a name that is none, a time below zero, an unknown
enumerator) must be INVALID_ARGUMENT; a name of nothing, NOT_FOUND; and a violation names the field that was changed.
"""

import asyncio
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1.routes_pb2 import Route
from tests.e2e.conftest import Server
from tests.e2e.valid_requests import DOOMED, DOOMED_ROUTE, ROUTE, TARGETS, methods, valid_requests
from tests.service.requests.test_spec_fuzz import KINDS

EXAMPLES = 2  # values of each field
SECONDS = 20.0  # nothing here waits for what never comes
Path = tuple[FieldDescriptor, ...]

INVALID = {"INVALID_ARGUMENT", "UNIMPLEMENTED"}  # the second where no value of the field is supported
OF_THE_CALLER = INVALID | {"OK", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "ABORTED"}
MALFORMED = ["..", "../etc", "a b", "tenants/", "models/", "tenants/a/b/c/d", "\0", "é", "x" * 300, "models/../x"]
# Fields of resources that the method reads; it passes over the others, which the server alone writes.
READ = {
    "CreateAdapter": {"base_model", "source", "digest", "pinned", "labels"},
    "UploadAdapter": {"base_model", "source", "digest", "pinned", "labels"},
    "UpdateAdapter": {"name", "labels", "etag"},
    "UpdateRoute": {"name", "targets", "fallback", "default_sampling", "labels", "etag"},
}
# Where the name of nothing is not NOT_FOUND: a list of what it has is empty, and a route may not lead there.
FOUND_NOTHING = {
    "ListAdaptersRequest.parent": {"OK"},
    "ListAdaptersRequest.base_model": {"OK"},
    "WatchAdaptersRequest.parent": {"OK"},
    "WatchAdaptersRequest.base_model": {"OK"},
    "CreateAdapterRequest.parent": {"OK"},
    "ListRoutesRequest.parent": {"OK"},
    "ResolveTargetRequest.parent": {"OK", "NOT_FOUND"},
    "RouteTarget.model": {"INVALID_ARGUMENT"},
}
# What is required beside a field, where the valid request has nothing there.
BESIDE: dict[str, dict[str, Any]] = {
    "beam_search": {"num_beams": 2},
    "watermark": {"key": b"k" * 16},
    "messages": {"role": "user", "content": "A fox"},
    "tools": {"name": "f"},
    "tool_calls": {"id": "1", "name": "f", "arguments_json": "{}"},
}


class Change(NamedTuple):
    """A value for a field, and the codes that are right then."""

    value: Any
    codes: set[str] = OF_THE_CALLER


def leaves(descriptor: Descriptor, before: Path = ()) -> Iterator[Path]:
    """All fields that hold no message of ours, in whatever depth."""
    for field in descriptor.fields:
        kind = field.message_type
        if kind is None or kind.GetOptions().map_entry or kind.file.package.startswith("google."):
            yield (*before, field)
        else:
            yield from leaves(kind, (*before, field))


def is_read(method: MethodDescriptor, path: Path) -> bool:
    resource = next((path[index + 1] for index, field in enumerate(path) if field.name in ("adapter", "route")), None)
    return resource is None or resource.name in READ[method.name]


def changes(path: Path, valid: Any) -> st.SearchStrategy[Change]:
    leaf = path[-1]
    if leaf.message_type is not None and leaf.message_type.GetOptions().map_entry:
        return map_changes(*leaf.message_type.fields)
    if leaf.message_type is not None:
        return st.sampled_from(WELL_KNOWN[leaf.message_type.full_name])
    if leaf.is_repeated:
        return st.lists(KINDS[leaf.type], max_size=3).map(Change)
    if leaf.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return KINDS[leaf.type].map(lambda value: Change(value, OF_THE_CALLER if math.isfinite(value) else INVALID))
    if leaf.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from([Change(99, INVALID), Change(-1, INVALID), Change(0), Change(1)])
    if is_name(path):
        absent = f"{valid.rpartition('/')[0] or 'models'}/nothing"
        found = FOUND_NOTHING.get(f"{owner_of(leaf)}.{leaf.name}", {"NOT_FOUND"})
        return st.sampled_from(MALFORMED).map(lambda name: Change(name, INVALID)) | st.just(Change(absent, found))
    return KINDS[leaf.type].map(Change)


def map_changes(key: FieldDescriptor, value: FieldDescriptor) -> st.SearchStrategy[Change]:
    many = dict.fromkeys(map(str if key.type == FieldDescriptor.TYPE_STRING else int, range(2000)), value.default_value)
    few = st.dictionaries(KINDS[key.type], KINDS[value.type], min_size=1, max_size=2)
    return few.map(Change) | st.just(Change(many, INVALID))


WELL_KNOWN = {
    "google.protobuf.Duration": [
        Change(Duration(seconds=-1), INVALID),
        Change(Duration(nanos=-1), INVALID),
        Change(Duration(seconds=-(2**63)), INVALID),
        Change(Duration(seconds=2**63 - 1)),
        Change(Duration(nanos=2**31 - 1)),
    ],
    "google.protobuf.FieldMask": [
        *(
            Change(FieldMask(paths=[path]), INVALID)
            for path in ("", "nothing", "labels.a", "*", "name", "\0", "x" * 300)
        ),
        Change(FieldMask(paths=["labels"] * 1000)),
    ],
    "google.protobuf.Timestamp": [Change(Timestamp(seconds=-(2**63), nanos=-1))],
    "google.rpc.Status": [Change(Status(code=-1, message="x"))],
    "google.protobuf.Struct": [Change(Struct()), Change(Struct(fields={"a": Value(number_value=math.nan)}))],
}


def owner_of(field: FieldDescriptor) -> str:
    """The name of the message that has this field."""
    return field.full_name.split(".")[-2]


def is_name(path: Path) -> bool:
    """Whether the field names a resource."""
    leaf = path[-1]
    return leaf.name in ("parent", "base_model", "model") or (
        leaf.name == "name" and owner_of(leaf) not in ("UploadFile", "ChatMessage", "Tool", "ToolCall", "ToolChoice")
    )


def changed(message: Message, path: Path, value: Any) -> None:
    """Put the value there; what is around it comes to be."""
    *around, leaf = path
    for field in around:
        inner = getattr(message, field.name)
        if field.name == "chat" and not inner.messages:
            inner.messages.add(**BESIDE["messages"])
        if field.name in BESIDE and not field.is_repeated:
            inner.MergeFrom(type(inner)(**BESIDE[field.name]))
        message = (inner[0] if len(inner) else inner.add(**BESIDE.get(field.name, {}))) if field.is_repeated else inner
        message.SetInParent()
    if leaf.is_repeated:
        message.ClearField(leaf.name)
        inner = getattr(message, leaf.name)
        (inner.update if isinstance(value, dict) else inner.extend)(value)
    elif isinstance(value, Message):
        getattr(message, leaf.name).CopyFrom(value)
    else:
        setattr(message, leaf.name, value)


def valid_value(message: Message, path: Path) -> Any:
    for field in path:
        inner = getattr(message, field.name)
        if field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            inner = inner[0] if len(inner) else GetMessageClass(field.message_type)()
        message = inner
    return message


async def answer(server: Server, method: MethodDescriptor, on_data: bool, requests: Sequence[Message]) -> Status:
    """With which status a call ends; that of its item for a batch."""
    raw = [request.SerializeToString() for request in requests]
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        return await asyncio.to_thread(_answer_to_stream, server.data if on_data else server.admin, path, raw)
    async with grpc.aio.insecure_channel(server.data if on_data else server.admin) as channel:
        kinds: dict[bool, Any] = {
            False: channel.unary_unary,
            True: channel.unary_stream,
        }
        call = kinds[method.server_streaming](path)(raw[0], timeout=SECONDS)
        try:
            if method.name == "BatchGenerate":
                await call.read()  # the ids of its items
            response = await (call.read() if method.server_streaming else call)
        except grpc.aio.AioRpcError as error:
            return _status(error)
        call.cancel()
    item = GetMessageClass(method.output_type).FromString(response or b"")
    return item.error if method.name == "BatchGenerate" else Status()  # type: ignore[attr-defined]


def _answer_to_stream(address: str, path: str, raw: Sequence[bytes]) -> Status:
    """In a thread: where a write meets a call that the server has just ended, grpc.aio says INTERNAL, and not what the
    server said."""
    with grpc.insecure_channel(address) as channel:
        try:
            call: Any = channel.stream_unary(path)
            call(iter(raw), timeout=SECONDS)
        except grpc.RpcError as error:
            return _status(error)
    return Status()


def _status(error: Any) -> Status:
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    return Status.FromString(details) if details else Status(code=error.code().value[0], message="bare")


def name_of(status: Status) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == status.code)


def check(status: Status, change: Change, path: Path) -> None:
    where, code = ".".join(field.name for field in path), name_of(status)
    said = f"{where} = {str(change.value)[:80]!r}: {code} {status.message[:300]}"
    assert code in change.codes, said
    if code == "OK":
        return
    info, bad = ErrorInfo(), BadRequest()
    for detail in status.details:
        detail.Unpack(info)  # of those that it is
        detail.Unpack(bad)
    assert info.domain == "loraplex", said
    violations = [re.sub(r"\[.*?\]", "", violation.field) for violation in bad.field_violations]
    assert not violations or any(is_about(field, where) for field in violations), f"{said} is blamed on {violations}"


def is_about(field: str, where: str) -> bool:
    """Whether the field at fault is the one that was changed, one around it, or one in it."""
    if {field, where} <= {"chunk", "file.size_bytes", "file.name"}:
        return True  # of a file and what is said of it, either may be wrong
    return where.startswith(field) or where.endswith(field) or field.startswith(where) or f".{field}." in f".{where}."


async def prepare(admin: AsyncAdminClient, method: MethodDescriptor) -> None:
    """What the method takes away must be there."""
    if method.name == "DeleteAdapter":
        await admin.create_adapter(DOOMED, base_model="storyteller", source="pirate", wait=SECONDS)
    if method.name in ("Classify", "Rerank"):
        await admin.create_adapter("judge", base_model="storyteller", source="judge", wait=SECONDS)
    if method.name == "DeleteRoute":
        await admin.update_route(Route(name=DOOMED_ROUTE, targets=TARGETS), allow_missing=True)  # type: ignore[arg-type]
    if method.name in ("GetRoute", "UpdateRoute"):
        await admin.update_route(Route(name=ROUTE, targets=TARGETS), allow_missing=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "on_data"), list(methods()), ids=lambda value: getattr(value, "name", ""))
@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
async def test_one_wrong_field_is_what_is_blamed(
    server: Server,
    client: AsyncClient,
    admin: AsyncAdminClient,
    data: st.DataObject,
    method: MethodDescriptor,
    on_data: bool,
) -> None:
    """Each example changes every field once, one after another."""
    engines = server.engine_pids()
    await prepare(admin, method)
    status = await answer(server, method, on_data, valid_requests(method))
    assert status.code == 0, status.message
    for number, valid in enumerate(valid_requests(method)):
        for path in leaves(method.input_type):
            if method.client_streaming and not valid.HasField(path[0].name):
                continue  # each message of an upload is something else
            await prepare(admin, method)
            requests = list(valid_requests(method))
            change = data.draw(changes(path, valid_value(valid, path)))
            changed(requests[number], path, change.value)
            if not is_read(method, path):
                change = Change(change.value)
            check(await answer(server, method, on_data, requests), change, path)
    assert server.process.poll() is None
    assert server.engine_pids() == engines
