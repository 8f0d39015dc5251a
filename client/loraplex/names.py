"""Names of enumerators, which are numbers in Python."""

from google.protobuf.message import Message


def enum_name(message: Message, field: str) -> str:
    """The enumerator that a field holds, without the prefix that all of its kind have: "EOS" of `Finished.reason`.

    A number that this client does not know yet comes as its digits. Raises ValueError for a field without enumerators.
    """
    descriptor = message.DESCRIPTOR.fields_by_name.get(field)
    enum = None if descriptor is None else descriptor.enum_type
    number = None if enum is None else getattr(message, field)
    if enum is None or not isinstance(number, int):
        raise ValueError(f"{message.DESCRIPTOR.name} has no field {field!r} that holds an enumerator")
    known = enum.values_by_number.get(number)
    if known is None:
        return str(number)
    unspecified = enum.values_by_number[0].name
    return known.name.removeprefix(unspecified.removesuffix("UNSPECIFIED"))
