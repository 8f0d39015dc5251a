"""docs/models.md names every architecture that loads, and no other, and says of each what is so."""

import re
from typing import Any

import pytest

from loraplex_adapters.runtime.targets import TargetKind
from loraplex_engine.checkpoint.gguf_config import ARCHITECTURES as OF_GGUF
from loraplex_engine.checkpoint.shard import WHOLE
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.layout import lora_targets
from loraplex_engine.models.registry import ARCHITECTURES, FAMILIES
from tests.docs.pages import ROOT
from tests.reference.borrowed import BORROWED

PAGE = ROOT / "docs" / "models.md"
HEADING = "\n## Everything else"
USUAL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ONES = {"qkv_proj", "gate_up_proj"}  # that adapters may name beside the parts of them
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_the_table_has_what_loads() -> None:
    named = re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", native_part())
    assert sorted(named) == sorted(ARCHITECTURES)


def test_what_transformers_computes_is_named_if_it_is_compared() -> None:
    named = re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", borrowed_part())
    compared = {type(make()).__name__ for make in BORROWED.values()}
    assert set(named) <= compared
    assert compared <= {*named, *ARCHITECTURES}


def test_no_architecture_is_said_to_be_computed_in_both_ways() -> None:
    assert not set(re.findall(r"`(\w+ForCausalLM)`", borrowed_part())) & set(ARCHITECTURES)


def native_part() -> str:
    return PAGE.read_text().partition(HEADING)[0]


def borrowed_part() -> str:
    return PAGE.read_text().partition(HEADING)[2]


def rows() -> dict[str, tuple[str, str]]:
    """What the table says of each architecture: what adapters name there, and the name in GGUF files."""
    found = {}
    for line in native_part().splitlines():
        if line.startswith("|") and line.count("|") == 6:
            _, architectures, adapters, gguf, _ = line.strip("|").split("|")
            found.update(dict.fromkeys(re.findall(r"`(\w+For\w+)`", architectures), (adapters, gguf)))
    return found


@pytest.mark.parametrize("architecture", [name for family in FAMILIES for name in family.architectures])
def test_adapters_name_what_the_table_says(architecture: str) -> None:
    said, _ = rows()[architecture]
    if "(#experts)" in said:
        return
    targets = lora_targets(parse_model_config({"architectures": [architecture], **SHAPE}, "config.json"), WHOLE)
    linears = [path for path, target in targets.items() if target.kind is TargetKind.LINEAR and ".layers." in path]
    names = {path.rpartition(".")[2] for path in linears}
    listed = set(re.findall(r"`(\w+)`", said))
    expected = USUAL - listed if "the usual" in said else listed
    assert expected <= names
    assert names - expected <= ONES


def test_gguf_files_of_every_architecture_are_named() -> None:
    said = {name for _, gguf in rows().values() for name in re.findall(r"`([\w-]+)`", gguf)}
    assert said == OF_GGUF.keys()
    for name, read in OF_GGUF.items():
        if isinstance(read.name, str):
            assert f"`{name}`" in rows()[read.name][1]
