"""Models with a classification head in place of a language model's: the decoder is that of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loraplex_adapters.runtime.classifier import ClassifierHead
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig
from loraplex_engine.checkpoint.weights import Checkpoint
from loraplex_engine.link.pooling import ClassifierFacts
from loraplex_engine.models.layout import CLASSIFIER, CLASSIFIER_BIAS

EACH_TOKEN = {"ForSequenceClassification": False, "ForTokenClassification": True}  # by the end of the class's name
USUAL_LABELS = 2  # of a file that names none, as in transformers


def language_model_of(architecture: str, raw: Mapping[str, object]) -> str | None:
    """What transformers calls the language model with the decoder of a classifier; None: it is no classifier."""
    for end in EACH_TOKEN:
        if architecture.endswith(end):
            stem = architecture.removesuffix(end)
            if "text_config" in raw:  # a model with towers
                return f"{stem}ForConditionalGeneration"
            return f"{stem.removesuffix('Text')}ForCausalLM"
    return None


def with_classifier(config: ModelConfig, architecture: str, raw: Mapping[str, object], where: str) -> ModelConfig:
    """The language model `config` with the head of the classifier `architecture` in place of its own."""
    fields, named = ConfigFields(raw, where), raw.get("id2label")
    each_token = next(each for end, each in EACH_TOKEN.items() if architecture.endswith(end))
    num_labels = fields.integer("num_labels", len(named) if isinstance(named, dict) and named else USUAL_LABELS)
    return replace(
        config,
        architecture=architecture,
        head_bias=False,
        classifier=ClassifierFacts(num_labels, each_token),
        classifier_bias=each_token and fields.flag("token_classification_bias", True),
    )


def load_classifier(config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> ClassifierHead | None:
    """The model's classification head, in float32 like those of adapters; None: it has none."""
    if config.classifier is None:
        return None
    weight = checkpoint.stacked([(CLASSIFIER, ())], torch.float32, device)
    bias = checkpoint.stacked([(CLASSIFIER_BIAS, ())], torch.float32, device) if config.classifier_bias else None
    return ClassifierHead(weight, bias, config.classifier.each_token)
