"""Names of enumerators, which are numbers on the wire."""

from collections.abc import Iterable, MutableSequence
from typing import Any, Self, overload

from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

NUMERIC = tuple("bcdeEfFgGnoxX%")  # the ends of format specifications that are for numbers


class Enumerator(int):
    """A number that a message holds, which prints as its name in the contract: FINISH_REASON_EOS.

    It equals its number and can be used as one; `f"{reason:d}"` shows the number. A number without a name, of a newer
    server, prints as its digits.
    """

    name: str

    def __new__(cls, number: int, name: str) -> Self:
        enumerator = super().__new__(cls, number)
        enumerator.name = name
        return enumerator

    def __reduce__(self) -> tuple[type[Self], tuple[int, str]]:
        return type(self), (int(self), self.name)

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def __format__(self, specification: str) -> str:
        return format(int(self) if specification.endswith(NUMERIC) else self.name, specification)


class Enumerators(MutableSequence[int]):
    """The numbers of a repeated field, read as Enumerators. Changing them changes the field."""

    def __init__(self, numbers: MutableSequence[int], enum: Any) -> None:
        self._numbers = numbers
        self._enum = enum

    @overload
    def __getitem__(self, index: int) -> Enumerator: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> Enumerator | list[int]:
        if isinstance(index, slice):
            return list(self)[index]
        return enumerator(self._numbers[index], self._enum)

    def __setitem__(self, index: Any, numbers: Any) -> None:
        self._numbers[index] = numbers

    def __delitem__(self, index: int | slice) -> None:
        del self._numbers[index]

    def __len__(self) -> int:
        return len(self._numbers)

    def insert(self, index: int, number: int) -> None:
        self._numbers.insert(index, number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))


def enumerator(number: int, enum: Any) -> Enumerator:
    """Name a number of an enum."""
    known = enum.values_by_number.get(number)
    return Enumerator(number, str(int(number)) if known is None else known.name)


def name_enumerators(*files: FileDescriptor) -> None:
    """Have the messages of generated files give Enumerators for their fields that hold enumerators."""
    for file in files:
        for message in file.message_types_by_name.values():
            _name_enumerators_of(message)


def _name_enumerators_of(message: Descriptor) -> None:
    enums = {field.name: field.enum_type for field in message.fields if field.enum_type is not None}
    if not enums:
        return
    kind = GetMessageClass(message)
    read = kind.__getattribute__

    def read_with_name(self: object, name: str) -> Any:
        value = read(self, name)
        if name not in enums:
            return value
        return enumerator(value, enums[name]) if isinstance(value, int) else Enumerators(value, enums[name])

    # protobuf has no place for this: fields are read in C, and generated classes cannot be inherited from.
    kind.__getattribute__ = read_with_name  # type: ignore[method-assign]


def enum_name(message: Message, field: str) -> str:
    """Return the enumerator that a field holds without the prefix of its kind: "EOS" of `Finished.reason`.

    A number that this client does not know comes as its digits. Raises ValueError for a field without an enumerator.
    """
    descriptor = message.DESCRIPTOR.fields_by_name.get(field)
    enum = None if descriptor is None else descriptor.enum_type
    number = None if enum is None else getattr(message, field)
    if enum is None or not isinstance(number, int):
        raise ValueError(f"{message.DESCRIPTOR.name} has no field {field!r} that holds an enumerator")
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enumerator(number, enum).name.removeprefix(prefix)
