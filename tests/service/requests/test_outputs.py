"""What one output's tokens become, with stop strings that begin and end anywhere in them."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from loraplex.v1.generation_pb2 import GenerateSpec, OutputOptions, Stopping
from loraplex.v1.inference_pb2 import FINISH_REASON_MAX_TOKENS, FINISH_REASON_STOP, Delta
from loraplex_engine.link.messages import RequestOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.requests.output_form import OutputForm
from loraplex_service.requests.outputs import OutputBuilder
from loraplex_service.text import Tokenizer

WORDS = ["a", "b", "ab", "ba", "aab", "<s>"]
SPECIAL = WORDS.index("<s>")  # has no text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("words")
    backend = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(WORDS)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(Path(directory))


def shown(
    tokenizer: Tokenizer, token_ids: list[int], steps: list[int], stopping: Stopping
) -> tuple[OutputBuilder, Delta]:
    """The builder at the end, and all of its deltas as one."""
    spec = GenerateSpec(stopping=stopping, output=OutputOptions(token_ids=True, logprobs=True))
    builder, whole = OutputBuilder(0, OutputForm.of(spec, True, stopping.max_tokens), tokenizer, [0]), Delta()
    for start, end in zip([0, *steps], [*steps, len(token_ids)], strict=True):
        part, reason = token_ids[start:end], FinishReason.MAX_TOKENS if end == len(token_ids) else None
        logprobs = [TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in part]
        builder.push(RequestOutput(1, part, reason, logprobs=logprobs))
        delta = builder.take()
        if delta is not None:
            whole.text += delta.text
            whole.token_ids.extend(delta.token_ids)
            whole.logprobs.extend(delta.logprobs)
        if builder.finished is not None:
            break
    return builder, whole


def first_stop(words: list[str], stops: list[str], min_tokens: int) -> tuple[int, str, int] | None:
    """Where the text that ends with a stop string ends, that string, and the tokens until then. The obvious way."""
    text = "".join(words)
    for end in range(1, len(text) + 1):
        count = next(number for number in range(len(words) + 1) if len("".join(words[:number])) >= end)
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here and count >= min_tokens:
            return end, max(here, key=len), count
    return None


@settings(deadline=None)
@given(
    token_ids=st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=10),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    steps=st.lists(st.integers(0, 10), max_size=4),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
def test_text_and_tokens_end_together_wherever_a_stop_string_lies(
    tokenizer, token_ids, stops, steps, min_tokens, include
):
    words = ["" if token_id == SPECIAL else WORDS[token_id] for token_id in token_ids]
    steps = sorted({step % len(token_ids) for step in steps})
    stopping = Stopping(stop=stops, min_tokens=min_tokens, max_tokens=len(token_ids), include_stop=include)
    builder, whole = shown(tokenizer, token_ids, steps, stopping)
    found = first_stop(words, stops, min_tokens)
    assert builder.finished is not None
    if found is None:
        text, count, tokens = "".join(words), len(token_ids), token_ids
    else:
        end, stop, count = found
        text = "".join(words)[: end if include else end - len(stop)]
        tokens = next(token_ids[:n] for n in range(len(words) + 1) if len("".join(words[:n])) >= len(text))
        assert builder.finished.stop == stop
    assert builder.finished.reason == (FINISH_REASON_MAX_TOKENS if found is None else FINISH_REASON_STOP)
    assert (whole.text, list(whole.token_ids), builder.finished.completion_tokens) == (text, tokens, count)
    assert [entry.token_id for entry in whole.logprobs] == tokens


def test_the_token_in_which_a_stop_string_begins_is_shown_if_other_text_is_in_it(tokenizer: Tokenizer) -> None:
    _, whole = shown(tokenizer, [WORDS.index("ab"), WORDS.index("ba")], [], Stopping(stop=["bb"]))
    assert (whole.text, list(whole.token_ids)) == ("a", [WORDS.index("ab")])


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_is_found(tokenizer: Tokenizer) -> None:
    builder, whole = shown(tokenizer, [0, 1, 1, 0], [], Stopping(stop=["bb"], min_tokens=3))
    assert builder.finished is not None
    assert (whole.text, builder.finished.stop) == ("a", "bb")


def test_a_stop_string_that_the_end_of_the_text_completes_is_found(byte_tokenizer: Tokenizer) -> None:
    builder, whole = shown(byte_tokenizer, [*b"ab", 0xC3], [], Stopping(stop=["b\ufffd"]))
    assert builder.finished is not None
    assert (whole.text, list(whole.token_ids), builder.finished.stop) == ("a", [*b"a"], "b\ufffd")
