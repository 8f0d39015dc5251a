"""The special tokens of GGUF files: those that are stated, and those that are known by their text."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex_adapters.files.gguf import GGUFError
from loraplex_adapters.files.gguf_tokens import end_token_ids, token_id

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def metadata(**tokens: int) -> dict[str, Any]:
    """tokens: texts and types."""
    return {"tokenizer.ggml.tokens": list(tokens), "tokenizer.ggml.token_type": list(tokens.values())}


GEMMA = metadata(**{"<pad>": CONTROL, "<eos>": CONTROL, "<end_of_turn>": CONTROL, "a": NORMAL})


def test_the_end_of_a_turn_is_known_by_its_text() -> None:
    assert end_token_ids(GEMMA | {"tokenizer.ggml.eos_token_id": 1}) == [1, 2]


def test_an_end_of_turn_that_is_stated_is_the_only_one() -> None:
    stated = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 3}
    assert end_token_ids(GEMMA | stated) == [1, 3]


def test_tokens_that_any_text_may_hold_end_nothing() -> None:
    assert end_token_ids(metadata(**{"<|end|>": NORMAL, "<|im_end|>": USER_DEFINED})) == [1]


def test_the_end_of_a_message_is_known_by_its_text() -> None:
    assert end_token_ids(metadata(**{"<|eom_id|>": CONTROL, "<|eot_id|>": CONTROL})) == [1, 0]


@pytest.mark.parametrize("stated", [-1, 0xFFFFFFFF])
def test_a_model_may_state_that_it_has_no_such_token(stated: int) -> None:
    assert token_id(GEMMA | {"tokenizer.ggml.padding_token_id": stated}, "padding") is None


@pytest.mark.parametrize("stated", [-2, 4, True, 1.0, "a", [1]])
def test_an_id_of_no_token_is_refused_by_name(stated: object) -> None:
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.bos_token_id is .*: it must be one of the ids of 4 tokens"):
        token_id(GEMMA | {"tokenizer.ggml.bos_token_id": stated}, "bos")
