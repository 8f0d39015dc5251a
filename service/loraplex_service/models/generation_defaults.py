"""Sampling defaults in files: our configuration, and a model's generation_config.json as transformers reads it."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from loraplex.v1.generation_pb2 import Sampling
from loraplex_service.errors import LoraplexError
from loraplex_service.text import TextError
from loraplex_service.validation.checks import check_message

# Fields that both contracts have, under one name and with one meaning.
_READ = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")

# Fields that would choose other tokens, and that this server has no counterpart for.
UNREAD = (
    "num_beams",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "watermarking_config",
)


def sampling_of_file(values: Mapping[str, Any], place: str) -> Sampling:
    """The sampling message with a file's values.

    Raises ValueError naming, at `place`, values that no request may have.
    """
    large = [name for name, value in values.items() if isinstance(value, int) and abs(value) >= 1 << 64]
    if large:  # of these the parser says nothing but that they overflow
        raise ValueError(f"{place}: {', '.join(large)}: the number is too large")
    try:
        sampling = json_format.ParseDict(dict(values), Sampling())
        problems = [f"{violation.field}: {violation.problem}" for violation in check_message(sampling, place)]
    except json_format.ParseError as error:
        raise ValueError(f"{place}: {error}") from error
    except LoraplexError as error:
        raise ValueError(error.message) from error
    if problems:
        raise ValueError("; ".join(problems))
    return sampling


def default_sampling(generation_config: Mapping[str, Any]) -> Sampling:
    """The defaults in generation_config.json. A null value counts as absent.

    `do_sample: false` is greedy, whatever the temperature; where it is left out, the other fields count as they stand.
    Raises TextError for a value that no request could ask for.
    """
    values = {name: generation_config[name] for name in _READ if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0
    if isinstance(values.get("top_k"), int):
        values["top_k"] = max(values["top_k"], 0)  # -1, too, is how files say that it is off
    try:
        return sampling_of_file(values, "generation_config.json")
    except ValueError as error:
        raise TextError(f"{error}. Correct it, or have the configuration say `default_sampling: none`") from error


def unread(generation_config: Mapping[str, Any]) -> list[str]:
    """The fields that would change the sampling, and that this server does not support."""
    return [name for name in UNREAD if generation_config.get(name) not in (None, False, 0, 1, [], {})]
