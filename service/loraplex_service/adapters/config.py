"""The part of the configuration that names the adapters."""

import json
from typing import Any, Literal

import msgspec

from loraplex.v1.generation_pb2 import Choices, Constraint, JsonObject


class ConstraintConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of outputs: one of these."""

    json_schema: dict[str, Any] | None = None  # a mapping
    json_object: bool = False  # any JSON object
    regex: str | None = None  # a regular expression
    choices: tuple[str, ...] = ()  # one of these texts
    grammar: str | None = None  # a grammar in GBNF

    @property
    def kinds(self) -> list[str]:
        """The fields that are given."""
        return [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False, ())]

    def message(self) -> Constraint:
        """Build the message of the contract. Call it where there is one kind."""
        (kind,) = self.kinds
        value = getattr(self, kind)
        match kind:
            case "json_schema":
                value = json.dumps(value)
            case "json_object":
                value = JsonObject()
            case "choices":
                value = Choices(values=value)
        return Constraint(**{kind: value})


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter that is registered at start."""

    name: str  # `legal` for the tenant `shared`, or `acme/legal`
    model: str  # the name of the model that it adapts
    # a directory under one of `adapter_roots`, relative to a root or to the file, or absolute; or below one of
    # `adapter_sources`. See docs/adapter-life.md#where-the-files-are
    source: str
    # `device`: it is on the device ahead of its first request; else in host memory
    residency: Literal["host", "device"] = "host"
    pinned: bool = False  # it stays on the device
    labels: dict[str, str] = {}  # for your own use
    # the form of the outputs of requests that set none: one of these. See docs/forms.md
    default_constraint: ConstraintConfig | None = None

    @property
    def tenant(self) -> str:
        return self.name.rpartition("/")[0] or "shared"

    @property
    def adapter_id(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def is_remote(self) -> bool:
        """Whether `source` is fetched, rather than a directory."""
        return "://" in self.source
