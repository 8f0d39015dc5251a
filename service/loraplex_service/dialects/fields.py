"""How the fields of a dialect's request become fields of the contract, each by one entry of a table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_service.errors import FeatureUnsupported, InvalidRequest
from loraplex_service.http.parameters import place


@dataclass(slots=True)
class Draft:
    """A spec in the making, and by which fields of the dialect it was said."""

    spec: GenerateSpec = field(default_factory=GenerateSpec)
    names: list[tuple[str, str]] = field(default_factory=list)  # path in the spec, field of the dialect

    def named(self, path: str) -> str:
        """The field of the dialect that one of the contract was given by, with what is below it; else its own path."""
        path = path.removeprefix("spec.")
        found = [(ours, name) for ours, name in self.names if (path + ".").startswith((ours + ".", ours + "["))]
        if not found:
            return path
        ours, name = max(found, key=lambda each: len(each[0]))
        return name + path[len(ours) :]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Have errors name the fields of the dialect."""
        try:
            yield
        except (InvalidRequest, FeatureUnsupported) as error:
            error.rename(self.named)
            raise


Put = Callable[[Draft, Any], None]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a dialect's request: what it becomes, or when it is refused."""

    name: str  # its path in the request
    becomes: str  # the path in GenerateSpec; "": of none
    put: Put  # raises ValueError, InvalidRequest
    note: str = ""


class Fields:
    """All fields of a dialect's request. A message in it is one field, or has its own in the table."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.all = tuple(fields)
        self._by_name = {each.name: each for each in fields}

    def read(self, request: Message, draft: Draft, inside: str = "") -> None:
        """Put what the request has into the draft. Raises InvalidRequest, FeatureUnsupported."""
        for descriptor, value in request.ListFields():
            name = inside + descriptor.name
            entry = self._by_name.get(name)
            if entry is None and isinstance(value, Message):
                self.read(value, draft, f"{name}.")
                continue
            entry = self._by_name[name]
            if entry.becomes:
                draft.names.append((entry.becomes, name))
            try:
                entry.put(draft, value)
            except ValueError as error:
                raise InvalidRequest.at(name, str(error)) from error


# ---- kinds of fields -------------------------------------------------------------------------------------------------


def copied(name: str, becomes: str, note: str = "") -> Field:
    """A value, a list or a map as it is."""

    def put(draft: Draft, value: Any) -> None:
        message, field_name = place(draft.spec, becomes)
        descriptor = message.DESCRIPTOR.fields_by_name[field_name]
        if not descriptor.is_repeated:
            setattr(message, field_name, value)
        elif descriptor.message_type is not None:
            getattr(message, field_name).update(value)
        else:
            getattr(message, field_name).extend(value)

    return Field(name, becomes, put, note)


def taken(name: str, note: str) -> Field:
    """A field that makes no difference to what is generated."""
    return Field(name, "", lambda draft, value: None, note)


def refused(name: str, why: str, *harmless: Any) -> Field:
    """A field that this server has nothing for. `harmless`: values that ask for nothing, beside the default."""

    def put(draft: Draft, value: Any) -> None:
        if value not in harmless:
            raise FeatureUnsupported(name, f"{why}; leave it out")

    return Field(name, "", put, f"refused: {why}")


def put_prompt_logprobs(draft: Draft, value: bool) -> None:
    """Have the prompt's log-probabilities told, with the candidates that another field asks for, or none."""
    if value:
        draft.spec.output.prompt_logprobs = draft.spec.output.prompt_logprobs
