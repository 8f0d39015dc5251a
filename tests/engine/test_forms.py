"""Outputs have the form that was asked for, whatever the model would rather write and whatever else is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from loraplex_engine.link.grammar import gbnf_grammar, schema_grammar
from loraplex_engine.link.grammar import regex_grammar as regex
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.forms import NUM_THREADS

pytest.importorskip("transformers")

from tests.engine.execution.test_drafts import Drafter
from tests.engine.forms import EOS, TOKENS, Engine, save_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 12},
        "marks": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "count", "marks"],
    "additionalProperties": False,
}


def schema(value: Any = SCHEMA) -> str:
    return schema_grammar(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def make_engine(folder: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        engines.append(engine := Engine(folder, **settings))
        return engine

    yield make
    for engine in engines:
        engine.core.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


def is_in_schema(text: bytes) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["kind", "count", "marks"]
        and value["kind"] in ("a", "b")
        and value["count"] in range(3, 13)
        and len(value["marks"]) <= 3
        and all(mark in (True, False) for mark in value["marks"])
    )


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_random_draws_always_satisfy_their_schema(make_engine: Callable[..., Engine], kernels: str) -> None:
    engine = make_engine(kernels=kernels)
    for number in range(40):
        engine.add(number, schema(), temperature=1.0 + number % 3)
    engine.finish()
    assert [engine.end(number).error for number in range(40)] == [""] * 40
    assert all(is_in_schema(engine.text(number)) for number in range(40))


@pytest.mark.parametrize("pattern", ["[a-f]{3,9}x", "(ab|cde)+", r"\d{4}-\d\d", "é+", "[^a]{2}b?", "(true|null|12)"])
def test_random_draws_match_their_regular_expression(engine: Engine, pattern: str) -> None:
    for number in range(20):
        engine.add(number, regex(pattern), temperature=2.0)
    engine.finish()
    for number in range(20):
        if engine.end(number).finish_reason is not FinishReason.MAX_TOKENS:
            assert re.fullmatch(pattern, engine.text(number).decode(), re.ASCII)


def test_a_complete_form_ends_the_output_with_its_last_token(engine: Engine) -> None:
    engine.add(1, regex("abc"))
    engine.finish()
    end = engine.end(1)
    assert (engine.text(1), end.finish_reason, end.stop_token_id) == (b"abc", FinishReason.STOP, None)


def test_a_form_that_may_end_or_go_on_ends_with_the_models_end_of_sequence(engine: Engine) -> None:
    engine.add(1, regex("a*"), logit_bias={EOS: 90.0})
    engine.finish()
    assert engine.tokens(1) == [EOS]
    assert (engine.end(1).finish_reason, engine.end(1).stop_token_id) == (FinishReason.EOS, EOS)


def test_an_output_does_not_end_before_its_form_may(engine: Engine) -> None:
    engine.add(1, regex("a{7}"), logit_bias={EOS: 100.0})
    engine.finish()
    assert engine.text(1) == b"a" * 7


def test_no_end_of_sequence_goes_on_while_the_form_can(engine: Engine) -> None:
    engine.add(1, regex("a*"), eos_token_ids=(), max_tokens=30)
    engine.add(2, regex("a{9}"), eos_token_ids=(), max_tokens=30)
    engine.finish()
    assert (len(engine.tokens(1)), engine.end(1).finish_reason) == (30, FinishReason.MAX_TOKENS)
    assert (engine.text(2), engine.end(2).finish_reason) == (b"a" * 9, FinishReason.STOP)


def test_max_tokens_cuts_a_form_short(engine: Engine) -> None:
    engine.add(1, regex("a{9}"), max_tokens=2, allowed_token_ids=(ord("a"),))
    engine.finish()
    assert (engine.text(1), engine.end(1).finish_reason) == (b"aa", FinishReason.MAX_TOKENS)


def test_min_tokens_holds_the_end_back_while_the_form_can_go_on(engine: Engine) -> None:
    engine.add(1, regex("a*"), logit_bias={EOS: 100.0}, min_tokens=5)
    engine.finish()
    assert engine.tokens(1)[5:] == [EOS]
    assert set(engine.text(1)) == {ord("a")}


def test_what_is_drawn_by_penalties_and_told_by_logprobs_has_its_form(engine: Engine) -> None:
    asked: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "num_logprobs": 2,
        "num_prompt_logprobs": 1,
    }
    engine.add(1, schema(), top_p=0.9, **asked)
    engine.finish()
    assert is_in_schema(engine.text(1))
    details = [detail for output in engine.outputs[1] for detail in output.logprobs or ()]
    assert [detail.token_id for detail in details] == engine.tokens(1)
    assert min(detail.logprob for detail in details) > float("-inf")  # of the model's own distribution


def test_rows_without_a_form_draw_what_they_draw_alone(make_engine: Callable[..., Engine]) -> None:
    alone, together = make_engine(), make_engine()
    for number in range(6):
        alone.add(number, "", max_tokens=20)
        together.add(number, "", max_tokens=20)
        together.add(100 + number, schema())
    alone.finish()
    together.finish()
    assert [together.tokens(number) for number in range(6)] == [alone.tokens(number) for number in range(6)]


def test_a_seed_draws_the_same_whoever_shares_the_batch(make_engine: Callable[..., Engine]) -> None:
    alone, together = make_engine(), make_engine()
    alone.add(3, schema())
    for number in range(8):
        together.add(number, schema())
    alone.finish()
    together.finish()
    assert together.tokens(3) == alone.tokens(3)


def test_a_preempted_request_keeps_its_form(make_engine: Callable[..., Engine]) -> None:
    small, large = make_engine(kv_cache_bytes=40 * 4 * 2 * 16 * 4, max_model_len=128), make_engine()
    for number in range(8):
        small.add(number, schema(), max_tokens=100)
        large.add(number, schema(), max_tokens=100)
    small.finish()
    large.finish()
    assert small.core.stats().num_preemptions > 0
    assert [small.tokens(number) for number in range(8)] == [large.tokens(number) for number in range(8)]


def test_another_engine_goes_on_with_the_form_from_the_tokens_that_there_are(
    make_engine: Callable[..., Engine],
) -> None:
    first, second = make_engine(), make_engine()
    first.add(1, schema())
    first.finish()
    tokens = first.tokens(1)
    half = len(tokens) // 2
    second.add(1, schema(), output=tokens[:half])
    second.finish()
    assert tokens[:half] + second.tokens(1) == tokens


def test_tokens_that_are_not_of_the_form_cannot_be_gone_on_from(engine: Engine) -> None:
    engine.add(1, regex("abc"), output=[ord("x")])
    engine.finish()
    assert engine.end(1).finish_reason is FinishReason.ERROR
    assert "form cannot be prepared" in engine.end(1).error


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(engine: Engine) -> None:
    engine.add(1, regex("(?=a)b"))
    engine.add(2, regex("ab"))
    engine.finish()
    assert "look-around" in engine.end(1).error
    assert engine.text(2) == b"ab"


def test_a_form_that_no_token_can_go_on_ends_its_request_alone(engine: Engine) -> None:
    engine.add(1, regex("abc"), allowed_token_ids=(ord("a"), ord("b")))
    engine.add(2, "")
    engine.finish()
    assert (engine.text(1), engine.end(1).finish_reason) == (b"ab", FinishReason.ERROR)
    assert "no token is left to draw" in engine.end(1).error
    assert engine.core.stats().num_not_finite == 0
    assert engine.end(2).finish_reason in (FinishReason.EOS, FinishReason.MAX_TOKENS)


def test_a_mask_that_takes_too_much_work_ends_its_request_alone(engine: Engine) -> None:
    letters = "|".join(f"(.*{letter}.{{300}}.*)" for letter in "abcdefghij")
    engine.add(1, f"start: /{letters}/ & /.*x.*/")
    engine.add(2, regex("ab"))
    engine.finish()
    assert engine.end(1).finish_reason in (FinishReason.ERROR, FinishReason.MAX_TOKENS)
    assert engine.text(2) == b"ab"


def test_no_control_token_is_text_of_a_form(engine: Engine) -> None:
    engine.add(1, regex("(.|\n){50}"), eos_token_ids=())
    engine.finish()
    assert not {EOS, EOS + 1} & set(engine.tokens(1))


def test_an_engine_that_was_given_no_vocabulary_says_so(engine: Engine) -> None:
    engine.core.forms._vocabulary = None
    engine.add(1, regex("a"))
    engine.finish()
    assert "no vocabulary" in engine.end(1).error


def test_forms_are_counted(engine: Engine) -> None:
    for number, pattern in enumerate(("ab", "ab", "cd", "(?=a)b")):
        engine.add(number, regex(pattern))
    engine.finish()
    stats = engine.core.stats()
    assert (stats.num_forms, stats.num_forms_compiled, stats.num_forms_failed) == (3, 2, 1)
    assert stats.form_seconds > 0


def test_more_grammars_than_are_kept_are_compiled_again(engine: Engine) -> None:
    for number in range(150):
        engine.add(number, regex(f"{number % 130:03}x"))
    engine.finish()
    assert all(engine.text(number) == b"%03dx" % (number % 130) for number in range(150))


def test_the_grammar_of_requests_that_are_gone_is_not_compiled(engine: Engine) -> None:
    may_go_on = Event()
    for _ in range(NUM_THREADS):
        engine.core.forms._queue._threads.submit(may_go_on.wait)
    for number in range(3):
        engine.add(number, regex("ab" if number else "cd"))
    engine.step()
    compiling = engine.core.forms._compiled
    engine.core.abort([0, 1])
    assert [grammar for grammar, *_ in compiling] == [regex("ab")]
    engine.core.abort([2])
    assert not compiling
    may_go_on.set()


def test_a_request_waits_for_its_form_without_a_place_among_those_for_adapters(engine: Engine) -> None:
    engine.add(1, regex("ab"))
    engine.core.step()
    stats = engine.core.stats()
    assert stats.num_waiting_for_adapter == 0
    assert stats.num_waiting + stats.num_running == 1
    engine.finish()


def test_a_message_without_a_grammar_has_no_form() -> None:
    assert AddRequest(1, [1], SamplingParams(seed=0, max_tokens=1)).grammar == ""


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_drafts_change_nothing_in_an_output_with_a_form(make_engine: Callable[..., Engine], wrong: bool) -> None:
    plain, drafted = make_engine(), make_engine()
    plain.add(1, schema())
    plain.finish()
    tokens = plain.tokens(1)

    def guess(known: Sequence[int]) -> Sequence[int]:
        following = tokens[len(known) - 3 :][:3]  # behind a prompt of three tokens
        return [*following[:1], ord("x"), EOS] if wrong else following

    drafter = Drafter(drafted.core, guess)
    drafted.core.scheduler.schedule = drafter.schedule  # type: ignore[method-assign]
    drafted.add(1, schema())
    drafted.finish()
    assert drafter.num_drafted > 0
    assert drafted.tokens(1) == tokens


def test_no_output_has_a_bad_word_whichever_tokens_spell_it(engine: Engine) -> None:
    bias = {token: 60.0 for token in (ord("a"), ord("b"), TOKENS.index(b"aa"))}
    words = ("aaa", "ba", "é")
    for number in range(20):
        engine.add(number, "", bad_words=words, logit_bias=bias, temperature=2.0, eos_token_ids=(), max_tokens=40)
    engine.finish()
    for number in range(20):
        assert len(engine.tokens(number)) == 40
        assert not any(word.encode() in engine.text(number) for word in words)


def test_a_form_goes_on_around_bad_words(engine: Engine) -> None:
    engine.add(1, regex("([ab]){40}"), bad_words=("aba", "bbb", "aaa"))
    engine.finish()
    assert re.fullmatch(rb"[ab]{40}", engine.text(1))
    assert not re.search(rb"aba|bbb|aaa", engine.text(1))


def test_a_form_that_is_a_bad_word_ends_with_an_error(engine: Engine) -> None:
    engine.add(1, regex("abc"), bad_words=("bc",))
    engine.finish()
    assert engine.text(1) == b"ab"
    assert "bad_words" in engine.end(1).error


def test_bad_words_that_leave_no_token_end_with_an_error(engine: Engine) -> None:
    engine.add(1, "", allowed_token_ids=(ord("a"),), bad_words=("aa",))
    engine.finish()
    assert engine.text(1) == b"a"
    assert "bad_words" in engine.end(1).error


def test_another_engine_goes_on_without_a_bad_word_that_was_begun(make_engine: Callable[..., Engine]) -> None:
    asked: dict[str, Any] = {"bad_words": ("abab",), "logit_bias": {ord("a"): 40.0, ord("b"): 40.0}, "max_tokens": 60}
    first, second = make_engine(), make_engine()
    first.add(1, "", **asked)
    first.finish()
    tokens = first.tokens(1)
    second.add(1, "", output=tokens[:31], **asked)
    second.finish()
    assert b"abab" not in first.text(1)
    assert tokens[:31] + second.tokens(1) == tokens


def test_an_output_ends_early_only_where_it_may_without_bad_words_too(engine: Engine) -> None:
    engine.add(1, "", bad_words=("zzz",), logit_bias={EOS: 100.0}, min_tokens=5)
    engine.finish()
    assert engine.tokens(1)[5:] == [EOS]


def test_a_token_of_text_that_ends_outputs_is_drawn_only_where_the_form_may_end(engine: Engine) -> None:
    ends = (EOS, ord("b"))  # an adapter may name a token of the text as its end
    engine.add(1, regex("[a-c]{8}d"), eos_token_ids=ends, logit_bias={ord("b"): 100.0})
    engine.finish()
    assert re.fullmatch(rb"[ac]{8}d", engine.text(1))


@pytest.mark.parametrize("rules", ['root ::= root root | "a"', 'root ::= x x x x\nx ::= "a" x | x "a" | "a" | ""'])
def test_a_grammar_with_countless_readings_ends_with_an_error_in_good_time(engine: Engine, rules: str) -> None:
    engine.add(1, gbnf_grammar(rules), max_tokens=400, eos_token_ids=())
    engine.finish()
    assert "cannot go on: Parser Error: Current row has" in engine.end(1).error
    assert engine.end(1).error_reason == "INVALID_PARAMETER"
    assert len(engine.tokens(1)) < 300


def test_a_form_that_no_text_completes_ends_with_an_error_that_says_so(engine: Engine) -> None:
    engine.add(1, gbnf_grammar('root ::= "a" x\nx ::= x'))
    engine.finish()
    assert (engine.text(1), engine.end(1).error_reason) == (b"a", "INVALID_PARAMETER")
    assert engine.end(1).error == "its form cannot go on: no text can complete it"


def test_a_grammar_with_countless_readings_is_taken_up_again_token_by_token(engine: Engine) -> None:
    engine.add(1, gbnf_grammar('root ::= root root | "a"'), [ord("a")] * 200, max_tokens=400, eos_token_ids=())
    engine.finish()
    assert "cannot go on" in engine.end(1).error
