"""One version of an adapter: its names, its state, and the facts about it.

LOADING ──► ACTIVE ──► DELETING ──► gone
   │  ▲                   ▲
   ▼  │ registered again  │
  FAILED ─────────────────┘
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapters.errors import AdapterNotFound
from loraplex_adapters.grammar import ID_RULE, is_digest, is_id
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency

SHARED_TENANT = "shared"
VERSION_DIGITS = 12  # of the digest, in a version's name
NO_DIGEST = "0" * 64  # the digest of a version that stands for missing files


class AdapterState(enum.Enum):
    """The state of a version."""

    LOADING = "loading"  # being read and checked
    ACTIVE = "active"  # can be used
    FAILED = "failed"  # could not be read, or is not valid
    DELETING = "deleting"  # takes no new requests, gone when the running ones have ended


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """The facts about a version that has been read."""

    rank: int  # the largest
    size_bytes: int
    target_modules: tuple[str, ...]
    alpha: float = 0.0
    module_ranks: Mapping[str, int] = field(default_factory=dict)  # only if they differ
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The arguments of a registration."""

    base_model: str  # the model that it adapts, by the name under which it is served
    source: str  # as the caller gave it; "" for an upload
    labels: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False
    make_current: bool = True  # the alias moves to it as soon as it can be used
    residency: Residency = Residency.HOST  # how close to the device it is brought ahead of its requests
    default_constraint: bytes = b""  # loraplex.v1.Constraint: of requests that set none; empty: there is none


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One version at one moment: a snapshot that never changes."""

    key: AdapterKey
    spec: AdapterSpec
    state: AdapterState
    current: bool  # whether the bare name means it
    info: AdapterInfo | None  # None until it has been ACTIVE
    problems: tuple[str, ...]  # in FAILED
    num_requests: int
    create_time: float  # seconds since the epoch
    update_time: float
    last_use_time: float | None
    etag: str
    directory: str = ""  # of its files
    fingerprint: str = ""  # of its files when they were checked; another one: check them again
    reason: str = ""  # in FAILED: the kind of the problems
    text_digest: str = ""  # of the files of its text; "": it has the base's
    num_waiting: int = 0  # of num_requests, those that have not had their first token

    @classmethod
    def new(cls, key: AdapterKey, spec: AdapterSpec, now: float) -> AdapterVersion:
        """A version that has just been registered."""
        return cls(key, spec, AdapterState.LOADING, False, None, (), 0, now, now, None, "")

    @property
    def name(self) -> str:
        return resource_name(self.key)

    @property
    def is_missing(self) -> bool:
        """Whether the version stands for an adapter whose files have not been found."""
        return self.key.digest == NO_DIGEST

    @property
    def version_name(self) -> str:
        return f"{self.name}@{self.key.digest[:VERSION_DIGITS]}"

    @property
    def full_name(self) -> str:
        """The name with the whole digest, by which `AdapterRegistry.get` finds no other version."""
        return full_name(self.key)


def resource_name(key: AdapterKey) -> str:
    """tenants/{tenant}/adapters/{adapter} of a key, whose own name is {tenant}/{adapter}."""
    tenant, _, adapter = key.name.partition("/")
    return f"tenants/{tenant}/adapters/{adapter}"


def full_name(key: AdapterKey) -> str:
    """The resource name of the very version, with its whole digest."""
    return f"{resource_name(key)}@{key.digest}"


def no_adapter(name: str) -> AdapterNotFound:
    """The error for a name or key of which there is no version."""
    return AdapterNotFound(f"there is no adapter {name[:200]!r}")


def checked_key(tenant: str, adapter_id: str, digest: str) -> AdapterKey:
    """The key of a version. Raises AdapterNotFound for a malformed id or digest."""
    for kind, value in (("tenant", tenant), ("adapter", adapter_id)):
        if not is_id(value):
            raise AdapterNotFound(f"{kind} id {value[:80]!r}: it must be {ID_RULE}")
    if not is_digest(digest):
        raise AdapterNotFound(f"digest {digest[:80]!r}: 64 hexadecimal digits are expected")
    return AdapterKey(f"{tenant}/{adapter_id}", digest)
