"""The identity of an adapter."""

import hashlib
from collections.abc import Iterable

import msgspec


class AdapterKey(msgspec.Struct, frozen=True, array_like=True):
    """One immutable version of one adapter, or a weighted sum of several.

    The digest, not the name, is what makes two versions different: cached keys and values computed under one digest are
    never used under another, whatever the name says.
    """

    name: str  # e.g. "shared/pirate": tenant and adapter id
    digest: str  # hex SHA-256 over the adapter's config and weights; of a composition over its parts
    parts: tuple[tuple["AdapterKey", float], ...] = ()  # of a composition: the adapters and their weights

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"

    @property
    def terms(self) -> tuple[tuple["AdapterKey", float], ...]:
        """The adapters of a composition with their weights; of a single adapter, itself."""
        return self.parts or ((self, 1.0),)

    @property
    def members(self) -> tuple["AdapterKey", ...]:
        """The adapters of a composition; of a single adapter, itself."""
        return tuple(key for key, _ in self.terms)


def compose(parts: Iterable[tuple[AdapterKey, float]]) -> AdapterKey:
    """The key of a weighted sum. The same adapters with the same weights have the same key, in whatever order."""
    parts = tuple(sorted(parts, key=lambda part: part[0].digest))
    content = ";".join(f"{key.digest}*{weight!r}" for key, weight in parts)
    name = "+".join(f"{key.name}*{weight:g}" for key, weight in parts)
    return AdapterKey(name, hashlib.sha256(b"composition:" + content.encode()).hexdigest(), parts)
