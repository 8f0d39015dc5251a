"""The part of the configuration that names the adapters."""

from typing import Literal

import msgspec


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter that is registered at start."""

    name: str  # "pirate" of the tenant shared, or "{tenant}/{adapter}"
    model: str  # the name of the model that it adapts
    source: str  # the adapter's directory, under one of the adapter roots
    residency: Literal["host", "device"] = "host"  # the tier that it is loaded into ahead of its requests
    pinned: bool = False  # keep it on the device
    labels: dict[str, str] = {}

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
