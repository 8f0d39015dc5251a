"""What a registry keeps under each name, and what it tells of a change."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapters.versions import AdapterVersion


class ChangeKind(enum.Enum):
    ADDED = "added"
    CHANGED = "changed"
    MOVED = "moved"  # to another tier: the version itself has not changed
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class AdapterChange:
    kind: ChangeKind
    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """The versions and the alias of one name, in the form that survives a restart."""

    versions: tuple[AdapterVersion, ...]
    claims: Mapping[str, int]
    current: str | None


@dataclass(slots=True)
class NamedVersions:
    """The versions under one name."""

    versions: dict[str, AdapterVersion] = field(default_factory=dict)  # by digest
    claims: dict[str, int] = field(default_factory=dict)  # by digest: when it was last asked to be the current one
    current: str | None = None  # digest
