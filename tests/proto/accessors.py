"""What the generators of other languages make of a message: every name, and the field that it comes from.

From their documentation: https://protobuf.dev/reference/ (java, kotlin, csharp, go), and that of ts-proto. Names alone
count, not their arguments: two fields whose accessors differ by those alone read as one.
"""

from collections.abc import Callable, Iterator, Mapping

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, OneofDescriptor

Names = Iterator[tuple[str, str]]  # (what is generated, what it is generated for)
Language = Callable[[Descriptor], Names]


def collisions(language: Language, message: Descriptor) -> dict[str, set[str]]:
    """The names that come from more than one place."""
    found: dict[str, set[str]] = {}
    for name, source in language(message):
        found.setdefault(name, set()).add(source)
    return {name: sources for name, sources in found.items() if len(sources) > 1}


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """All of them but the entries of maps, nested ones too."""

    def below(message: Descriptor) -> Iterator[Descriptor]:
        if not message.GetOptions().map_entry:
            yield message
            for inner in message.nested_types:
                yield from below(inner)

    for message in file.message_types_by_name.values():
        yield from below(message)


# ---- Java and Kotlin -------------------------------------------------------------------------------------------------

_JAVA_OWN = (
    "class",
    "allFields",
    "defaultInstance",
    "defaultInstanceForType",
    "descriptor",
    "descriptorForType",
    "field",
    "fieldBuilder",
    "initializationErrorString",
    "oneofFieldDescriptor",
    "parserForType",
    "repeatedField",
    "repeatedFieldBuilder",
    "repeatedFieldCount",
    "serializedSize",
    "unknownFields",
)


def java(message: Descriptor) -> Names:
    yield from ((f"get{_upper(name)}", "Java's own") for name in _JAVA_OWN)
    yield from ((name, "Java's own") for name in ("hasField", "hasOneof", "clearField", "clearOneof", "setField"))
    for field in message.fields:
        yield from ((name, field.name) for name in _java_names(field))
    for oneof in _real_oneofs(message):
        yield f"get{_pascal(oneof.name)}Case", oneof.name
        yield f"clear{_pascal(oneof.name)}", oneof.name


def _java_names(field: FieldDescriptor) -> Iterator[str]:
    name = _pascal(field.name)
    if _is_map(field):
        yield from (f"get{name}{suffix}" for suffix in ("", "Count", "Map", "OrDefault", "OrThrow"))
        yield from (f"{verb}{name}" for verb in ("contains", "put", "putAll", "remove", "clear", "getMutable"))
        return
    suffixes: tuple[str, ...] = ("", "List", "Count") if field.is_repeated else ("",)
    if field.cpp_type == field.CPPTYPE_STRING and field.type == field.TYPE_STRING:
        suffixes += ("Bytes",)
    if field.enum_type is not None:
        suffixes += ("Value", "ValueList") if field.is_repeated else ("Value",)
    if field.message_type is not None:
        suffixes += ("OrBuilder", "Builder")
        suffixes += ("OrBuilderList", "BuilderList") if field.is_repeated else ()
    yield from (f"get{name}{suffix}" for suffix in suffixes)
    yield from (f"{verb}{name}" for verb in ("set", "clear"))
    yield from (f"{verb}{name}" for verb in (("add", "addAll", "remove") if field.is_repeated else ("merge",)))
    if field.has_presence:
        yield f"has{name}"


def kotlin(message: Descriptor) -> Names:
    for field in message.fields:
        name = _camel(field.name)
        yield name, field.name
        if field.has_presence:
            yield f"has{_upper(name)}", field.name
        if field.message_type is not None and not field.is_repeated:
            yield f"{name}OrNull", field.name
        if field.enum_type is not None and not field.is_repeated:
            yield f"{name}Value", field.name
    for oneof in _real_oneofs(message):
        yield f"{_camel(oneof.name)}Case", oneof.name


# ---- C# --------------------------------------------------------------------------------------------------------------

_CSHARP_OWN = (
    "CalculateSize",
    "Clone",
    "Descriptor",
    "Equals",
    "GetHashCode",
    "GetType",
    "MergeFrom",
    "OnConstruction",
    "Parser",
    "ToString",
    "Types",
    "WriteTo",
)


def csharp(message: Descriptor) -> Names:
    yield message.name, "its class"
    yield from ((name, "C#'s own") for name in _CSHARP_OWN)
    for field in message.fields:
        name = _pascal(field.name)
        yield name, field.name
        yield f"{name}FieldNumber", field.name
        if field.has_presence and (field.message_type is None or field.containing_oneof is not None):
            yield f"Has{name}", field.name
            yield f"Clear{name}", field.name
    for oneof in _real_oneofs(message):
        for name in (f"{_pascal(oneof.name)}Case", f"{_pascal(oneof.name)}OneofCase", f"Clear{_pascal(oneof.name)}"):
            yield name, oneof.name


# ---- Go --------------------------------------------------------------------------------------------------------------

_GO_OWN = (
    "Descriptor",
    "Marshal",
    "ProtoMessage",
    "ProtoReflect",
    "Reset",
    "String",
    "Unmarshal",
)


def go(message: Descriptor) -> Names:
    """Of a struct, its fields and methods; and of the package, what begins with the name of the struct."""
    yield from ((name, "Go's own") for name in _GO_OWN)
    for name in [part.name for part in message.fields] + [part.name for part in _real_oneofs(message)]:
        yield _pascal(name), name
        yield f"Get{_pascal(name)}", name
    for oneof in _real_oneofs(message):
        yield from ((f"{message.name}_{_pascal(field.name)}", field.name) for field in oneof.fields)
    yield from ((f"{message.name}_{inner.name}", f"message {inner.name}") for inner in message.nested_types)
    for enum in message.enum_types:
        yield f"{message.name}_{enum.name}", f"enum {enum.name}"
        yield from ((f"{message.name}_{value.name}", f"enumerator {value.name}") for value in enum.values)


# ---- TypeScript ------------------------------------------------------------------------------------------------------


_TYPESCRIPT_OWN = ("$type", "constructor", "hasOwnProperty", "toString", "valueOf")


def typescript(message: Descriptor) -> Names:
    yield from (
        (name, "JavaScript's own") for name in ("constructor", "toString", "valueOf", "hasOwnProperty", "$type")
    )
    yield from ((_camel(field.name), field.name) for field in message.fields)
    yield from ((_camel(oneof.name), f"oneof {oneof.name}") for oneof in _real_oneofs(message))  # protobuf-es


LANGUAGES: Mapping[str, Language] = {
    "Java": java,
    "Kotlin": kotlin,
    "C#": csharp,
    "Go": go,
    "TypeScript": typescript,
}


def package_collisions(files: list[FileDescriptor]) -> dict[str, set[str]]:
    """Of the names that Go and TypeScript give to types: in one package they have no other parts."""
    found: dict[str, set[str]] = {}

    def add(name: str, what: Descriptor | EnumDescriptor | str) -> None:
        found.setdefault(name, set()).add(what if isinstance(what, str) else what.full_name)

    def add_enum(enum: EnumDescriptor, prefix: str) -> None:
        for suffix in ("", "_name", "_value"):
            add(f"{prefix}{enum.name}{suffix}", f"{enum.full_name}{suffix}")
        for value in enum.values:
            add(f"{prefix or enum.name + '_'}{value.name}", f"{enum.full_name}.{value.name}")

    for file in files:
        for enum in file.enum_types_by_name.values():
            add_enum(enum, "")
        for message in messages(file):
            outer = f"{message.containing_type.name}_" if message.containing_type else ""
            add(f"{outer}{message.name}", message)
            for enum in message.enum_types:
                add_enum(enum, f"{message.name}_")
    return {name: sources for name, sources in found.items() if len(sources) > 1}


# ---- names -----------------------------------------------------------------------------------------------------------


def _pascal(name: str) -> str:
    return "".join(_upper(part) for part in name.split("_"))


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(_upper(part) for part in others)


def _upper(name: str) -> str:
    return name[:1].upper() + name[1:]


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _real_oneofs(message: Descriptor) -> Iterator[OneofDescriptor]:
    """Without those that stand for `optional`."""
    return (oneof for oneof in message.oneofs if not oneof.name.startswith("_"))
