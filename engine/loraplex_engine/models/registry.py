"""The model families, and which of them a checkpoint belongs to. A new family is one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelConfig, ModelError
from loraplex_engine.checkpoint.pooling import read_pooling
from loraplex_engine.checkpoint.weights import read_json
from loraplex_engine.models import (
    arcee,
    cwm,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    granite,
    helium,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from loraplex_engine.models.reading import Family, text_fields
from loraplex_engine.models.rope_reading import with_rope_scaling

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
    olmo2.FAMILY_3,
    exaone4.FAMILY,
    glm4.FAMILY,
    glm4.FAMILY_4,
    ernie4_5.FAMILY,
    helium.FAMILY,
    seed_oss.FAMILY,
    cwm.FAMILY,
    arcee.FAMILY,
)


def read_model_config(directory: Path, rope_scaling: Mapping[str, object] | None = None) -> ModelConfig:
    """The model in a directory. Raises ModelError if it is of no known family, or its config.json makes no sense.

    rope_scaling: replaces the file's.

    Ends of sequence are those of config.json and of generation_config.json together: instruction-tuned models often
    state the end of a turn only in the latter.
    """
    raw = read_json(directory / "config.json")
    if rope_scaling is not None:
        raw = with_rope_scaling(raw, rope_scaling)
    config = parse_model_config(raw, str(directory / "config.json"))
    config = replace(config, pooling=read_pooling(directory), labels=_labels(raw))
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    more = ConfigFields(read_json(generation), str(generation)).token_ids("eos_token_id")
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def _labels(raw: Mapping[str, object]) -> tuple[str, ...]:
    """The labels of classes, in order. Some that are not numbered from 0 on are none."""
    named = raw.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(index) for index in range(len(named))}:
        return ()
    return tuple(str(named[str(index)]) for index in range(len(named)))


def parse_model_config(raw: Mapping[str, object], where: str) -> ModelConfig:
    """The model that the contents of a config.json describe; `where` names the file in errors."""
    family, architecture = _family(ConfigFields(raw, where))
    return family.read(architecture, text_fields(raw, where))


def _family(fields: ConfigFields) -> tuple[Family, str]:
    architectures = fields.texts("architectures")
    for architecture in architectures:
        for family in FAMILIES:
            if architecture in family.architectures:
                return family, architecture
    # A file may leave the architecture out. One that states another use of a known model (a classifier) is refused.
    model_type = fields.text("model_type", "")
    if not architectures:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family, family.architectures[0]
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    stated = ", ".join(architectures) or (f"model_type {model_type}" if model_type else "none stated")
    raise ModelError(
        f"{fields.where}: architecture not supported: {stated}{_wrapped(fields)}; the known ones are {known}"
    )


def _wrapped(fields: ConfigFields) -> str:
    """A hint for errors: the known text model inside this wrapper, if any."""
    inner = fields.section("text_config")
    if inner is None:
        return ""
    return f", which wraps a text model ({inner.text('model_type', 'unnamed')}): save that one by itself"
