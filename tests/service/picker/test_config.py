"""The picker's file: every mistake is named at once."""

from pathlib import Path

import pytest

from loraplex_service.config_file import ConfigError
from loraplex_service.picker.config import PickerConfig, ReplicasConfig, load_picker_config

REPLICAS = "replicas: [{host: loraplex-replicas}]\n"


def load(directory: Path, text: str) -> PickerConfig:
    file = directory / "picker.yaml"
    file.write_text(text)
    return load_picker_config(file)


def test_a_host_is_enough(tmp_path: Path) -> None:
    assert load(tmp_path, REPLICAS) == PickerConfig(replicas=(ReplicasConfig("loraplex-replicas"),))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("listen: 127.0.0.1:1\n", "replicas"),
        ("replicas: []\n", "name at least one host"),
        ("replicas: [{host: ''}]\n", r"replicas\[0\]: host is empty"),
        ("replicas: [{host: a..b}]\n", r"replicas\[0\]: host 'a\.\.b' is no name"),
        (f"replicas: [{{host: {'a' * 64}}}]\n", "is no name"),
        ("replicas: [{host: a}, {host: b}, {host: a}]\n", r"replicas\[2\] is the same as one before"),
        ("replicas: [{host: a, data_port: 0}]\n", r"replicas\[0\]: data_port 0 must be from 1"),
        ("replicas: [{host: a, dataport: 1}]\n", "did you mean 'data_port'"),
        (REPLICAS + "listen: 0.0.0.0:9002\n", "set insecure: true"),
        (REPLICAS + "listen: 9002\n", "listen"),
        (REPLICAS + "metrics_listen: '127.0.0.1:x'\n", "metrics_listen"),
        (REPLICAS + "scrape_seconds: 2.0\n", "twice scrape_seconds"),
        (REPLICAS + "scrape_seconds: 0.0\n", "scrape_seconds 0.0 must be from 0.001"),
        (REPLICAS + "balance_factor: 0.5\n", "balance_factor 0.5 must be from 1"),
        (REPLICAS + "queue: -1\n", "queue -1"),
        (REPLICAS + "log_level: LOUD\n", "log_level 'LOUD'"),
        (REPLICAS + REPLICAS, "replicas"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, text)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"queue.*balance_factor"):
        load(tmp_path, REPLICAS + "queue: -1\nbalance_factor: 0.5\n")
