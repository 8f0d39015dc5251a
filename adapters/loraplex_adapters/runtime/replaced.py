"""Parameters of an adapter that replace the base's own: full copies, and rows of single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NORM_WEIGHT, NORM_BIAS = slice(0, 1), slice(1, 2)  # the rows that a norm is taken to have
REPLACED_SITE = "replaced"  # the one site that keeps all of an adapter's replaced parameters


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Some rows of one parameter: outputs of a linear's weight, tokens of an embedding, weight or bias of a norm."""

    rows: slice | Tensor  # which; int64 indices if they do not lie together
    weight: Tensor  # [rows, C]; of a norm float32 [C], as the checkpoint has it

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.rows.nbytes if isinstance(self.rows, Tensor) else 0)

    def to(self, device: torch.device) -> ReplacedRows:
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(device)
        return ReplacedRows(rows, self.weight.to(device))


@dataclass(frozen=True, slots=True)
class ReplacedParameters:
    """All that one adapter replaces, by site."""

    sites: Mapping[str, tuple[ReplacedRows, ...]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.sites.values() for part in parts)


class ReplacementTable:
    """The replaced parameters of the adapters on the device, by slot. Each layer reads those of its own site."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sites: dict[str, dict[int, tuple[ReplacedRows, ...]]] = {}
        self.slots: set[int] = set()  # those with anything in here

    def at(self, site: str) -> Mapping[int, tuple[ReplacedRows, ...]]:
        """The parameters replaced at one site, by slot: a live view, empty while nothing is replaced."""
        return self._sites.setdefault(site, {})

    def put(self, slot: int, packed: object) -> None:
        assert isinstance(packed, ReplacedParameters)
        self.slots.add(slot)
        for site, parts in packed.sites.items():
            self._sites[site][slot] = tuple(part.to(self._device) for part in parts)

    def remove(self, slot: int) -> None:
        if slot in self.slots:
            self.slots.remove(slot)
            for held in self._sites.values():
                held.pop(slot, None)


class ReplacementSite:
    """The pool's interface for an adapter's replaced parameters."""

    def __init__(self, device: torch.device) -> None:
        self.table = ReplacementTable(device)
