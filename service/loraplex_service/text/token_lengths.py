"""The longest text that one token can stand for."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import tokenizers

from loraplex_service.text.token_decoders import BYTE_ALPHABET

# Composing characters makes a text shorter: three Hangul letters of 3 bytes become one syllable of 3, no more.
NFC_FACTOR = 4
_KEEPING = ("ByteLevel", "Metaspace", "Digits")  # pre-tokenizers that cut a text and drop nothing of it


def longest_token_bytes(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The most UTF-8 bytes of text that one token can stand for; None: there is no bound, or none is known."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    stages = list(_stages(_state(tokenizer.pre_tokenizer), "pretokenizers"))
    byte_level = any(stage["type"] == "ByteLevel" for stage in stages)
    factor = _shrinking(_state(tokenizer.normalizer))
    if factor is None or not _cut_only(stages) or any(token.lstrip or token.rstrip for token in added):
        return None  # such a token takes all the space around it
    if not _keeps_all(tokenizer.model, byte_level, vocabulary):
        return None
    written = {token.content for token in added}
    return factor * max(
        len(token) if byte_level and token not in written else len(token.encode()) for token in vocabulary
    )


def _state(part: Any) -> Mapping[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shrinking(normalizer: Mapping[str, Any] | None) -> int | None:
    """The factor by which normalisation may shorten a text before it is tokenised; None: not known."""
    factor = 1
    for stage in _stages(normalizer, "normalizers"):
        pattern = stage.get("pattern", {}).get("String", "")
        if stage["type"] == "NFC":
            factor *= NFC_FACTOR
        elif stage["type"] == "Replace" and pattern and len(stage["content"].encode()) >= len(pattern.encode()):
            continue
        elif stage["type"] != "Prepend":
            return None
    return factor


def _cut_only(stages: Iterable[Mapping[str, Any]]) -> bool:
    return all(
        stage["type"] in _KEEPING or (stage["type"] == "Split" and stage["behavior"] != "Removed") for stage in stages
    )


def _keeps_all(model: Any, byte_level: bool, vocabulary: Collection[str]) -> bool:
    """Whether every byte of what is cut is part of a token, and no token stands for any number of them."""
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if byte_level:
        return all(char in vocabulary for char in BYTE_ALPHABET)
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk


def _stages(part: Mapping[str, Any] | None, name: str) -> Iterable[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for stage in part[name]:
            yield from _stages(stage, name)
    else:
        yield part
