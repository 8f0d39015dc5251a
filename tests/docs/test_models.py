"""docs/models.md names every architecture that loads, and no other, and says of each what is so."""

import json
import re
from typing import Any

import pytest

from loraplex_adapters.runtime.targets import TargetKind
from loraplex_engine.checkpoint.gguf_config import ARCHITECTURES as OF_GGUF
from loraplex_engine.checkpoint.model_config import ModelConfig, ModelError
from loraplex_engine.checkpoint.shard import WHOLE
from loraplex_engine.models import parse_model_config
from loraplex_engine.models.layout import lora_targets
from loraplex_engine.models.refused import REFUSED
from loraplex_engine.models.registry import ARCHITECTURES, FAMILIES
from loraplex_engine.models.wrappers import WRAPPERS
from tests.docs.pages import ROOT
from tests.docs.traits import described
from tests.reference.borrowed import BORROWED
from tests.reference.test_model_logits import MODELS
from tests.reference.wrappers import WRAPPED

PAGE = ROOT / "docs" / "models.md"
WIDESPREAD = ROOT / ".." / "shared" / "data" / "architectures.md"
HEADING = "\n## Everything else"
USUAL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ONES = {"qkv_proj", "gate_up_proj"}  # that adapters may name beside the parts of them
NATIVE = [name for family in FAMILIES for name in family.architectures]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def compared() -> dict[str, list[ModelConfig]]:
    """The configs of the models that `tests/reference/test_model_logits.py` loads and compares, by architecture."""
    found: dict[str, list[ModelConfig]] = {}
    for name, make in MODELS.items():
        model = make()
        architecture = type(model).__name__
        if architecture in NATIVE:
            raw = {**json.loads(model.config.to_json_string()), "architectures": [architecture]}
            found.setdefault(architecture, []).append(parse_model_config(raw, name))
    return found


def test_of_every_family_models_are_compared(compared: dict[str, list[ModelConfig]]) -> None:
    assert not [family for family in FAMILIES if not compared.keys() & set(family.architectures)]
    assert {wrapper.architecture for wrapper in WRAPPERS} == {type(make()).__name__ for make in WRAPPED.values()}


def test_the_table_says_what_the_compared_models_have(compared: dict[str, list[ModelConfig]]) -> None:
    by_row: dict[str, list[ModelConfig]] = {}
    for architecture, (row, *_) in rows().items():
        by_row.setdefault(row, []).extend(compared.get(architecture, []))
    said = {row: text for row, _, _, text in rows().values()}
    assert said == {row: described(configs) for row, configs in by_row.items()}


def test_the_table_has_what_loads() -> None:
    named = re.findall(r"`(\w+For(?:CausalLM|ConditionalGeneration))`", native_part())
    assert sorted(named) == sorted(ARCHITECTURES)


def test_what_transformers_computes_is_named_if_it_is_compared() -> None:
    named = re.findall(r"^\| [^|`]+ \| `(\w+(?:ForCausalLM|LMHeadModel))` \|", borrowed_part(), re.MULTILINE)
    compared = {type(make()).__name__ for make in BORROWED.values()}
    assert set(named) <= compared
    assert compared <= {*named, *ARCHITECTURES}


def test_the_refused_are_named_with_the_reason() -> None:
    rows = re.findall(r"^\| (`\w+For\w+`(?:, `\w+`)*) \| ([^|`]+) \|$", borrowed_part(), re.MULTILINE)
    assert {name: why for names, why in rows for name in re.findall(r"`(\w+)`", names)} == REFUSED


def test_no_architecture_is_said_to_be_computed_in_both_ways() -> None:
    named = re.findall(r"^\|.*`(\w+ForCausalLM)`", borrowed_part(), re.MULTILINE)
    assert not set(named) & set(ARCHITECTURES)


def native_part() -> str:
    return PAGE.read_text().partition(HEADING)[0]


def borrowed_part() -> str:
    return PAGE.read_text().partition(HEADING)[2]


def rows() -> dict[str, tuple[str, str, str, str]]:
    """What the table says of each architecture: the models, what adapters name there, the name in GGUF files, and what
    is beside Llama's layers."""
    found = {}
    for line in native_part().splitlines():
        if line.startswith("|") and line.count("|") == 6:
            models, architectures, adapters, gguf, beside = (cell.strip() for cell in line.strip("|").split("|"))
            of_row = models, adapters, gguf, beside
            found.update(dict.fromkeys(re.findall(r"`(\w+For\w+)`", architectures), of_row))
    return found


def test_experts_and_latents_are_named_where_adapters_reach_them(compared: dict[str, list[ModelConfig]]) -> None:
    for architecture, configs in compared.items():
        _, said, *_ = rows()[architecture]
        kinds = {target.kind for config in configs for target in lora_targets(config, WHOLE).values()}
        assert ("(#experts)" in said) == (TargetKind.EXPERT in kinds)
        latent = any(config.latent for config in configs)
        assert latent == ("(#latent-attention)" in said or "kv_b_proj" in said)


@pytest.mark.parametrize("architecture", NATIVE)
def test_adapters_name_what_the_table_says(architecture: str) -> None:
    _, said, *_ = rows()[architecture]
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
    said = {name for _, _, gguf, _ in rows().values() for name in re.findall(r"`([\w-]+)`", gguf)}
    assert said == OF_GGUF.keys()
    for name, read in OF_GGUF.items():
        if isinstance(read.name, str):
            assert f"`{name}`" in rows()[read.name][2]


def widespread() -> list[str]:
    """The architectures that people download most, as a list of them names each in its second column."""
    if not WIDESPREAD.exists():
        return []
    return re.findall(r"^\| [^|]+ \| (\w+For\w+|\w+LMHeadModel) \|", WIDESPREAD.read_text(), re.MULTILINE)


@pytest.mark.parametrize("architecture", widespread())
def test_a_widespread_architecture_loads_or_is_refused_with_the_reason(architecture: str) -> None:
    of_transformers = {type(make()).__name__ for make in BORROWED.values()}
    if architecture in ARCHITECTURES or architecture in of_transformers:
        return
    with pytest.raises(ModelError, match=f"{architecture}: {re.escape(REFUSED[architecture])}"):
        parse_model_config({"architectures": [architecture], **SHAPE}, "config.json")
