"""The model families, and which of them a checkpoint belongs to. A new family is one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.config_source import config_file, read_config
from loraplex_engine.checkpoint.model_config import ModelConfig, ModelError, UnknownArchitectureError
from loraplex_engine.checkpoint.pooling import read_pooling
from loraplex_engine.checkpoint.weights import read_json
from loraplex_engine.models import (
    apertus,
    arcee,
    cohere,
    cwm,
    deepseek,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    granite_moe,
    helium,
    hunyuan,
    llama,
    llama4,
    minicpm3,
    minimax_m2,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmoe,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from loraplex_engine.models.classification import language_model_of, with_classifier
from loraplex_engine.models.reading import Family, text_fields
from loraplex_engine.models.refused import REFUSED
from loraplex_engine.models.rope_reading import with_rope_scaling
from loraplex_engine.models.wrappers import SHAPES, TOWER_TENSORS, WRAPPERS, Wrapper

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    mistral.FAMILY_3,
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
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    olmoe.FAMILY,
    granite_moe.FAMILY,
    granite_moe.FAMILY_SHARED,
    granite_moe.FAMILY_4,
    glm4_moe.FAMILY,
    dots1.FAMILY,
    ernie4_5_moe.FAMILY,
    starcoder2.FAMILY,
    nemotron.FAMILY,
    stablelm.FAMILY,
    phi.FAMILY,
    cohere.FAMILY,
    cohere.FAMILY_2,
    hunyuan.FAMILY,
    apertus.FAMILY,
    llama.FAMILY_INTERNLM3,
    gpt_oss.FAMILY,
    minimax_m2.FAMILY,
    phimoe.FAMILY,
    deepseek.FAMILY_2,
    deepseek.FAMILY_3,
    minicpm3.FAMILY,
    llama4.FAMILY,
)
ARCHITECTURES = (
    *(name for family in FAMILIES for name in family.architectures),
    *(wrapper.architecture for wrapper in WRAPPERS),
)


def read_model_config(directory: Path, rope_scaling: Mapping[str, object] | None = None) -> ModelConfig:
    """The model in a directory, or in a GGUF file.

    Raises ModelError if it is of no known family, or what it states makes no sense.

    rope_scaling: replaces the file's.

    Ends of sequence are those of config.json and of generation_config.json together: instruction-tuned models often
    state the end of a turn only in the latter.
    """
    raw = read_config(directory)
    if rope_scaling is not None:
        raw = with_rope_scaling(raw, rope_scaling)
    config = parse_model_config(raw, str(config_file(directory)))
    config = replace(config, pooling=read_pooling(directory), labels=class_labels(raw))
    generation = directory / "generation_config.json"
    if not generation.exists():
        return config
    more = ConfigFields(read_json(generation), str(generation)).token_ids("eos_token_id")
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def class_labels(raw: Mapping[str, object]) -> tuple[str, ...]:
    """The labels of classes, in order. Some that are not numbered from 0 on are none."""
    named = raw.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(index) for index in range(len(named))}:
        return ()
    return tuple(str(named[str(index)]) for index in range(len(named)))


def parse_model_config(raw: Mapping[str, object], where: str) -> ModelConfig:
    """The model that the contents of a config.json describe; `where` names the file in errors."""
    fields = ConfigFields(raw, where)
    stated, model_type = fields.texts("architectures"), fields.text("model_type", "")
    for architecture in stated:
        language_model = language_model_of(architecture, raw)
        if language_model in (*ARCHITECTURES, *REFUSED):
            config = parse_model_config({**raw, "architectures": [language_model]}, where)
            return with_classifier(config, architecture, raw, where)
    for wrapper in WRAPPERS:
        if wrapper.architecture in stated or (not stated and wrapper.model_type == model_type):
            return _read_text(wrapper, raw, where)
    for architecture in stated:
        for family in FAMILIES:
            if architecture in family.architectures:
                return family.read(architecture, text_fields(raw, where))
    # A file may leave the architecture out. One that states another use of a known model is refused.
    family_of_type = None if stated else _of_type(model_type)
    if family_of_type is not None:
        return family_of_type.read(family_of_type.architectures[0], text_fields(raw, where))
    raise _unsupported(fields, stated, model_type)


def _read_text(wrapper: Wrapper, raw: Mapping[str, object], where: str) -> ModelConfig:
    """The language model within a wrapper. Before transformers 4.5x some files had its fields beside the towers'."""
    nested = ConfigFields(raw, where).section("text_config")
    text_type = wrapper.text_type if nested is None else nested.text("model_type", wrapper.text_type)
    family = _of_type(text_type)
    if family is None:
        raise UnknownArchitectureError(
            f"{where}: {wrapper.architecture} around {text_type}, which is not supported; {_known()}"
        )
    fields = text_fields(raw, where).with_defaults(wrapper.defaults)
    if nested is not None:
        fields = fields.with_defaults(SHAPES.get(text_type, {}))
        if wrapper.tied_inside and nested.flag("tie_word_embeddings"):
            fields = fields.changed_by(ConfigFields({"tie_word_embeddings": True}, where))
    config = family.read(family.architectures[0], fields)
    return replace(config, architecture=wrapper.architecture, unused_tensors=TOWER_TENSORS)


def _of_type(model_type: str) -> Family | None:
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def _unsupported(fields: ConfigFields, architectures: tuple[str, ...], model_type: str) -> ModelError:
    reasons = [f"{name}: {REFUSED[name]}" for name in architectures if name in REFUSED]
    if reasons:
        return ModelError(
            f"{fields.where}: architecture not supported: {', '.join(reasons)}. Choose another model; {_known()}"
        )
    stated = ", ".join(architectures) or (f"model_type {model_type}" if model_type else "none stated")
    near = get_close_matches(architectures[0], ARCHITECTURES, n=1) if architectures else []
    nearest = f"the nearest known one by its name is {near[0]}; " if near else ""
    return UnknownArchitectureError(
        f"{fields.where}: architecture not supported: {stated}{_wrapped(fields)}; {nearest}{_known()}"
    )


def _known() -> str:
    return f"the known ones are {', '.join(ARCHITECTURES)}"


def _wrapped(fields: ConfigFields) -> str:
    """A hint for errors: the known text model inside this wrapper, if any."""
    inner = fields.section("text_config")
    if inner is None:
        return ""
    return f", which wraps a text model ({inner.text('model_type', 'unnamed')}): save that one by itself"
