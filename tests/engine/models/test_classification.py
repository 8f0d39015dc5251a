"""Checkpoints with a classification head in place of a language model's: what is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_engine.checkpoint.model_config import ModelError, UnknownArchitectureError
from loraplex_engine.checkpoint.shard import WHOLE
from loraplex_engine.core import EngineCore
from loraplex_engine.execution.memory_profile import largest_step
from loraplex_engine.execution.sizing import needs_of, weight_bytes
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput
from loraplex_engine.link.pooling import ClassifierFacts
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.models import parse_model_config, read_model_config
from tests.engine.models.test_loading import CONFIG, change, checkpoint, load

SEQUENCES, TOKENS = "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"


def parse(architecture: str, **changes: Any) -> Any:
    return parse_model_config({**CONFIG, "architectures": [architecture], **changes}, "config.json")


def classifier(directory: Path, **changes: Any) -> Path:
    return checkpoint(directory, **{"architectures": [SEQUENCES], "num_labels": 3, **changes})


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        (SEQUENCES, {}, ClassifierFacts(2, each_token=False)),
        (SEQUENCES, {"id2label": {"0": "bad", "1": "fair", "2": "good"}}, ClassifierFacts(3, each_token=False)),
        (SEQUENCES, {"num_labels": 1}, ClassifierFacts(1, each_token=False)),
        (TOKENS, {"num_labels": 5}, ClassifierFacts(5, each_token=True)),
        ("Gemma3TextForSequenceClassification", {"head_dim": 4}, ClassifierFacts(2, each_token=False)),
    ],
)
def test_a_head_is_read_from_what_the_file_says(architecture: str, fields: dict[str, Any], expected: Any) -> None:
    config = parse(architecture, **fields)
    assert (config.architecture, config.classifier, config.generates) == (architecture, expected, False)


def test_a_head_for_tokens_may_lack_its_bias() -> None:
    assert parse(TOKENS).classifier_bias
    assert not parse(TOKENS, token_classification_bias=False).classifier_bias
    assert not parse(SEQUENCES).classifier_bias


def test_labels_are_those_of_the_file(tmp_path: Path) -> None:
    labels = {"0": "bad", "1": "fair", "2": "good"}
    assert read_model_config(classifier(tmp_path, id2label=labels)).labels == ("bad", "fair", "good")


@pytest.mark.parametrize(
    ("architecture", "kind", "problem"),
    [
        ("BertForSequenceClassification", UnknownArchitectureError, "not supported: BertForSequenceClassification"),
        ("Qwen3NextForSequenceClassification", ModelError, "Qwen3NextForCausalLM: some of its layers keep a state"),
        ("LlamaForQuestionAnswering", UnknownArchitectureError, "not supported: LlamaForQuestionAnswering"),
    ],
)
def test_a_classifier_of_another_decoder_is_refused_by_name(
    architecture: str, kind: type[ModelError], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        parse(architecture)


def test_a_head_of_other_labels_than_stated_is_refused_by_name(tmp_path: Path) -> None:
    change(classifier(tmp_path), **{"score.weight": torch.zeros(4, 16)})
    with pytest.raises(ModelError, match=r"score.weight is \[4, 16\], config.json makes it \[3, 16\]"):
        load(tmp_path)


def test_a_head_with_a_value_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    change(classifier(tmp_path), **{"score.weight": torch.full((3, 16), float("nan"))})
    with pytest.raises(ModelError, match=r"score.weight holds NaN or infinite values"):
        load(tmp_path)


@pytest.mark.parametrize(
    "asked", [{"head_quantization": "int8"}, {"drafts": DraftConfig(kind=DraftKind.NGRAM)}], ids=["head", "drafts"]
)
def test_what_only_a_language_model_can_use_is_refused_by_name(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(
        ModelError, match=f"{next(iter(asked))} is asked for, and {SEQUENCES} has a classification head"
    ):
        load(classifier(tmp_path), **asked)


def test_no_head_of_a_language_model_is_there_for_adapters(tmp_path: Path) -> None:
    model = load(classifier(tmp_path))
    assert "lm_head" not in model.lora_targets()
    assert "lm_head" not in model.lora_sites()
    assert not model.capturable


def test_generation_is_refused_by_name(tmp_path: Path) -> None:
    core = EngineCore.load(EngineConfig(model=str(classifier(tmp_path)), kv_cache_bytes=1 << 20, block_size=4))
    core.add(AddRequest(1, [1, 2], SamplingParams(seed=0, max_tokens=3)))
    outputs: list[RequestOutput] = []
    while core.has_work():
        outputs += [each for message in core.step() if isinstance(message, StepOutput) for each in message.outputs]
    core.close()
    assert [each.error for each in outputs] == [f"{SEQUENCES} has a classification head, and generates no text"]


def test_the_bytes_of_a_model_without_a_head_of_words_are_foretold(tmp_path: Path) -> None:
    model = load(classifier(tmp_path))
    config = EngineConfig(model=str(tmp_path))
    assert weight_bytes(read_model_config(tmp_path), torch.float32, config, WHOLE) == model.nbytes
    assert needs_of(config, tmp_path).weights == model.nbytes


def test_the_largest_step_of_a_classifier_draws_nothing() -> None:
    config = EngineConfig(model="", max_num_seqs=3, max_num_batched_tokens=32)
    plan = largest_step(config, max_model_len=64, block_size=4, draws=False)
    assert plan.num_tokens == 32
    assert not any(item.samples for item in plan.scheduled)
