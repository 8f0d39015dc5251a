"""Whatever a spec says, the answer is a generation or the caller's mistake: never INTERNAL, and the engine goes on."""

from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_engine.link.messages import AddRequest
from tests.service.data_plane import DataPlane, make_spec
from tests.service.fake_engine import LIMITS

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
}
FLOATS = [0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
INTEGERS = [0, 1, 2, 5, 16, 20, 100, 128, 257, 258]
NAMES = [
    "",
    "demo",
    "models/demo",
    "models/x",
    "pirate@abababababab",
    "tenants/a/adapters/b",
    "tenants/shared/routes/r",
    "tenants/shared/adapters/nothing",
    "tenants/shared",
    "tenants/-",
    "../etc",
]

KINDS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from(FLOATS),
    FieldDescriptor.TYPE_FLOAT: st.sampled_from([value for value in FLOATS if abs(value) != 1e308]),
    FieldDescriptor.TYPE_INT32: st.sampled_from([*INTEGERS, -1, 2**31 - 1, -(2**31)]),
    FieldDescriptor.TYPE_INT64: st.sampled_from([*INTEGERS, -1, 2**63 - 1, -(2**63)]),
    FieldDescriptor.TYPE_UINT32: st.sampled_from([*INTEGERS, 2**32 - 1]),
    FieldDescriptor.TYPE_UINT64: st.sampled_from([*INTEGERS, 2**64 - 1]),
    FieldDescriptor.TYPE_ENUM: st.sampled_from([0, 1, 2, 3, 99, -1]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.text(max_size=20) | st.sampled_from([*NAMES, "x" * 300, "{}", "[", "user"]),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
}


def value_of(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return message_of(field.message_type, depth + 1)
    return KINDS[field.type]


@st.composite
def message_of(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Message:
    """Any message: a few of its fields, with any values."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if field.message_type is None or depth < 6]
    for field in (
        draw(st.lists(st.sampled_from(fields), max_size=3, unique_by=lambda field: field.name)) if fields else []
    ):
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            entries = getattr(message, field.name)
            for name in draw(st.lists(value_of(key, depth), max_size=2)):
                drawn = draw(value_of(value, depth))
                if isinstance(drawn, Message):
                    entries[name].CopyFrom(drawn)
                else:
                    entries[name] = drawn
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(value_of(field, depth), max_size=3)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(value_of(field, depth)))
        else:
            setattr(message, field.name, draw(value_of(field, depth)))
    return message


@given(fuzz=message_of(GenerateSpec.DESCRIPTOR), from_valid=st.booleans(), streaming=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_spec_is_answered(plane: DataPlane, fuzz: Message, from_valid: bool, streaming: bool) -> None:
    spec = make_spec() if from_valid else GenerateSpec()
    spec.MergeFrom(fuzz)  # type: ignore[arg-type]
    plane.engine.requests.clear()
    code = await outcome(plane, spec, streaming)
    event(code.name)
    assert code in EXPECTED
    for request in plane.engine.requests:
        check_request(request)
    assert not plane.engine.sequences


async def outcome(plane: DataPlane, spec: GenerateSpec, streaming: bool) -> grpc.StatusCode:
    try:
        if streaming:
            assert (await plane.stream(spec))[-1].HasField("completed")
        else:
            await plane.generate(spec)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def check_request(request: AddRequest) -> None:
    """What reaches the engine is within the limits, whatever the caller said."""
    sampling = request.sampling
    assert len(request.prompt_token_ids) >= 1
    assert len(request.prompt_token_ids) + sampling.max_tokens <= LIMITS.max_model_len
    assert 0 <= sampling.min_tokens <= sampling.max_tokens
    assert 0 <= sampling.temperature <= 10
    assert 0 < sampling.top_p <= 1
    assert 0 <= (sampling.num_logprobs or 0) <= 20
    ids = [*request.prompt_token_ids, *sampling.logit_bias, *sampling.stop_token_ids]
    assert all(0 <= token_id < LIMITS.vocab_size for token_id in [*ids, *(sampling.allowed_token_ids or ())])
