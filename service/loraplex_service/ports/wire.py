"""Counts the fields of a message while it is still bytes, before any object is made of it.

A message of four megabytes can hold two million empty ones, and each would become an object of hundreds of bytes.
"""

from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from loraplex_service.errors import FeatureUnsupported, InvalidRequest

MAX_FIELDS = 1 << 15  # fields of a message with all messages in it; a packed list of numbers is one
MAX_NUMBERS = 1 << 19  # numbers in packed lists
MAX_UNKNOWN_BYTES = 64 << 10  # of fields that the contract does not have; of fewer the first one is named
MAX_DEPTH = 64  # depth of messages in messages
SMALL_BYTES = 16 << 10  # bytes; no smaller message can hold enough to hurt

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ALL_BUT_LAST_BYTES = bytes(range(0x80, 0x100))  # the bytes of a varint before its last one
_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_STRING: _BYTES,
    FieldDescriptor.TYPE_BYTES: _BYTES,
    FieldDescriptor.TYPE_MESSAGE: _BYTES,
}
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True, slots=True)
class _Field:
    """A field whose parsed form takes more memory than its bytes."""

    message: Descriptor | None  # None: it holds no messages, but packed numbers
    width: int | None  # of a number in bytes; None: a varint

    def numbers(self, data: bytes, start: int, end: int) -> int:
        """The count of numbers in a packed list."""
        if self.width is not None:
            return (end - start) // self.width
        return len(data[start:end].translate(None, _ALL_BUT_LAST_BYTES))


def check_wire(data: bytes, kind: Descriptor) -> None:
    """Raise InvalidRequest for a message with too many fields, FeatureUnsupported for too much that the contract does
    not have, DecodeError for bytes that are no message."""
    if len(data) <= SMALL_BYTES:
        return
    try:
        _Look(data).at(0, len(data), kind, 0)
    except IndexError:
        raise DecodeError("it ends too early") from None


@cache
def _fields(kind: Descriptor) -> dict[int, _Field | None]:
    """The fields by the tags that they may have. None: a single number, or text."""
    fields: dict[int, _Field | None] = {}
    for field in kind.fields:
        wire_type = _WIRE_TYPES.get(field.type, _VARINT)
        of_messages = None if field.message_type is None else _Field(field.message_type, None)
        fields[field.number << 3 | wire_type] = of_messages
        if wire_type != _BYTES and field.is_repeated:
            fields[field.number << 3 | _BYTES] = _Field(None, _WIDTHS.get(wire_type))
    return fields


_UNKNOWN = _Field(None, None)


class _Look:
    """One pass over one message.

    Most varints have one byte and are read inline: a call for each would take most of the time.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields_left = MAX_FIELDS
        self._numbers_left = MAX_NUMBERS
        self._unknown_left = MAX_UNKNOWN_BYTES

    def at(self, position: int, end: int, kind: Descriptor, depth: int) -> None:
        """Count the message at this position, and all messages inside it."""
        if depth > MAX_DEPTH:
            raise InvalidRequest.at("request", f"holds messages more than {MAX_DEPTH} deep")
        data, fields = self._data, _fields(kind)
        while position < end:
            self._fields_left -= 1
            begin = position
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = self._varint(position - 1)
            field = fields.get(tag, _UNKNOWN)
            if tag & 7 != _BYTES:
                position = self._behind_number(tag & 7, position)
            else:
                length = data[position]
                start = position + 1
                if length >= 0x80:
                    length, start = self._varint(position)
                position = start + length
            if position > end:
                raise DecodeError("a field ends behind its message")
            if self._fields_left < 0:
                raise InvalidRequest.at("request", f"has more than {MAX_FIELDS} fields in all; ask for less at once")
            if field is _UNKNOWN:
                self._unknown_left -= position - begin
                if self._unknown_left < 0:
                    raise FeatureUnsupported.unknown("request")
            elif field is not None and start < position:
                self._inside(field, start, position, depth)

    def _inside(self, field: _Field, start: int, end: int, depth: int) -> None:
        if field.message is not None:
            self.at(start, end, field.message, depth + 1)
            return
        self._numbers_left -= field.numbers(self._data, start, end)
        if self._numbers_left < 0:
            raise InvalidRequest.at("request", f"has more than {MAX_NUMBERS} numbers in all; ask for less at once")

    def _behind_number(self, wire_type: int, position: int) -> int:
        if wire_type == _VARINT:
            return self._varint(position)[1]
        if wire_type in (_FIXED32, _FIXED64):
            return position + (4 if wire_type == _FIXED32 else 8)
        raise DecodeError(f"there is no wire type {wire_type}")

    def _varint(self, position: int) -> tuple[int, int]:
        """The varint at this position, and the position after it."""
        value = shift = 0
        while True:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise DecodeError("a number has more than 10 bytes")
