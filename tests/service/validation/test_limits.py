"""The table of limits: whole, as the contract's comments say it, and obeyed by every method."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from loraplex.v1 import adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2
from loraplex.v1.adapters_pb2 import Adapter, UpdateAdapterRequest
from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import BatchGenerateRequest
from loraplex.v1.models_pb2 import ListModelsRequest
from loraplex.v1.prompt_pb2 import Chat, ChatMessage, Prompt, TokenIds, ToolCall
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.validation.checks import check_request
from loraplex_service.validation.limits import LIMITS, TOTALS, Entries, Text

PROTO = Path(__file__).parents[3] / "proto" / "loraplex" / "v1"
SERVICES = (inference_pb2, pooling_pb2, tokenizer_pb2, adapters_pb2, models_pb2, routes_pb2, server_pb2)
OF_SIZE = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def request_types() -> Iterator[Descriptor]:
    for module in SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from (method.input_type for method in service.methods)


def reachable(types: Iterator[Descriptor]) -> dict[str, Descriptor]:
    """All messages in these and in what is in them, but for the entries of maps."""
    found: dict[str, Descriptor] = {}
    waiting = list(types)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name not in found:
            found[descriptor.full_name] = descriptor
            waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return {name: one for name, one in found.items() if not one.GetOptions().map_entry}


MESSAGES = reachable(request_types())
FIELDS = {f"{one.name}.{field.name}": field for one in MESSAGES.values() for field in one.fields}
COMMENTS: dict[str, str] = {}


def read_comments() -> None:
    """The comment above each message and field of the contract, by "Message" and "Message.field"."""
    for file in PROTO.glob("*.proto"):
        messages: list[str] = []
        comment: list[str] = []
        for line in map(str.strip, file.read_text().splitlines()):
            if line.startswith("//"):
                comment.append(line.removeprefix("//").strip())
                continue
            if opened := re.match(r"(message|oneof|enum|service) (\w+) \{(\})?", line):
                messages.append(opened[2] if opened[1] == "message" else messages[-1] if messages else "")
                COMMENTS[messages[-1]] = " ".join(comment) if opened[1] == "message" else COMMENTS.get(messages[-1], "")
                if opened[3]:
                    messages.pop()
            elif line.startswith("}"):
                messages.pop()
            elif (named := re.match(r".*?(\w+) = \d+( \[.*)?;?$", line)) and messages:
                COMMENTS[f"{messages[-1]}.{named[1]}"] = " ".join(comment)
            comment = []


read_comments()


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_can_grow_has_a_limit(name: str) -> None:
    field = FIELDS[name]
    if field.is_repeated:
        limit = LIMITS[name]
        assert isinstance(limit, Entries)
        kind = field.message_type
        entry = kind.fields_by_name if kind is not None else {}
        is_map = kind is not None and kind.GetOptions().map_entry
        assert (limit.keys is not None) == (is_map and entry["key"].type in OF_SIZE)
        item = entry["value"] if is_map else field
        assert item.type not in OF_SIZE or isinstance(limit.of, Text)
    elif field.type in OF_SIZE:
        assert isinstance(LIMITS[name], Text)


def test_the_table_is_about_fields_that_there_are() -> None:
    assert LIMITS.keys() <= FIELDS.keys()
    assert TOTALS.keys() <= {one.name for one in MESSAGES.values()}


def test_no_two_messages_share_a_line_of_the_table() -> None:
    assert len({one.name for one in MESSAGES.values()}) == len(MESSAGES)


OURS = [name for name in LIMITS if FIELDS[name].full_name.startswith("loraplex.v1.")]


@pytest.mark.parametrize("name", [*OURS, *TOTALS])
def test_the_comment_says_the_limit(name: str) -> None:
    said = re.sub(r"(?<=\d),(?=\d{3})", "", COMMENTS[name]).lower()
    assert (LIMITS.get(name) or TOTALS[name]).words in said


def too_much(name: str) -> Message:
    """A message that is right, but for one field, which has one more than it may."""
    field, limit = FIELDS[name], LIMITS[name]
    assert field.containing_type is not None
    message: Any = GetMessageClass(field.containing_type)()
    if isinstance(limit, Entries) and limit.keys is not None:
        assert field.message_type is not None
        entries = getattr(message, field.name)
        for number in range(limit.most + 1):
            if field.message_type.fields_by_name["value"].message_type is not None:
                entries[str(number)].string_value = ""
            else:
                entries[str(number)] = "" if isinstance(limit.of, Text) else 1
    elif isinstance(limit, Entries) and field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, field.name).update({number: 1 for number in range(limit.most + 1)})
    elif isinstance(limit, Entries):
        one: Any = 1
        if field.message_type is not None:
            one = GetMessageClass(field.message_type)()
        elif isinstance(limit.of, Text):
            one = "x" * limit.of.least
        getattr(message, field.name).extend([one] * (limit.most + 1))
    elif isinstance(limit, Text):
        text = "x" * (limit.most + 1)
        setattr(message, field.name, text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text)
    return message


@pytest.mark.parametrize("name", [name for name, limit in LIMITS.items() if isinstance(limit, Entries | Text)])
def test_one_more_than_may_be_is_refused(name: str) -> None:
    with pytest.raises((InvalidRequest, FeatureUnsupported)) as refused:
        check_request(too_much(name))
    assert name.partition(".")[2] in str(refused.value) or "as a whole" in str(refused.value)


@pytest.mark.parametrize("size", [-1, 1001])
def test_page_sizes_have_limits(size: int) -> None:
    with pytest.raises(InvalidRequest, match="page_size: must be from 0 to 1000"):
        check_request(ListModelsRequest(page_size=size))


def test_everything_that_is_wrong_with_labels_is_named() -> None:
    labels = {f"key-{number}": "" for number in range(61)} | {"": "", "k" * 64: "", "long": "v" * 257}
    with pytest.raises(InvalidRequest) as refused:
        check_request(UpdateAdapterRequest(adapter=Adapter(labels=labels)))
    assert len(refused.value.violations) == 3


def test_calls_of_tools_that_are_each_allowed_are_too_many_together() -> None:
    message = ChatMessage(role="assistant", tool_calls=[ToolCall(id="x")] * 128)
    request = inference_pb2.GenerateRequest(
        spec=GenerateSpec(model="demo", prompt=Prompt(chat=Chat(messages=[message] * 40)))
    )
    with pytest.raises(InvalidRequest, match=r"spec\.prompt\.chat: is too much as a whole"):
        check_request(request)


def test_texts_that_are_each_allowed_are_too_long_together() -> None:
    message = ChatMessage(role="user", content="x" * (1 << 20))
    request = tokenizer_pb2.TokenizeRequest(model="demo", prompt=Prompt(chat=Chat(messages=[message] * 5)))
    with pytest.raises(InvalidRequest, match=r"prompt\.chat: is too much as a whole"):
        check_request(request)


def test_token_ids_of_a_batch_are_too_many_together() -> None:
    spec = GenerateSpec(model="demo", prompt=Prompt(token_ids=TokenIds(ids=[1] * (1 << 20))))
    with pytest.raises(InvalidRequest, match="request: is too much as a whole"):
        check_request(BatchGenerateRequest(specs=[spec] * 3))


def test_variables_of_a_template_count_once() -> None:
    chat = Chat(messages=[ChatMessage(role="user")])
    chat.template_kwargs.update({"x": [{"a": "b"}] * 2000})
    check_request(tokenizer_pb2.TokenizeRequest(model="demo", prompt=Prompt(chat=chat)))


def test_items_of_a_batch_are_left_to_fail_alone() -> None:
    check_request(BatchGenerateRequest(specs=[GenerateSpec(model="x" * 600)]))
