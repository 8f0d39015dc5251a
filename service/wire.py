"""A look at a message while it is still bytes: how much it holds, before any of it is an object.

A message of four megabytes can hold two million empty ones, and each would become an object of hundreds of bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from service.errors import InvalidRequest

MAX_FIELDS = 1 << 15  # of a message with all that is in it; a packed list of numbers is one
MAX_DEPTH = 64  # of messages in messages
SMALL_BYTES = 16 << 10  # no message of so few holds enough to hurt

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ALL_BUT_LAST_BYTES = bytes(range(0x80, 0x100))  # of varints
_NO_NUMBERS = (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)
_WIDTHS = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}


@dataclass(frozen=True, slots=True)
class _Field:
    """What is known of a field."""

    name: str
    most: int | None  # entries; None: as many as a message may have fields
    message: Descriptor | None  # None: it holds no messages
    is_number: bool  # a list of them may come packed
    width: int | None  # of a number in bytes; None: a varint

    def checked(self, count: int) -> int:
        """The count, if there may be so many entries. Raises InvalidRequest."""
        if self.most is not None and count > self.most:
            raise InvalidRequest.at(self.name, f"has more entries than the {self.most} that are allowed")
        return count

    def entries(self, data: bytes, start: int, end: int) -> int:
        """How many, in the bytes of one occurrence."""
        if not self.is_number:
            return 1
        if self.width is not None:
            return (end - start) // self.width
        return len(data[start:end].translate(None, _ALL_BUT_LAST_BYTES))


class WireCheck:
    """Refuses messages that hold too much."""

    def __init__(self, most: Mapping[str, int]) -> None:
        """`most`: how many entries a list or map may have, by "Message.field"."""
        self._most = most
        self._fields: dict[Descriptor, dict[int, _Field]] = {}

    def check(self, data: bytes, kind: Descriptor) -> None:
        """Raises InvalidRequest for a message that holds too much, DecodeError for what is no message."""
        if len(data) <= SMALL_BYTES:
            return
        try:
            _Look(self, data).at(0, len(data), kind, 0)
        except IndexError:
            raise DecodeError("it ends too early") from None

    def fields(self, kind: Descriptor) -> dict[int, _Field]:
        """Those of a kind of message, by their numbers."""
        found = self._fields.get(kind)
        if found is None:
            found = self._fields[kind] = {field.number: self._field(kind, field) for field in kind.fields}
        return found

    def _field(self, kind: Descriptor, field: FieldDescriptor) -> _Field:
        return _Field(
            name=f"{kind.name}.{field.name}",
            most=self._most.get(f"{kind.name}.{field.name}"),
            message=field.message_type,
            is_number=field.cpp_type not in _NO_NUMBERS,
            width=_WIDTHS.get(field.type),
        )


class _Look:
    """One look at one message. Most numbers on the wire have one byte: a call for each would be most of the time."""

    def __init__(self, check: WireCheck, data: bytes) -> None:
        self._check = check
        self._data = data
        self._fields_left = MAX_FIELDS

    def at(self, position: int, end: int, kind: Descriptor, depth: int) -> None:
        """Look at the message that lies there, and at all that it holds."""
        if depth > MAX_DEPTH:
            raise InvalidRequest.at("request", f"holds messages more than {MAX_DEPTH} deep")
        data, fields = self._data, self._check.fields(kind)
        counts: dict[int, int] = {}
        while position < end:
            self._fields_left -= 1
            tag = data[position]
            position += 1
            if tag >= 0x80:
                tag, position = self._varint(position - 1)
            if tag & 7 != _BYTES:
                start, position = position, self._behind_number(tag & 7, position)
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
            field = fields.get(tag >> 3)
            if field is None:
                continue
            if field.most is not None:
                more = field.entries(data, start, position) if tag & 7 == _BYTES else 1
                counts[tag >> 3] = field.checked(counts.get(tag >> 3, 0) + more)
            if field.message is not None and tag & 7 == _BYTES and start < position:
                self.at(start, position, field.message, depth + 1)

    def _behind_number(self, wire_type: int, position: int) -> int:
        if wire_type == _VARINT:
            return self._varint(position)[1]
        if wire_type in (_FIXED32, _FIXED64):
            return position + (4 if wire_type == _FIXED32 else 8)
        raise DecodeError(f"there is no wire type {wire_type}")

    def _varint(self, position: int) -> tuple[int, int]:
        """The number that begins there, and where it ends."""
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
