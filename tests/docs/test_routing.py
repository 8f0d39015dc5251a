"""The page for routers: its configurations are read by what they are for."""

import re
from pathlib import Path

import msgspec

from loraplex_service.picker.config import PickerConfig, ReplicasConfig, load_picker_config
from tests.docs.pages import ROOT, blocks, section, table_rows
from tests.envoy import assert_envoy_takes

PAGE = ROOT / "docs" / "routing.md"


def test_the_picker_reads_its_example(tmp_path: Path) -> None:
    [block] = [block for block in blocks("yaml") if block.page == PAGE and block.text.startswith("replicas:")]
    file = tmp_path / "picker.yaml"
    file.write_text(block.text)
    assert load_picker_config(file).replicas[0].http_port == 8000


def test_envoy_takes_its_example(tmp_path: Path) -> None:
    [block] = [block for block in blocks("yaml") if block.page == PAGE and block.text.startswith("static_resources:")]
    assert_envoy_takes(block.text, tmp_path)


def test_the_page_has_every_key_of_the_picker() -> None:
    text = section(PAGE, "## The endpoint picker")
    named = {key for row in table_rows(text) for key in re.findall(r"`(\w+)`", row[0])}
    assert named == {field.name for field in msgspec.structs.fields(PickerConfig)}
    assert all(f"`{field.name}`" in text for field in msgspec.structs.fields(ReplicasConfig))
