"""The fields of a JSON file of a model, read with their types checked."""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_engine.checkpoint.model_config import ModelError

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38  # the smallest that all devices keep: below, some take numbers for 0
MAX_SHOWN = 512  # characters of a name or a value in an error: a file may hold millions


def shortened(text: str) -> str:
    """What of a file's text is shown in an error."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


class ConfigFields:
    """One object of the file. A null field counts as absent; errors name the file and the field."""

    def __init__(self, raw: Mapping[str, object], where: str) -> None:
        self._raw = raw
        self.where = where

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigFields:
        """The same fields over a family's defaults. A field that is there and null hides the default."""
        return ConfigFields({**defaults, **self._raw}, self.where)

    def changed_by(self, other: ConfigFields) -> ConfigFields:
        """The same fields, with those of the other object replacing them."""
        return ConfigFields({**self._raw, **other._raw}, self.where)

    def has(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, value, f"an integer of at least {minimum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not FLOAT32_TINY <= value <= FLOAT32_MAX:
            raise self.error(name, value, "a positive number within the range of float32")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def number_or_zero(self, name: str) -> float:
        """A field whose 0 stands for its absence."""
        return self.number(name) if self._raw.get(name) else 0.0

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of strings")
        return tuple(value)

    def texts_or_text(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name)
        return (value,) if isinstance(value, str) else self.texts(name)

    def text_or_none(self, name: str) -> str | None:
        return self.text(name) if self.has(name) else None

    def optional_group(self, name: str) -> int | None:
        """A number of columns; -1 and absent mean all of them."""
        size = self.integer(name, -1, minimum=-1)
        return size if size > 0 else None

    def agrees(self, other: ConfigFields, name: str) -> bool:
        return self._raw.get(name) == other._raw.get(name)

    def signed_number(self, name: str) -> float:
        value = self._raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -FLOAT32_MAX <= value <= FLOAT32_MAX:
            raise self.error(name, value, "a number within the range of float32")
        return float(value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self._get(name, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(name, value, "a list of integers")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers that is not empty."""
        value = self._raw.get(name)
        if not isinstance(value, list) or not value:
            raise self.error(name, value, "a list of positive numbers")
        return tuple(
            ConfigFields({f"{name}[{place}]": each}, self.where).number(f"{name}[{place}]")
            for place, each in enumerate(value)
        )

    def raw(self) -> Mapping[str, object]:
        """The object as it is in the file."""
        return self._raw

    def names(self) -> tuple[str, ...]:
        return tuple(self._raw)

    def section(self, name: str) -> ConfigFields | None:
        value = self._raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return ConfigFields(value, f"{self.where}: {shortened(name)}")

    def filled_section(self, name: str) -> ConfigFields | None:
        """A section; None: it is absent or empty."""
        section = self.section(name)
        return section if section is not None and section.names() else None

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A field that is one id, a list of them, or absent."""
        value = self._raw.get(name)
        if value is None:
            return ()
        items: list[object] = value if isinstance(value, list) else [value]
        ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
        if len(ids) != len(items):
            raise self.error(name, value, "a token id or a list of them")
        return tuple(item for item in ids if item >= 0)  # -1 stands for "none" in some old files

    def error(self, name: str, value: object, wanted: str) -> ModelError:
        state = "is missing" if value is None else f"is {shortened(repr(value))}"
        return ModelError(f"{self.where}: {shortened(name)} {state}; it must be {wanted}")

    def _get(self, name: str, default: object) -> object:
        value = self._raw.get(name)
        return default if value is None else value
