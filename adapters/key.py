"""The identity of an adapter."""

import msgspec


class AdapterKey(msgspec.Struct, frozen=True, array_like=True):
    """One immutable version of one adapter.

    The digest, not the name, is what makes two versions different: cached keys and values computed under one digest are
    never used under another, whatever the name says.
    """

    name: str  # e.g. "shared/pirate": tenant and adapter id
    digest: str  # hex SHA-256 over the adapter's config and weights

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"
