"""Reads a configuration file as YAML."""

from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """The configuration cannot be used. The message names each mistake and its place."""


class _Loader(yaml.SafeLoader):
    """Notes keys that appear twice in a mapping: YAML would use the last one without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = self.construct_object(key) if key.tag in self.yaml_constructors else key.value  # such as <<
            line = key.start_mark.line + 1
            if name in lines:
                self.problems.append(f"the key {name!r} appears twice, in line {lines[name]} and in line {line}")
            lines.setdefault(name, line)
        return node


def read_yaml(file: Path, needed: str = "models") -> tuple[dict[str, Any], list[str]]:
    """Return the content of the file, and its keys that appear twice. Raises ConfigError.

    `needed`: a key that no such file does without.
    """
    try:
        loader = _Loader(file.read_text())
        fields = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file}: a mapping is expected, with at least `{needed}:`")
    return fields, loader.problems
