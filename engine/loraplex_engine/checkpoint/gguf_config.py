"""What a GGUF file says of its model, in the spelling of config.json, so that the families read it as any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_adapters.files.gguf import GGUFError
from loraplex_adapters.files.gguf_tokens import end_token_ids
from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.gguf_blocks import FLOAT_TYPES
from loraplex_engine.checkpoint.gguf_experts import EXPERTS, expert_config
from loraplex_engine.checkpoint.gguf_model import GGUFModel, same_in_all_layers
from loraplex_engine.checkpoint.model_config import ModelError

Config = dict[str, object]
Read = Callable[[ConfigFields], Config]  # from the metadata under the architecture's name

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FREQUENCY_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, worked out
WINDOW_PATTERN = "attention.sliding_window_pattern"
POOLING = (0, 3)  # none, and of the last token
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def _nothing(fields: ConfigFields) -> Config:
    return {}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The class of models that an architecture's name in GGUF stands for."""

    name: str | Callable[[ConfigFields], str]
    more: Read = field(default=_nothing)  # what not all models have
    activation: str = "silu"
    partial: bool = False  # the file states how much of each head is turned
    windows: bool = False  # in some layers, and the file may state in which


def _window(fields: ConfigFields) -> Config:
    # 0 stands for none: converters write it for Phi 4.
    return {"sliding_window": fields.integer("attention.sliding_window", 0, minimum=0) or None}


def _gemma2(fields: ConfigFields) -> Config:
    return {
        "sliding_window": fields.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(fields, of_27b=46),
    }


def _gemma3(fields: ConfigFields) -> Config:
    return {
        "sliding_window": fields.integer("attention.sliding_window", 1024),
        "sliding_window_pattern": 6,
        "final_logit_softcapping": fields.optional_number("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(fields, of_27b=62),
        "rope_theta": fields.number("rope.freq_base", 1e6),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 1e4),
    }


def _query_scalar(fields: ConfigFields, of_27b: int) -> int:
    """What the scores are divided by the root of. The files do not say it: of the largest model it is another one."""
    if fields.integer("block_count") == of_27b:
        return fields.integer("embedding_length") // fields.integer("attention.head_count")
    return fields.integer("attention.key_length")


def _granite(fields: ConfigFields) -> Config:
    return {
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "attention_multiplier": fields.number("attention.scale", _head_dim(fields) ** -0.5),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
    }


def _head_dim(fields: ConfigFields) -> int:
    return fields.integer(
        "attention.key_length", fields.integer("embedding_length") // fields.integer("attention.head_count")
    )


def _llama(fields: ConfigFields) -> str:
    return "MixtralForCausalLM" if _has_experts(fields) else "LlamaForCausalLM"


def _mixtral(fields: ConfigFields) -> Config:
    return expert_config(fields, normalised=True) if _has_experts(fields) else {}


def _has_experts(fields: ConfigFields) -> bool:
    return bool(fields.integer("expert_count", 0, minimum=0))


def _qwen_moe(normalised: bool) -> Read:
    return lambda fields: {**expert_config(fields, normalised), "use_sliding_window": False}


def _olmoe(fields: ConfigFields) -> Config:
    if fields.number_or_zero("attention.clamp_kqv"):
        raise fields.error("attention.clamp_kqv", fields.number("attention.clamp_kqv"), "absent: it is not computed")
    return expert_config(fields, normalised=False)


def _granite_moe(fields: ConfigFields) -> Config:
    shared = fields.integer("expert_shared_feed_forward_length", 0, minimum=0)
    if shared:
        raise fields.error("expert_shared_feed_forward_length", shared, "absent: no shared experts are read")
    return {**_granite(fields), **expert_config(fields, normalised=True)}


def _gpt_oss(fields: ConfigFields) -> Config:
    scaling: Config = {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,  # which the files do not say
    }
    if fields.text("rope.scaling.type") != "yarn":
        raise fields.error("rope.scaling.type", fields.text("rope.scaling.type"), "yarn")
    size = fields.integer("expert_feed_forward_length", fields.integer("feed_forward_length"))
    experts = {**expert_config(fields, normalised=True), "intermediate_size": size}
    return {**experts, "rope_scaling": scaling, "sliding_window": fields.integer("attention.sliding_window", 128)}


def _olmo(fields: ConfigFields) -> str:
    return "Olmo3ForCausalLM" if _window(fields)["sliding_window"] else "Olmo2ForCausalLM"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_llama, _mixtral),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "gemma": Architecture("GemmaForCausalLM", activation="gelu_pytorch_tanh"),
    "gemma2": Architecture("Gemma2ForCausalLM", _gemma2, "gelu_pytorch_tanh", windows=True),
    "gemma3": Architecture("Gemma3ForCausalLM", _gemma3, "gelu_pytorch_tanh", windows=True),
    "phi3": Architecture("Phi3ForCausalLM", _window, partial=True),
    "smollm3": Architecture("SmolLM3ForCausalLM"),
    "granite": Architecture("GraniteForCausalLM", _granite),
    "olmo2": Architecture(_olmo, _window, windows=True),
    "exaone4": Architecture("Exaone4ForCausalLM", _window, windows=True),
    "glm4": Architecture("Glm4ForCausalLM", partial=True),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM"),
    "seed_oss": Architecture("SeedOssForCausalLM"),
    "arcee": Architecture("ArceeForCausalLM", activation="relu2"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM", _qwen_moe(normalised=False)),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", _qwen_moe(normalised=True)),
    "olmoe": Architecture("OlmoeForCausalLM", _olmoe),
    "granitemoe": Architecture("GraniteMoeForCausalLM", _granite_moe),
    "gpt-oss": Architecture("GptOssForCausalLM", _gpt_oss, windows=True),
}


def read_gguf_config(path: Path) -> Config:
    """The config.json that the model would have. Raises ModelError naming what is missing or not supported."""
    model = GGUFModel(path)
    name, fields = model.architecture, model.fields
    if name not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture not supported: {name}; the known ones are {', '.join(ARCHITECTURES)}")
    if _has_experts(fields) and name not in EXPERTS:
        raise ModelError(f"{path}: architecture not supported: {name} with experts")
    if EMBEDDING not in model.tensors:
        raise ModelError(f"{path}: tensor token_embd.weight is missing: it is no language model, or a part of one")
    architecture, embedding = ARCHITECTURES[name], model.tensors[EMBEDDING]
    more = architecture.more(fields)
    _check_attention(model, more)
    return {
        "architectures": [architecture.name if isinstance(architecture.name, str) else architecture.name(fields)],
        "model_type": name,
        "hidden_act": architecture.activation,
        "dtype": "float32" if embedding.type.name == "F32" else "bfloat16",
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": HEAD not in model.tensors,
        "eos_token_id": _ends(model),
        **_shape(model),
        **_biases(model),
        **_rope(model, architecture),
        **more,
        **(_layer_types(fields) if architecture.windows else {}),
        **_quantization(model),
    }


def _ends(model: GGUFModel) -> list[int]:
    try:
        return end_token_ids(model.metadata)
    except GGUFError as error:
        raise ModelError(f"{model.path}: {error}") from None


def _check_attention(model: GGUFModel, more: Config) -> None:
    """Raise ModelError where the file states another attention than is computed."""
    fields = model.fields
    if not fields.flag("attention.causal", True):
        raise fields.error("attention.causal", False, "true: only causal models generate text")
    pooling = fields.integer("pooling_type", 0, minimum=0)
    if pooling not in POOLING:
        raise fields.error("pooling_type", pooling, "0 or 3: of a GGUF file, prompts are embedded by their last token")
    if "attention_multiplier" not in more:
        scalar = more.get("query_pre_attn_scalar", model.head_dim)
        assert isinstance(scalar, int)
        _check_number(fields, "attention.scale", scalar**-0.5)


def _check_number(fields: ConfigFields, name: str, computed: float) -> None:
    """Raise ModelError where the file states another number. 0 stands for none."""
    stated = fields.number_or_zero(name)
    if stated and not math.isclose(stated, computed, rel_tol=1e-3):
        raise fields.error(name, stated, f"{computed:.6g}, which is computed")


def _layer_types(fields: ConfigFields) -> Config:
    """Which layers have a window, where the file says it: of each, or the length of groups whose last has none."""
    count, stated = fields.integer("block_count"), fields.raw().get(WINDOW_PATTERN)
    if stated is None:
        return {}
    if type(stated) is int and stated >= 0:
        slides = [not stated or (layer + 1) % stated != 0 for layer in range(count)]
    elif isinstance(stated, list) and len(stated) == count and set(stated) <= {0, 1}:
        slides = [bool(each) for each in stated]
    else:
        raise fields.error(WINDOW_PATTERN, stated, f"a number of layers, or true or false of each of {count}")
    return {"layer_types": ["sliding_attention" if each else "full_attention" for each in slides]}


def _shape(model: GGUFModel) -> Config:
    fields = model.fields
    heads = same_in_all_layers(fields, "attention.head_count")
    num_layers = fields.integer("block_count")
    if num_layers > len(model.tensors):
        raise fields.error("block_count", num_layers, f"at most the {len(model.tensors)} tensors that there are")
    return {
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": same_in_all_layers(fields, "feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": same_in_all_layers(fields, "attention.head_count_kv", heads),
        "head_dim": model.head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.integer("context_length"),
    }


def _biases(model: GGUFModel) -> Config:
    def has(part: str) -> bool:
        return f"model.layers.0.{part}.bias" in model.tensors

    attention = has("self_attn.q_proj") or has("self_attn.qkv_proj")
    return {
        "attention_bias": attention,
        "use_bias": attention,
        "attention_out_bias": has("self_attn.o_proj"),
        "mlp_bias": has("mlp.up_proj"),
    }


def _rope(model: GGUFModel, architecture: Architecture) -> Config:
    fields, size = model.fields, model.head_dim
    found: Config = {"rope_theta": fields.number("rope.freq_base", 10_000.0), "rope_scaling": _scaling(model)}
    turned = fields.integer("rope.dimension_count", size)
    if architecture.partial:
        found["partial_rotary_factor"] = turned / size
    elif turned != size:
        raise fields.error("rope.dimension_count", turned, f"{size}, all of a head")
    return found


def _scaling(model: GGUFModel) -> Config | None:
    fields = model.fields
    original = fields.integer("rope.scaling.original_context_length", fields.integer("context_length"))
    short, long, factors = (model.factors(name) for name in (SHORT_FACTORS, LONG_FACTORS, FREQUENCY_FACTORS))
    if short is not None and long is not None:
        return _by_factors(short, long, original, fields.number("rope.scaling.attn_factor", 1.0))
    kind = fields.text("rope.scaling.type", "linear")
    factor = fields.number_or_zero("rope.scaling.factor") or fields.number_or_zero("rope.scale_linear") or 1.0
    if factors is None and kind not in ("none", "linear", "yarn"):
        raise fields.error("rope.scaling.type", kind, "none, linear or yarn; longrope has tensors of factors")
    turned = kind == "yarn" and factors is None
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        _check_number(fields, name, 0.1 * math.log(max(1.0, factor)) + 1.0 if turned else 1.0)
    if factors is not None:
        return _by_factors(factors, factors, original, 1.0)
    if kind == "none" or factor == 1.0:
        return None
    found: Config = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        found["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            found[name] = fields.optional_number(f"rope.scaling.yarn_{name}")
    return found


def _by_factors(short: list[float], long: list[float], original: int, sharper: float) -> Config:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": sharper,
    }


def _quantization(model: GGUFModel) -> Config:
    """The types of the tensors that are stored in blocks, by their names in the Hugging Face model."""
    names = ((name, tensor.type.name) for name, tensor in model.tensors.items())
    types = {name: kind for name, kind in names if kind not in FLOAT_TYPES}
    return {"quantization_config": {"quant_method": "gguf", "types": types}} if types else {}
