"""Read how a config.json spells its rotary embedding: `rope_parameters` (transformers 5), or `rope_theta` with
`rope_scaling` (before)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
TEXT_ALONE = ("default", "mrope")  # positions in three dimensions are equal ones for text
KEPT = ("rope_theta", "partial_rotary_factor")  # what is turned, and from which base: no matter of scaling
MAX_POSITIONS = 1 << 28  # a context that no machine holds the keys of: the file is wrong


def read_rope(fields: ConfigFields, default_theta: float = 10_000.0) -> Rope:
    """The one rotary embedding of a model whose layers share it. An empty section counts as absent."""
    section = fields.filled_section("rope_scaling") or fields.filled_section("rope_parameters")
    theta = fields.number("rope_theta", default_theta)
    return rope_from(section, fields, theta) if section else Rope(theta)


def read_partial_rope(fields: ConfigFields, default_part: float = 1.0, interleaved: bool = False) -> Rope:
    """The one rotary embedding of a model that turns a part of each head, stated in either place."""
    part = fields.number("partial_rotary_factor", default_part)
    for name in ("rope_scaling", "rope_parameters"):
        section = fields.filled_section(name)
        if section is not None and section.has("partial_rotary_factor"):
            part = section.number("partial_rotary_factor")
            whole = section.changed_by(ConfigFields({"partial_rotary_factor": None}, section.where))
            fields = fields.changed_by(ConfigFields({name: whole.raw()}, fields.where))
    if not 0 < part <= 1:
        raise fields.error("partial_rotary_factor", part, "above 0, and at most 1")
    return replace(read_rope(fields), part=part, interleaved=interleaved)


def part_of_head(dims: int, head_dim: int) -> float:
    """The `Rope.part` that turns so many dimensions: a share that rounding would make smaller turns fewer."""
    return 1.0 if dims == head_dim else math.nextafter(dims / head_dim, 1.0)


def with_default_rope(fields: ConfigFields, rope: Mapping[str, object]) -> ConfigFields:
    """The fields, with this rotation where a file states none: what the family's class has then."""
    if fields.has("rope_scaling") or fields.has("rope_parameters"):
        return fields
    return fields.changed_by(ConfigFields({"rope_parameters": rope}, fields.where))


def with_rope_scaling(raw: Mapping[str, object], scaling: Mapping[str, object]) -> dict[str, object]:
    """The content of config.json with this `rope_scaling`. Of its own rotary fields only KEPT stay."""
    text = raw.get("text_config")
    part = text if isinstance(text, dict) else raw
    sections = (part.get("rope_scaling"), part.get("rope_parameters"))
    stated = [section for section in sections if isinstance(section, dict)]
    kept = {name: section[name] for name in KEPT for section in reversed(stated) if name in section}
    changed = {**part, "rope_scaling": {**kept, **scaling}}
    return {**raw, "text_config": changed} if part is text else changed


def yarn_sharpness(fields: ConfigFields) -> float:
    """What scores of attention are multiplied by where YaRN's section has `mscale_all_dim` (DeepSeek V2)."""
    section = fields.filled_section("rope_scaling") or fields.filled_section("rope_parameters")
    if section is None or not section.number_or_zero("mscale_all_dim"):
        return 1.0
    rope = read_rope(fields)
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    return _yarn_mscale(rope.scaling.factor, section.number("mscale_all_dim")) ** 2


def max_positions(ropes: Iterable[Rope], fields: ConfigFields) -> int:
    """The stated positions times the factor of the scaling, as in vLLM; YaRN's section states the original
    positions.
    """
    stated = fields.integer("max_position_embeddings")
    lengths = [stated] if stated > MAX_POSITIONS else [int(_stretched(rope, stated)) for rope in ropes]
    longest = max(lengths, default=stated)
    if longest > MAX_POSITIONS:
        raise fields.error("max_position_embeddings, with rope_scaling,", longest, f"at most {MAX_POSITIONS}")
    return longest


def _stretched(rope: Rope, stated: int) -> float:
    match rope.scaling:
        case LinearScaling(factor) | DynamicScaling(factor):
            return max(1.0, factor) * stated
        case YarnScaling(factor=factor, original_max_positions=original):
            return max(factor * original, stated)
        case _:  # Llama 3's files state what they are stretched to
            return stated


def rope_from(section: ConfigFields, fields: ConfigFields, default_theta: float) -> Rope:
    """Read a rotary section. Raises ModelError for unknown kinds, and for embeddings of only a part of the head."""
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise section.error("partial_rotary_factor", section.number("partial_rotary_factor"), "1")
    theta = section.number("rope_theta", default_theta)
    name = "rope_type" if section.has("rope_type") else "type"
    kind = section.text(name, "default")
    if kind == "linear":
        return Rope(theta, LinearScaling(section.number("factor")))
    if kind == "llama3":
        return Rope(
            theta,
            Llama3Scaling(
                factor=section.number("factor"),
                low_freq_factor=section.number("low_freq_factor"),
                high_freq_factor=section.number("high_freq_factor"),
                original_max_positions=_original_max_positions(section, fields),
            ),
        )
    if kind == "yarn":
        return Rope(theta, _yarn(section, fields, theta))
    if kind in ("longrope", "su"):  # the second spelling is that of the first Phi 3
        return Rope(theta, _longrope(section, fields))
    if kind == "dynamic":
        return Rope(theta, DynamicScaling(section.number("factor"), fields.integer("max_position_embeddings")))
    if kind in TEXT_ALONE:
        return Rope(theta)
    raise section.error(name, kind, f"one of {', '.join(KINDS)}")


def _yarn(section: ConfigFields, fields: ConfigFields, theta: float) -> YarnScaling:
    if theta == 1.0:
        raise section.error("rope_theta", theta, "another one for yarn, which divides by its logarithm")
    original = _original_max_positions(section, fields)
    factor = section.number("factor", fields.integer("max_position_embeddings") / original)
    mscale, mscale_all_dim = section.number_or_zero("mscale"), section.number_or_zero("mscale_all_dim")
    if mscale and mscale_all_dim:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=section.number("attention_factor", attention_factor),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
    )


def _longrope(section: ConfigFields, fields: ConfigFields) -> LongRopeScaling:
    original = _original_max_positions(section, fields)
    factor = section.number("factor", fields.integer("max_position_embeddings") / original)
    sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    attention_factor = section.number("attention_factor", sharper)
    return LongRopeScaling(
        short=section.numbers("short_factor"),
        long=section.numbers("long_factor"),
        original_max_positions=original,
        short_attention_factor=section.number("short_mscale", attention_factor),
        long_attention_factor=section.number("long_mscale", attention_factor),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _original_max_positions(section: ConfigFields, fields: ConfigFields) -> int:
    name = "original_max_position_embeddings"
    if fields.has(name):
        return fields.integer(name)
    return section.integer(name, fields.integer("max_position_embeddings"))
