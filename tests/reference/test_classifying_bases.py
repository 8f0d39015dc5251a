"""Base models with a classification head of their own, against transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_engine.link.pooling import ClassifierFacts, PoolingMethod, PoolingParams
from loraplex_engine.models.registry import FAMILIES as NATIVE
from tests.reference.peft_oracle import ALL, FAMILIES, Oracle, random_prompt, randomised
from tests.reference.test_classification import SEQUENCE, TOKENS, Classifier
from tests.reference.test_model_logits import MODELS
from tests.reference.wrappers import WRAPPED

transformers = pytest.importorskip("transformers")

CLASSES = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
}
# On the base of each kind: one that leaves the head to the base, and those that bring their own.
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "sequence": {
        "plain": {"task_type": "FEATURE_EXTRACTION", "target_modules": ALL},
        "trained": {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "down_proj"]},
        "dora": {"task_type": "SEQ_CLS", "target_modules": ["up_proj"], "use_dora": True},
    },
    "token": {
        "plain": {"task_type": "FEATURE_EXTRACTION", "target_modules": ALL},
        "trained": {"task_type": "TOKEN_CLS", "target_modules": ["v_proj", "down_proj"]},
    },
}
WANTED = {"sequence": SEQUENCE, "token": TOKENS}


def base_of(kind: str, class_config: Any, folder: Path, num_labels: int) -> Oracle:
    """A small random classifier with this config, in `folder`/base."""
    class_config.num_labels = num_labels
    randomised(CLASSES[kind].from_config(class_config), 0).save_pretrained(folder / "base")
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return Oracle(folder, {None: None}, {None: CLASSES[kind].from_pretrained(folder / "base", **options).eval()})


@pytest.mark.parametrize(
    ("kind", "family"), [("sequence", "llama"), ("sequence", "qwen3-tied"), ("sequence", "gemma3"), ("token", "llama")]
)
def test_the_base_classifies_beside_the_heads_of_adapters_and_embeds(kind: str, family: str, tmp_path: Path):
    oracle = base_of(kind, FAMILIES[family]().config, tmp_path, num_labels=4)
    for seed, (name, fields) in enumerate(ADAPTERS[kind].items(), start=1):
        oracle.add(name, fields, seed)
    engine = Classifier(oracle, max_num_batched_tokens=48)
    assert engine.core.limits.classifier == ClassifierFacts(4, kind == "token")
    targets: list[str | None] = [None, *ADAPTERS[kind]]
    for index, target in enumerate(targets * 4):
        engine.classify(random_prompt(1 + 9 * index % 50, index), target, WANTED[kind])
        engine.embed(random_prompt(1 + index, 50 + index), target, PoolingParams(normalize=True))
        engine.embed(random_prompt(2 + index, 70 + index), target, PoolingParams(method=PoolingMethod.MEAN))
    engine.finish()
    engine.check()


def sequence_classifiers() -> dict[str, Any]:
    """A config of each native family whose class for sequences transformers has, by that class's name."""
    native = {name for family in NATIVE for name in family.architectures}
    found: dict[str, Any] = {}
    for make in MODELS.values():
        model = make()
        cls = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
        if type(model).__name__ in native and cls is not None:
            found.setdefault(cls.__name__, model.config)
    return found


CONFIGS = sequence_classifiers()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_of_every_family_is_computed_as_by_transformers(name: str, tmp_path: Path):
    check_alone(base_of("sequence", CONFIGS[name], tmp_path, num_labels=3), max_model_len=60)


def test_a_classifier_with_a_tower_is_computed_for_text(tmp_path: Path):
    check_alone(base_of("sequence", WRAPPED["gemma3_with_vision"]().config, tmp_path, num_labels=1), max_model_len=60)


def check_alone(oracle: Oracle, **fields: Any) -> None:
    engine = Classifier(oracle, max_num_batched_tokens=16, **fields)
    ids = engine.core.limits.vocab_size - 1
    for index in range(4):
        prompt = [1 + token % ids for token in random_prompt(1 + 13 * index, index)]  # 0 pads: transformers reads on
        engine.classify(prompt, None, SEQUENCE)
    engine.finish()
    engine.check()
