"""The part of the configuration that names the adapters."""

import json
from typing import Any, Literal

import msgspec

from loraplex.v1.generation_pb2 import Choices, Constraint, JsonObject


class ConstraintConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of outputs: one of these."""

    json_schema: dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choices: tuple[str, ...] = ()
    grammar: str | None = None  # in GBNF

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

    name: str  # "pirate" of the tenant shared, or "{tenant}/{adapter}"
    model: str  # the name of the model that it adapts
    source: str  # the adapter's directory, under one of the adapter roots
    residency: Literal["host", "device"] = "host"  # the tier that it is loaded into ahead of its requests
    pinned: bool = False  # keep it on the device
    labels: dict[str, str] = {}
    default_constraint: ConstraintConfig | None = None  # of requests that set none

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
