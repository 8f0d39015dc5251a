"""What a message holds is counted while it is bytes, and what has too much of it never becomes objects."""

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.v1 import inference_pb2
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import BatchGenerateRequest, GenerateRequest
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, TokenIds
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.ports import wire
from loraplex_service.ports.wire import MAX_DEPTH, MAX_FIELDS, MAX_NUMBERS, MAX_UNKNOWN_BYTES, SMALL_BYTES, check_wire
from tests.service.requests.test_spec_fuzz import message_of

EMPTY_SPEC = b"\x0a\x00"
REQUESTS = inference_pb2.DESCRIPTOR.message_types_by_name
KINDS = [REQUESTS[kind] for kind in ("GenerateRequest", "BatchGenerateRequest", "CancelGenerationRequest")]


def spec_of(prompt: Prompt) -> GenerateRequest:
    return GenerateRequest(spec=GenerateSpec(model="m" * SMALL_BYTES, prompt=prompt))


def test_a_message_with_too_many_fields_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"more than {MAX_FIELDS} fields"):
        check_wire(EMPTY_SPEC * (MAX_FIELDS + 1), BatchGenerateRequest.DESCRIPTOR)


def test_fields_of_messages_in_messages_count() -> None:
    nested = Prompt(chat=Chat(messages=[ChatMessage(role="u")] * (MAX_FIELDS // 2)))
    with pytest.raises(InvalidRequest, match="fields in all"):
        check_wire(spec_of(nested).SerializeToString(), GenerateRequest.DESCRIPTOR)


def test_fields_that_nobody_knows_count() -> None:
    unknown = b"\x78\x01"  # field 15
    with pytest.raises(InvalidRequest, match="fields in all"):
        check_wire(unknown * (MAX_FIELDS + 1), BatchGenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize(
    "unknown",
    [b"\xf8\x7f" + b"\xff" * 8 + b"\x01", b"\xfa\x7f\x09" + b"x" * 9, b"\x08" + b"\xff" * 8 + b"\x01"],
    ids=["number", "text", "number where messages are"],
)
def test_a_message_of_nothing_but_unknown_fields_is_refused_without_looking_at_each(unknown: bytes) -> None:
    allowed = MAX_UNKNOWN_BYTES // len(unknown)
    check_wire(unknown * allowed, BatchGenerateRequest.DESCRIPTOR)
    with pytest.raises(FeatureUnsupported, match="request: is a field"):
        check_wire(unknown * (allowed + 1), BatchGenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize("last", [127, 70_000])
def test_packed_numbers_are_counted_one_by_one(last: int) -> None:
    ids = [1] * (MAX_NUMBERS - 1)
    check_wire(spec_of(Prompt(token_ids=TokenIds(ids=[*ids, last]))).SerializeToString(), GenerateRequest.DESCRIPTOR)
    with pytest.raises(InvalidRequest, match="numbers in all"):
        check_wire(
            spec_of(Prompt(token_ids=TokenIds(ids=[*ids, last, last]))).SerializeToString(), GenerateRequest.DESCRIPTOR
        )


def test_messages_may_lie_so_deep_and_no_deeper() -> None:
    def nested(depth: int) -> bytes:
        value = b"\x1a" + varint(SMALL_BYTES) + b"x" * SMALL_BYTES  # Value.string_value
        for _ in range(depth):
            value = b"\x32" + varint(len(value) + 1 + len(varint(len(value)))) + b"\x0a" + varint(len(value)) + value
        return value

    check_wire(nested(MAX_DEPTH // 2), Value.DESCRIPTOR)
    with pytest.raises(InvalidRequest, match="deep"):
        check_wire(nested(MAX_DEPTH), Value.DESCRIPTOR)


def varint(value: int) -> bytes:
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05abc", b"\x0b\x0c", b"\x0f", b"\xff" * 11, b"\x0a" + b"\xff" * 11, b"\x0a\x06\x0a\x7fabcd"],
    ids=["ends early", "group", "wire type 7", "long tag", "long length", "field behind its message"],
)
def test_bytes_that_are_no_message_are_none(data: bytes) -> None:
    padding = b"\x12" + varint(SMALL_BYTES) + b"x" * SMALL_BYTES
    with pytest.raises(DecodeError):
        check_wire(padding + data, BatchGenerateRequest.DESCRIPTOR)


def test_what_is_small_is_not_looked_at() -> None:
    check_wire(b"\xff" * SMALL_BYTES, BatchGenerateRequest.DESCRIPTOR)


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_protobuf_writes_is_always_read(data: st.DataObject, kind: Descriptor) -> None:
    message = GetMessageClass(kind)()
    message.MergeFrom(data.draw(message_of(kind)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "SMALL_BYTES", -1)
        patch.setattr(wire, "MAX_UNKNOWN_BYTES", 0)  # nothing of it is taken for unknown
        check_wire(message.SerializeToString(), kind)
