"""A dry run of speculative decoding: a drafter between the scheduler and the runner, which know nothing of it.

What is drawn is a function of the seed and the position, so drafts change how many steps an output takes, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from loraplex_engine.scheduling.step import StepPlan

transformers = pytest.importorskip("transformers")

P, VOCAB, BUDGET = 4, 24, 24
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "num_logprobs": 2},
    "penalties": {"temperature": 0.6, "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.1},
    "stop tokens": {"temperature": 1.2, "min_tokens": 4, "eos_token_ids": (3,), "stop_token_ids": tuple(range(5, 9))},
}
Guess = Callable[[Sequence[int]], Sequence[int]]


def what_followed(tokens: Sequence[int]) -> Sequence[int]:
    """The three tokens that followed the last occurrence of the last two."""
    for at in range(len(tokens) - 3, -1, -1):
        if list(tokens[at : at + 2]) == list(tokens[-2:]):
            return tokens[at + 2 : at + 5]
    return ()


def rubbish(tokens: Sequence[int]) -> Sequence[int]:
    return [len(tokens) % VOCAB] * 3


class Drafter:
    """Adds drafts to the plans of an engine, as far as it has rows and blocks left for them."""

    def __init__(self, core: EngineCore, guess: Guess) -> None:
        self.blocks, self.guess, self.max_model_len = core.blocks, guess, core.limits.max_model_len
        self.plan, self.num_drafted = core.scheduler.schedule, 0

    def schedule(self) -> StepPlan:
        plan = self.plan()
        scheduled, left = [], BUDGET - plan.num_tokens
        for item in plan.scheduled:
            count = min(left, self.max_model_len - item.request.num_tokens) if item.samples else 0
            drafts = tuple(self.guess(item.request.token_ids)[:count])
            if self.blocks.grow(item.request, item.request.num_tokens + len(drafts)):
                item, left = item._replace(draft_token_ids=drafts), left - len(drafts)
            scheduled.append(item)
        self.num_drafted += BUDGET - plan.num_tokens - left
        return StepPlan(tuple(scheduled))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**shape, vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(folder: Path, guess: Guess | None, num_blocks: int) -> tuple[dict[int, list[RequestOutput]], EngineCore, int]:
    """Every kind of request three times, side by side."""
    fields: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": num_blocks * P * 2 * 2 * 16 * 4, "block_size": P}
    core = EngineCore.load(EngineConfig(model=str(folder), threads=1, max_num_batched_tokens=BUDGET, **fields))
    drafter = Drafter(core, guess or (lambda tokens: ()))
    core.scheduler.schedule = drafter.schedule  # type: ignore[method-assign]
    for number, asked in enumerate([*ASKED.values()] * 3):
        prompt = [(7 * number + place) % VOCAB for place in range(3 + number)]
        core.add(AddRequest(number, prompt, SamplingParams(seed=number, max_tokens=30, **asked)))
    found: dict[int, list[RequestOutput]] = {}
    while core.has_work():
        for event in core.step():
            for output in event.outputs if isinstance(event, StepOutput) else ():
                found.setdefault(output.request_id, []).append(output)
        core.blocks.check()
    core.close()
    return found, core, drafter.num_drafted


def told(outputs: Sequence[RequestOutput]) -> tuple[Any, ...]:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [(one.token_id, one.rank, one.top_ids) for output in outputs for one in output.logprobs or ()]
    return tokens, logprobs, outputs[-1].finish_reason, outputs[-1].stop_token_id


@pytest.mark.parametrize("num_blocks", [200, 16], ids=["room for all", "preemption"])
@pytest.mark.parametrize("guess", [what_followed, rubbish])
def test_outputs_with_drafts_equal_plain_ones(folder: Path, guess: Guess, num_blocks: int) -> None:
    plain, _, _ = run(folder, None, 200)
    drafted, core, num_drafted = run(folder, guess, num_blocks)
    assert num_drafted
    assert {number: told(each) for number, each in drafted.items()} == {n: told(each) for n, each in plain.items()}
    assert {FinishReason.STOP, FinishReason.MAX_TOKENS} <= {each[-1].finish_reason for each in drafted.values()}
    assert bool(core.scheduler.num_preemptions) == (num_blocks == 16)
    if guess is what_followed:
        assert max(len(output.token_ids) for each in drafted.values() for output in each) == 4


def test_a_drafter_is_small() -> None:
    assert len(Path(__file__).read_text().splitlines()) <= 120
