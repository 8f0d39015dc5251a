"""How the parameters of a JSON body become fields of the contract, each by one entry of a table."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loraplex.v1.prompt_pb2 import Prompt
from loraplex_service.http.failures import Failure, Refusal, openai_error
from loraplex_service.validation.limits import LIMITS, Entries

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT64,
}
REALS = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
# JSON Schemas of values.
STRING: Mapping[str, Any] = {"type": "string"}
BOOLEAN: Mapping[str, Any] = {"type": "boolean"}
INTEGER: Mapping[str, Any] = {"type": "integer"}
OBJECT: Mapping[str, Any] = {"type": "object"}
ARRAY: Mapping[str, Any] = {"type": "array"}
STRING_OR_OBJECT: Mapping[str, Any] = {"anyOf": [STRING, OBJECT]}
STRING_OR_ARRAY: Mapping[str, Any] = {"anyOf": [STRING, ARRAY]}
SizedT = TypeVar("SizedT", bound=Sized)


@dataclass(slots=True)
class Draft:
    """A request in the making: its message of the contract, and what only the answer depends on."""

    message: Any
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what an answer repeats of the body
    prompts: list[Prompt] = field(default_factory=list)  # where a request may have several
    stream: bool = False
    has_stream_options: bool = False
    include_usage: bool = False
    continuous_usage: bool = False  # each chunk tells what was used so far
    hides_token_ids: bool = False  # they are asked for to be counted, and told to nobody
    include_reasoning: bool = True
    echo: bool = False
    spells_token_ids: bool = False  # tokens are named by their ids where their texts would be
    base64: bool = False
    routing_key: str | None = None
    paths: list[tuple[str, str]] = field(default_factory=list)  # what was given: path in the message, parameter

    def named(self, path: str) -> str | None:
        """The parameter that a field of the message was given by, with what is below it; None: by none."""
        found = [
            (mine, name) for mine, name in self.paths if mine and (path + ".").startswith((mine + ".", mine + "["))
        ]
        if not found:
            return None
        mine, name = max(reversed(found), key=lambda each: len(each[0]))  # of several the last: it came on top
        return name + path[len(mine) :]


Put: TypeAlias = Callable[[Draft, Any], None]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: what it becomes, or why it is refused."""

    name: str
    becomes: str  # a path in the message of the contract; "": of none
    put: Put  # raises Refusal, ValueError, TypeError and OverflowError
    note: str = ""
    taken: bool = True
    schema: Mapping[str, Any] | None = field(default_factory=dict)  # of its values; None: that of the field


@dataclass(frozen=True, slots=True)
class Table:
    """The parameters of one endpoint. They are read in this order."""

    path: str
    new: Callable[[], Draft]
    parameters: Sequence[Parameter]
    check: Callable[[Draft], None] = lambda draft: None  # once all are read
    does: str = ""  # what it answers with
    told: Callable[[Failure], dict[str, Any]] = openai_error  # what went wrong
    needs: Collection[str] = ()  # parameters that a body cannot do without: the service says so
    repeated: Collection[str] = ()  # parameters that the answer has as they were given

    def read(self, given: Mapping[str, Any]) -> Draft:
        """Read a body. Raises Refusal with the parameter at fault."""
        names = {parameter.name for parameter in self.parameters}
        if unknown := [name for name in given if name not in names]:
            problem = f"{unknown[0]}: there is no such parameter of {self.path}; docs/http.md lists those there are"
            raise Refusal(400, problem, param=unknown[0], code="unknown_parameter")
        draft = self.new()
        draft.given = {name: given[name] for name in self.repeated if name in given}
        for parameter in self.parameters:
            value = given.get(parameter.name)
            if value is None:  # to OpenAI null and nothing are the same
                continue
            draft.paths.append((parameter.becomes, parameter.name))
            try:
                parameter.put(draft, value)
            except (ValueError, TypeError, OverflowError) as error:  # the last: a number beyond its field's type
                raise wrong(parameter.name, str(error)) from error
        self.check(draft)
        return draft


def wrong(name: str, problem: str, code: str = "invalid_value") -> Refusal:
    """The refusal of a parameter's value."""
    return Refusal(400, f"{name}: {problem}", param=name, code=code)


def refuse_others(value: Mapping[str, Any], known: Collection[str], name: str) -> None:
    """Raise Refusal for a key that is not known and has a value. `name`: of the object, in the body."""
    if unknown := sorted(key for key, content in value.items() if key not in known and content is not None):
        problem = f"is not taken here; there are: {', '.join(known) or 'none'}"
        raise wrong(f"{name}.{unknown[0]}", problem, code="unsupported_parameter")


# ---- kinds of parameters ---------------------------------------------------------------------------------------------


def scalar(name: str, path: str, note: str = "") -> Parameter:
    """A value of a field."""

    def put(draft: Draft, value: Any) -> None:
        message, field_name = place(draft.message, path)
        setattr(message, field_name, checked(message.DESCRIPTOR.fields_by_name[field_name], value))

    return Parameter(name, path, put, note, schema=None)


def listing(name: str, path: str, note: str = "") -> Parameter:
    """A list of values of a repeated field; a single value is a list of one."""

    def put(draft: Draft, value: Any) -> None:
        message, field_name = place(draft.message, path)
        descriptor = message.DESCRIPTOR.fields_by_name[field_name]
        of = f"{message.DESCRIPTOR.name}.{field_name}"
        values = items(value, of) if isinstance(value, list) else [value]
        getattr(message, field_name).extend([checked(descriptor, each) for each in values])

    return Parameter(name, path, put, note, schema=None)


def label(name: str, path: str = "labels") -> Parameter:
    """A value that is a label of the caller's accounting."""

    def put(draft: Draft, value: Any) -> None:
        message, field_name = place(draft.message, path)
        getattr(message, field_name)[name] = text(value)
        draft.paths.append((f"{path}[{name}]", name))

    return Parameter(name, path, put, f"as the label `{name}`", schema=STRING)


def refused(name: str, why: str, *harmless: Any) -> Parameter:
    """A parameter that this server has nothing for. `harmless`: values that ask for nothing."""

    def put(draft: Draft, value: Any) -> None:
        if value not in harmless:
            raise wrong(name, why, code="unsupported_parameter")

    allowed = (
        f" `{'`, `'.join(map(spelt, harmless))}` {'is' if len(harmless) == 1 else 'are'} taken." if harmless else ""
    )
    return Parameter(name, "", put, f"refused: {why}.{allowed}", taken=False, schema={"enum": list(harmless)})


def spelt(value: Any) -> str:
    """A value as JSON spells it."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- values ----------------------------------------------------------------------------------------------------------


def place(message: Message, path: str) -> tuple[Any, str]:
    """The message that a path leads into, and the name of its field."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    return message, name


def checked(descriptor: FieldDescriptor, value: Any) -> Any:
    """The value, of the field's type. Raises TypeError."""
    if descriptor.cpp_type in INTEGERS:
        return whole(value)
    if descriptor.cpp_type in REALS:
        return number(value)
    return flag(value) if descriptor.cpp_type == FieldDescriptor.CPPTYPE_BOOL else text(value)


def whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("must be a whole number")
    return value


def number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("must be a number")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("must be a text")
    return value


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("must be an object")
    return cast(dict[str, Any], value)


def items(value: Any, of: str = "") -> list[Any]:
    """`of`: the field of the contract that the list becomes, whose limit holds for it."""
    if not isinstance(value, list):
        raise TypeError("must be a list")
    return bounded(value, of)


def bounded(value: SizedT, of: str) -> SizedT:
    """A list or an object within its field's limit: one beyond it costs time and memory to build. Raises ValueError."""
    limit = LIMITS.get(of)
    if isinstance(limit, Entries) and len(value) > limit.most:
        raise ValueError(f"has {len(value)} entries; at most {limit.most} are allowed")
    return value
