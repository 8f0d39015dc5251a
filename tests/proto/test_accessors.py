"""No two fields of a message become one name in a language that callers use."""

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

from tests.proto.accessors import LANGUAGES, collisions, messages, package_collisions
from tests.proto.contract import FILES


def made(**fields: str) -> Descriptor:
    """The message `Thing` with these fields, each a text, a list of numbers or another Thing."""
    file = FileDescriptorProto(name="thing.proto", package="thing", syntax="proto3")
    message = file.message_type.add(name="Thing")
    for number, (name, kind) in enumerate(fields.items(), 1):
        field = message.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
        if kind == "text":
            field.type = FieldDescriptorProto.TYPE_STRING
        elif kind == "message":
            field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, ".thing.Thing"
        else:
            field.type, field.label = FieldDescriptorProto.TYPE_INT64, FieldDescriptorProto.LABEL_REPEATED
    pool = DescriptorPool()
    pool.Add(file)
    return pool.FindMessageTypeByName("thing.Thing")


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_fields_of_a_message_share_an_accessor(language: str) -> None:
    found = {
        message.full_name: clashes
        for file in FILES
        for message in messages(file)
        if (clashes := collisions(LANGUAGES[language], message))
    }
    assert not found


def test_no_two_types_of_the_package_share_a_name() -> None:
    assert not package_collisions(FILES)


@pytest.mark.parametrize(
    ("language", "fields"),
    [
        ("Java", {"device": "text", "device_bytes": "text"}),
        ("Java", {"stop": "numbers", "stop_count": "text"}),
        ("Java", {"class": "text"}),
        ("Kotlin", {"load": "message", "load_or_null": "text"}),
        ("C#", {"thing": "text"}),
        ("C#", {"load": "text", "load_field_number": "text"}),
        ("Go", {"load": "text", "get_load": "text"}),
        ("Go", {"string": "text"}),
        ("TypeScript", {"constructor": "text"}),
    ],
    ids=str,
)
def test_what_collides_is_found(language: str, fields: dict[str, str]) -> None:
    assert collisions(LANGUAGES[language], made(**fields))
