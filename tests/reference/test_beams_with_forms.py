"""Beam search under forms, with stop strings and log-probabilities, against transformers with what says the same there:
a logits processor for what may follow, and a stopping criterion for what ends an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import regex
import torch

from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.grammar import regex_grammar
from loraplex_engine.link.sampling_params import FinishReason
from tests.reference.beams import BLOCK, EARLY, EOS, FAMILIES, TEXTS, Bench, Family, outputs_of, prompt_of, transformers

SMALL_CACHE = {"kv_cache_bytes": 28 * BLOCK * 2 * 2 * 2 * 16 * 4}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("llama", tmp_path_factory.mktemp("one"))


def text_of(tokens: list[int]) -> str:
    return "".join(TEXTS[token] for token in tokens)


class Rules:
    """What an output may be, for transformers: a pattern that it matches, words that it lacks, texts that end it."""

    def __init__(self, start: int, pattern: str = "", words: tuple[str, ...] = (), stop: tuple[str, ...] = ()) -> None:
        self.start = start
        self.pattern, self.words, self.stop = pattern, words, stop

    def may_be(self, text: str, whole: bool) -> bool:
        if any(word in text for word in self.words):
            return False
        return not self.pattern or regex.fullmatch(self.pattern, text, partial=not whole) is not None

    def following(self, tokens: list[int]) -> list[int]:
        text = text_of(tokens)
        # A token without a text is of no pattern; where there is none it may stand anywhere.
        others = [token for token, more in enumerate(TEXTS) if token not in EOS and (more or not self.pattern)]
        fitting = [token for token in others if self.may_be(text + TEXTS[token], whole=False)]
        return fitting + [token for token in EOS if self.may_be(text, whole=True)]

    def options(self) -> dict[str, Any]:
        def allow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            masked = torch.full_like(scores, -torch.inf)
            for row, tokens in enumerate(ids[:, self.start :].tolist()):
                allowed = self.following(tokens) or list(EOS)  # of one that has ended, which goes on there with -1e9
                masked[row, allowed] = scores[row, allowed]
            return masked

        def has_ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([self.ends(tokens) for tokens in ids[:, self.start :].tolist()])

        processors = transformers.LogitsProcessorList([_processor(allow)])
        return {"logits_processor": processors, "stopping_criteria": _criteria(has_ended)}

    def ends(self, tokens: list[int]) -> bool:
        before, text = text_of(tokens[:-1]), text_of(tokens)
        is_stopped = any(stop in text and stop not in before for stop in self.stop)
        return is_stopped or (bool(tokens) and set(self.following(tokens)) <= set(EOS))


def _processor(allow: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    class Processor(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return allow(input_ids, scores)

    return Processor()


def _criteria(has_ended: Callable[..., torch.Tensor]) -> Any:
    class Criterion(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return has_ended(input_ids, scores)

    return transformers.StoppingCriteriaList([Criterion()])


SEARCHES: list[tuple[int, int, float, EarlyStopping, int, dict[str, Any]]] = [
    (4, 2, 1.0, EarlyStopping.HEURISTIC, 16, {"pattern": r"[a-t]{3,8}[0-9]{2}(, [a-t]{2,4}){0,3}"}),
    (3, 3, 0.5, EarlyStopping.ALWAYS, 20, {"pattern": r"([a-t]+|[0-9]+)(,( )?([a-t]{1,3}|[0-9]{1,3})){2,4}"}),
    (5, 4, 2.0, EarlyStopping.NEVER, 12, {"pattern": r"(.{2}){3,9}", "words": ("ab", "e")}),
    (4, 3, 1.0, EarlyStopping.HEURISTIC, 20, {"stop": ("de", ", ", "1")}),
    (4, 3, -0.5, EarlyStopping.NEVER, 24, {"words": ("a", "12"), "stop": ("fo", "od,", "34")}),
    (8, 6, 1.0, EarlyStopping.HEURISTIC, 14, {"pattern": r"[a-t0-9]{2,30}", "stop": ("0", "ba", "cd")}),
]


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 11}, SMALL_CACHE], ids=["plain", "chunked", "preempted"]
)
def test_searches_with_forms_equal_transformers_token_by_token(family: Family, settings: dict[str, Any]) -> None:
    bench = Bench(family, **settings)
    asked = {number: (prompt_of(4 + 5 * number, number), bool(number % 2), *SEARCHES[number]) for number in range(6)}
    for number, (prompt, tuned, width, count, penalty, early, most, rules) in asked.items():
        beams = Beams(width, [0] * count, penalty, early)
        grammar = regex_grammar(rules["pattern"]) if "pattern" in rules else ""
        words = {"bad_words": rules.get("words", ()), "stop": rules.get("stop", ())}
        bench.search(number, prompt, tuned, beams, grammar, max_tokens=most, num_token_ids=len(TEXTS), **words)
        bench.step()
    bench.finish()
    for number, (prompt, tuned, width, count, penalty, early, most, rules) in asked.items():
        options: dict[str, Any] = {"num_beams": width, "num_return_sequences": count, "length_penalty": penalty}
        options |= {"early_stopping": EARLY[early], "max_new_tokens": most} | Rules(len(prompt), **rules).options()
        outputs, scores = family.searched(prompt, tuned, **options)
        found, found_scores = bench.found(number, count)
        assert found == outputs, (number, list(map(text_of, found)), list(map(text_of, outputs)))
        assert found_scores == pytest.approx(scores, rel=1e-3, abs=1e-3)
    if "kv_cache_bytes" in settings:
        assert bench.core.scheduler.num_preemptions > 0
    assert bench.core.blocks.num_used == 0
    bench.core.close()


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
def test_log_probabilities_of_outputs_equal_transformers(family: Family, processed: bool) -> None:
    bench, prompt, named = Bench(family), prompt_of(9, 3), (11, 30)
    rules = Rules(len(prompt), r"[a-t]{3,9}[0-9]{2,5}")
    bench.search(
        0,
        prompt,
        True,
        Beams(4, [0] * 3),
        regex_grammar(rules.pattern),
        max_tokens=12,
        repetition_penalty=1.3,
        num_logprobs=3,
        logprob_token_ids=named,
        processed_logprobs=processed,
    )
    bench.search(1, prompt, False, Beams(2, [0]), max_tokens=5)  # of which nothing is told
    bench.finish()
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "repetition_penalty": 1.3}
    theirs = family.generated(prompt, True, output_logits=True, **options, **rules.options())
    for place, tokens in enumerate(outputs_of(theirs, prompt)):
        [output] = bench.outputs[place][-1:]
        assert output.token_ids == tokens
        assert output.logprobs is not None
        for number, (entry, token) in enumerate(zip(output.logprobs, tokens, strict=True)):
            row = theirs.beam_indices[place, number]
            given = theirs.scores[number][row] if processed else torch.log_softmax(theirs.logits[number][row], dim=-1)
            best = given.topk(3)
            left = int((best.values > -torch.inf).sum())
            assert (entry.token_id, entry.rank) == (token, int((given > given[token]).sum()) + 1)
            assert entry.top_ids == best.indices[:left].tolist()
            expected = [given[token], *best.values[:left], *given[list(named)]]
            assert [entry.logprob, *entry.top_logprobs, *entry.named_logprobs] == pytest.approx(
                [float(each) for each in expected], rel=1e-3, abs=1e-4
            )
    assert bench.outputs[100][-1].logprobs is None
    bench.core.close()


def test_a_beam_that_cannot_go_on_ends_alone(llama: Family) -> None:
    bench = Bench(llama)
    letters = [token for token, text in enumerate(TEXTS) if text in "abcdt,"[:5] and text]
    bench.search(
        0,
        prompt_of(9, 1),
        False,
        Beams(4, [0] * 4),
        regex_grammar("[abc]{2}|d[a-t]{1}0"),  # behind a d, no token that may be drawn leads to the end
        max_tokens=6,
        allowed_token_ids=tuple(letters),
        eos_token_ids=(),
    )
    bench.finish()
    found, scores = bench.found(0, 4)
    assert all(regex.fullmatch("[abc]{2}", text_of(tokens)) for tokens in found), found
    assert scores == sorted(scores, reverse=True)
    bench.core.close()


def test_a_search_of_which_no_beam_can_go_on_fails_alone(llama: Family) -> None:
    bench = Bench(llama)
    digit = TEXTS.index("0")
    search: dict[str, Any] = {"max_tokens": 6, "allowed_token_ids": (digit,)}
    bench.search(0, prompt_of(9, 1), False, Beams(2, [0] * 2), regex_grammar("0a"), **search)
    bench.search(1, prompt_of(9, 1), False, Beams(2, [0]), regex_grammar("00"), **search)
    bench.finish()
    assert "no token is left to draw" in bench.outputs[0][-1].error
    assert bench.outputs[0][-1].error_reason == "INVALID_PARAMETER"
    assert bench.outputs[100][-1].finish_reason is FinishReason.STOP
    assert bench.core.blocks.num_used == 0
    bench.core.close()


def test_a_form_with_fewer_texts_than_outputs_leaves_the_others_empty(llama: Family) -> None:
    bench = Bench(llama)
    bench.search(0, prompt_of(9, 1), False, Beams(4, [0] * 4), regex_grammar("0|1"), max_tokens=6)
    bench.finish()
    last = [bench.outputs[place][-1] for place in range(4)]
    assert sorted(text_of(output.token_ids) for output in last) == ["", "", "0", "1"]
    assert [output.score == float("-inf") for output in last] == [False, False, True, True]
    bench.core.close()


def test_a_stop_string_counts_from_the_least_number_of_tokens_on(llama: Family) -> None:
    bench = Bench(llama)
    grammar = regex_grammar("([abc]0){9}")
    bench.search(0, prompt_of(9, 1), False, Beams(2, [0]), grammar, max_tokens=12, min_tokens=5, stop=("0",))
    bench.finish()
    [output] = bench.outputs[0][-1:]
    assert (len(output.token_ids), output.finish_reason) == (6, FinishReason.STOP)
    bench.core.close()
