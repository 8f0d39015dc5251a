"""The examples of the documentation are read by what they are written for."""

import json
import re
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import yaml

from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.errors_pb2 import ErrorReason
from loraplex_service.config import ServiceConfig
from loraplex_service.telemetry.records import AppliedAdapter, GenerationRecord
from tests.docs.pages import PAGES, ROOT, Block, blocks, prose

# The chart's values are read by its tests, and what is for routers by those of that page.
OTHERS = (ROOT / "helm" / "loraplex" / "README.md", ROOT / "docs" / "routing.md")
CONFIGURATIONS = [block for block in blocks("yaml") if block.page not in OTHERS]
A_MODEL = {"models": [{"name": "storyteller", "model": "/models/storyteller"}]}


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
def test_a_piece_of_configuration_is_one(block: Block) -> None:
    fields: dict[str, Any] = yaml.safe_load(block.text)
    msgspec.convert(A_MODEL | fields, ServiceConfig)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_piece_of_python_is_python(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_piece_of_json_is_json(block: Block) -> None:
    json.loads(block.text)


def test_the_usage_record_has_the_fields_that_records_have() -> None:
    [example] = [json.loads(block.text) for block in blocks("json") if block.page.name == "configuration.md"]
    assert example.keys() == {field.name for field in msgspec.structs.fields(GenerationRecord)}
    assert example["adapters"][0].keys() == {field.name for field in msgspec.structs.fields(AppliedAdapter)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_reasons_of_errors_are_ones_of_the_contract(page: Path) -> None:
    reasons = {value.name.removeprefix("ERROR_REASON_") for value in ErrorReason.DESCRIPTOR.values}
    codes = {code.name for code in grpc.StatusCode}
    states = {value.name.removeprefix("STATE_") for value in Adapter.State.DESCRIPTOR.values}
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", prose(page)))
    others = {name for name in named if name.startswith(("LORAPLEX_", "AWS_", "HF_", "LWS_", "NCCL_", "POD_"))}
    assert named - others <= reasons | codes | states
