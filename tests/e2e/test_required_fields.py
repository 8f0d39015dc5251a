"""What the contract marks as required is: without it a valid request of any method is refused, by the field's name."""

from collections.abc import Iterator

import pytest
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest

from loraplex import AsyncAdminClient
from tests.e2e.conftest import Server
from tests.e2e.test_one_wrong_field import answer, name_of, prepare
from tests.e2e.valid_requests import methods, valid_requests

REQUIRED = FieldBehavior.Value("REQUIRED")


def required(message: Message, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the required fields that it has; of a list, of its first message."""
    for field, value in message.ListFields():
        if REQUIRED in field.GetOptions().Extensions[field_behavior]:
            yield (*path, field.name)
        is_list = field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry
        inner = value[0] if is_list else value
        if isinstance(inner, Message) and inner.DESCRIPTOR.full_name.startswith("loraplex."):
            yield from required(inner, (*path, field.name))


def clear(message: Message, path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        inner = getattr(message, name)
        message = inner if isinstance(inner, Message) else inner[0]
    message.ClearField(path[-1])


@pytest.mark.parametrize(("method", "on_data"), list(methods()), ids=lambda value: getattr(value, "name", ""))
async def test_a_request_without_a_required_field_is_refused_by_its_name(
    server: Server, admin: AsyncAdminClient, method: MethodDescriptor, on_data: bool
) -> None:
    for number, valid in enumerate(valid_requests(method)):
        for path in required(valid):
            await prepare(admin, method)
            requests = list(valid_requests(method))
            clear(requests[number], path)
            status = await answer(server, method, on_data, requests)
            assert name_of(status) == "INVALID_ARGUMENT", (path, status.message)
            found = BadRequest()
            [packed] = [detail for detail in status.details if detail.TypeName() == BadRequest.DESCRIPTOR.full_name]
            packed.Unpack(found)
            assert path[-1] in found.field_violations[0].field, (path, status.message)
