"""A model that has to call tools and is searched: each output is a call as the grammar has it, the best first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_engine.link.beams import Beams
from loraplex_engine.link.grammar import calls_grammar
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.engine.forms import EOS, Engine, save_tiny_model

ARGUMENTS = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2, 3]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CALLS = [(f'"{name}("', ARGUMENTS, '")"') for name in ("add", "sub")]


@pytest.mark.parametrize("between", [None, '";"'], ids=["one", "several"])
def test_each_output_of_a_search_is_a_call(tmp_path: Path, between: str | None) -> None:
    save_tiny_model(tmp_path)
    engine, ids = Engine(tmp_path), [1, 2, 3, 4]
    beams = Beams(4, ids)
    sampling = SamplingParams(
        seed=0, temperature=0.0, max_tokens=120, eos_token_ids=(EOS,), num_candidates=beams.num_candidates(1)
    )
    grammar = calls_grammar('"<"', CALLS, between, '">"')
    engine.core.add(AddRequest(1, [65, 66, 67], sampling, grammar=grammar, beams=beams))
    engine.finish()
    texts = [engine.text(number).decode() for number in ids]
    assert len({tuple(engine.tokens(number)) for number in ids}) == len(ids)
    for text in texts:
        assert (text[0], text[-1]) == ("<", ">")
        for call in text[1:-1].split(";"):
            assert call[:4] in ("add(", "sub(")
            arguments = json.loads(call[4:-1])
            assert set(arguments) == {"a", "b"}
            assert arguments["a"] in (1, 2, 3)
    ends = [engine.end(number) for number in ids]
    assert {end.finish_reason for end in ends} <= {FinishReason.STOP, FinishReason.EOS}
    scores = [end.score for end in ends if end.score is not None]
    assert scores == sorted(scores, reverse=True)
    engine.core.blocks.check()
    engine.core.close()
