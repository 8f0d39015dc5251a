"""The special tokens that a GGUF file's metadata state, or that are known by their text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loraplex_adapters.files.gguf import GGUFError

KEY = "tokenizer.ggml."
SPECIAL_TYPES = (3, 4)  # of tokenizer.ggml.token_type: control tokens, and those that are defined by the user
NO_TOKEN = (-1, 0xFFFFFFFF)  # what converters write where a model has none
# Converters state one end of a text. What else ends a turn or a message is found by its text, as in llama.cpp.
TEXTS: Mapping[str, frozenset[str]] = {
    "eos": frozenset(),
    "eot": frozenset(
        (
            *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
            *("<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
        )
    ),
    "eom": frozenset(("<|eom_id|>",)),
}


def token_id(metadata: Mapping[str, object], name: str) -> int | None:
    """The id of a special token ("bos"); None: the model has none. Raises GGUFError for one of no token."""
    stated, tokens = metadata.get(f"{KEY}{name}_token_id"), metadata.get(KEY + "tokens")
    if stated is None or stated in NO_TOKEN:
        return None
    count = len(tokens) if isinstance(tokens, list) else 0
    if type(stated) is not int or not 0 <= stated < count:
        raise GGUFError(f"{KEY}{name}_token_id is {stated!r}: it must be one of the ids of {count} tokens")
    return stated


def end_token_ids(metadata: Mapping[str, object]) -> list[int]:
    """The ids that end a text, a turn or a message: those stated, and by their texts those that are not."""
    ids: list[int] = []
    for name, texts in TEXTS.items():
        stated = token_id(metadata, name)
        ids.extend(_special(metadata, texts) if stated is None else [stated])
    return list(dict.fromkeys(ids))


def _special(metadata: Mapping[str, object], texts: frozenset[str]) -> Iterator[int]:
    tokens, types = metadata.get(KEY + "tokens"), metadata.get(KEY + "token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False)):
            if kind in SPECIAL_TYPES and token in texts:
                yield index
