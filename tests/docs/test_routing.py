"""The page for routers: its configurations are read by what they are for."""

from pathlib import Path

from loraplex_service.picker.config import load_picker_config
from tests.docs.pages import ROOT, blocks
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
