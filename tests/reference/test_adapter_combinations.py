"""Adapters that combine features as PEFT permits, drawn at random, against PEFT itself: mixed in chunks of one batch.

LORAPLEX_ADAPTER_COMBINATIONS: how many batches are drawn for each base model.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from tests.engine.quantization.checkpoints import MODEL, make_twins
from tests.engine.quantization.formats import FORMATS
from tests.reference.peft_oracle import (
    ALL,
    FAMILIES,
    INVOCATION,
    VOCAB,
    Engine,
    Oracle,
    make_base,
    random_prompt,
    read_base,
)
from tests.reference.test_quantised_adapters import dequantised

NUM_BATCHES = int(os.environ.get("LORAPLEX_ADAPTER_COMBINATIONS", "3"))
ADAPTERS_OF_BATCH = 3
NORMS = ["model.norm", "input_layernorm", "post_attention_layernorm"]
VOCABULARY = ["embed_tokens", "lm_head"]
PATTERNS = ["layers.1.self_attn.q_proj", r".*\.0\..*_proj", r"layers\.[01]\.mlp\..*", "self_attn.[kv]_proj"]
COMMON_TOKENS = 40  # prompts hold no others, so that those which adapters train come up
TOKEN_IDS = st.lists(st.integers(0, COMMON_TOKENS - 1), min_size=1, max_size=6, unique=True)


@dataclass(frozen=True)
class Base:
    """A model, what the engine reads it from, and what it is told about it."""

    directory: Path
    model: Any
    quantization: str | None = None
    max_model_len: int = 96


@pytest.fixture(scope="module", params=[*FAMILIES, "nf4"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("combinations")
    if request.param in FAMILIES:
        return Base(folder / "base", make_base(request.param, folder))
    twins = make_twins(folder, *FORMATS["gptq"], vocab_size=VOCAB)
    twins.dense.rename(folder / "base")
    dequantised(folder / "base", twins.dense, request.param)
    return Base(folder / "base", read_base(twins.dense), request.param, MODEL["max_position_embeddings"])


def subsets(names: list[str], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=most, unique=True)


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a LoraConfig. PEFT refuses some of them, which the test passes over."""
    is_activated = draw(st.integers(0, 4)) == 0
    modules = [*ALL, "lm_head"] if is_activated else [*ALL, *VOCABULARY]
    targets = draw(subsets(modules, 6).filter(bool))
    fields: dict[str, Any] = {
        "target_modules": targets,
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from([1, 6, 9])),
        "use_rslora": draw(st.booleans()),
    }
    patterns = st.sampled_from([*targets, *PATTERNS])
    optional: dict[str, st.SearchStrategy[Any]] = {
        "rank_pattern": st.dictionaries(patterns, st.integers(1, 7), max_size=3),
        "alpha_pattern": st.dictionaries(patterns, st.integers(1, 12), max_size=3),
        "layers_to_transform": st.sampled_from([0, [1]]),
        "exclude_modules": st.sampled_from([["o_proj"], ["layers.0.mlp.up_proj"]]),
    }
    if is_activated:
        fields["alora_invocation_tokens"] = INVOCATION
        optional["lora_bias"] = st.just(True)
    else:
        fields[draw(st.sampled_from(["use_dora", "lora_bias", "lora_bias"]))] = draw(st.booleans())
        optional |= {
            "bias": st.sampled_from(["all", "lora_only"]),
            "modules_to_save": subsets([name for name in (*NORMS, *VOCABULARY, *ALL) if name not in targets], 3),
            "trainable_token_indices": TOKEN_IDS
            | st.dictionaries(st.sampled_from(VOCABULARY), TOKEN_IDS, min_size=1, max_size=2),
        }
    for name, values in optional.items():
        if draw(st.booleans()):
            fields[name] = draw(values)
    return fields


@settings(max_examples=NUM_BATCHES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_combined_features_equal_peft(base: Base, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        oracle = Oracle(Path(folder), {None: None}, {None: base.model})
        (oracle.folder / "base").symlink_to(base.directory)
        for seed in range(ADAPTERS_OF_BATCH):
            add_one(oracle, data.draw(combinations()), seed)
        assume(len(oracle.keys) > 1)  # a batch of the base model alone would say nothing
        engine = Engine(
            oracle,
            kernels="cpu",
            quantization=base.quantization,
            max_model_len=base.max_model_len,
            max_num_batched_tokens=data.draw(st.sampled_from([6, 16, 64])),
            max_resident_adapters=data.draw(st.sampled_from([2, 8])),
        )
        try:
            for index, adapter in enumerate([*oracle.keys, *reversed(oracle.keys)]):
                length = data.draw(st.integers(2, 24))
                invoked_at = data.draw(st.integers(0, length - len(INVOCATION)))
                prompt = [token % COMMON_TOKENS for token in random_prompt(length, index, invoked_at)]
                engine.add(prompt, adapter, data.draw(st.integers(1, 4)))
                if data.draw(st.booleans()):
                    engine.step()
            engine.finish()
            engine.check()
        finally:
            engine.core.close()


def add_one(oracle: Oracle, fields: dict[str, Any], seed: int) -> None:
    """Unless PEFT does not allow it, cannot compute it, or cannot read what it saved: it sorts patterns, of which the
    first one counts."""
    name = f"{'activated-' if 'alora_invocation_tokens' in fields else ''}{seed}"
    try:
        oracle.add(name, fields, seed + 1)
        oracle.logits(name, INVOCATION, 1)
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        oracle.keys.pop(name, None)
        note(f"{name} is refused by PEFT: {error}")
    except RuntimeError as error:
        if "size mismatch for" not in str(error):
            raise
        note(f"{name} cannot be read back by PEFT: {error}")
    else:
        note(f"{name}: {fields}")
