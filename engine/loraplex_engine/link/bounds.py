"""What the numbers and the choices of a configuration may be, as its classes state it. Torch-free.

A class states it in two class variables, by the name of the field: `BOUNDS` and `CHOICES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The numbers from `least` to `most`, and 0 where that makes sense beside them."""

    least: float
    most: float = math.inf
    zero: bool = False

    def has(self, value: float) -> bool:
        """Whether a value is one of them."""
        return math.isfinite(value) and (self.least <= value <= self.most or (self.zero and value == 0))

    def __str__(self) -> str:
        """Which they are, as in "must be from 1 to 32"."""
        zero = "0, or " if self.zero else ""
        if self.most == math.inf:
            return f"{zero}at least {_written(self.least)}"
        return f"{zero}from {_written(self.least)} to {_written(self.most)}"


AT_LEAST_1 = Bounds(1)


def choice_problems(section: Any) -> Iterator[str]:
    """Name each field, or item of a field, of a section that is none of its CHOICES. What is None was left out."""
    for name, choices in section.CHOICES.items():
        value = getattr(section, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and each not in choices:
                yield f"{name} {each!r} is not one of {', '.join(choices)}"


def bound_problems(section: Any) -> Iterator[str]:
    """Name each number of a section that is beyond its BOUNDS. What is None was left out."""
    for name, bounds in section.BOUNDS.items():
        value = getattr(section, name)
        if value is not None and not bounds.has(value):
            yield f"{name} {value} must be {bounds}"


def _written(number: float) -> str:
    return f"{number:f}".rstrip("0").rstrip(".")
