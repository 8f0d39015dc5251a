"""A step as plain data: it can be written down, and computed again by whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.execution.arrays import History, StepArrays, step_arrays
from loraplex_engine.execution.form_masks import TokenMask
from loraplex_engine.execution.model_runner import NO_FORMS
from loraplex_engine.execution.sampler import Drawn
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.form import Form
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import PendingResult, SampledToken, ScheduledRequest, StepPlan, StepResult
from loraplex_kernels.transfers import Reading
from tests.reference.stepping import step

transformers = pytest.importorskip("transformers")

BLOCK_SIZE = 4
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "num_logprobs": 2},
    {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "num_prompt_logprobs": 1, "min_tokens": 2, "eos_token_ids": (3,)},
)


def encoded(step: StepArrays) -> bytes:
    return msgspec.msgpack.encode(step, enc_hook=lambda array: (array.dtype.str, array.shape, array.tobytes()))


def decoded(written: bytes) -> StepArrays:
    def read(kind: type, stored: Any) -> np.ndarray:
        dtype, shape, content = stored
        return np.frombuffer(content, dtype).reshape(shape).copy()

    return msgspec.msgpack.decode(written, type=StepArrays, dec_hook=read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, vocab_size=40, num_hidden_layers=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    prefix, generator = "base_model.model.model.layers.1.mlp.up_proj", torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 32, generator=generator), torch.randn(48, 3, generator=generator)
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return folder


def load(folder: Path) -> tuple[EngineCore, AdapterKey]:
    """An engine that holds the adapter in its only slot."""
    fields: dict[str, Any] = {"block_size": BLOCK_SIZE, "kv_cache_bytes": 1 << 20, "max_num_batched_tokens": 12}
    config = EngineConfig(model=str(folder / "base"), kernels="reference", max_resident_adapters=1, **fields)
    core, key = EngineCore.load(config), AdapterKey("shared/one", digest(folder / "adapter"))
    core.want_adapter(WantAdapter(key, 1, str(folder / "adapter")))
    core.add(AddRequest(99, [1, 2], SamplingParams(seed=0, max_tokens=1), key))
    while core.has_work():
        step(core)
    return core, key


def test_steps_that_were_written_down_give_the_same_results_when_they_are_read_back(folder: Path) -> None:
    first, key = load(folder)
    start = first.runner.start
    written: list[bytes] = []
    results: list[StepResult] = []

    def note(step: StepArrays, forms: Mapping[int, Form] = NO_FORMS) -> PendingResult:
        written.append(encoded(step))
        results.append(result := start(step).result())
        return PendingResult(lambda: result)

    first.runner.start = note  # type: ignore[method-assign]
    for number, fields in enumerate(ASKED * 2):
        sampling = SamplingParams(seed=number, max_tokens=5, **fields)
        first.add(AddRequest(number, list(range(1, 4 + 3 * number)), sampling, key if number % 2 else None))
    while first.has_work():
        step(first)
    first.close()
    assert any(tokens for result in results for tokens in result.sampled)
    assert any(result.prompt_logprobs for result in results)

    second, _ = load(folder)
    assert [second.runner.start(decoded(one)).result() for one in written] == results
    second.close()


def request(prompt: list[int], output: list[int], **fields: Any) -> Request:
    made = Request(AddRequest(1, prompt, SamplingParams(seed=0, max_tokens=9, **fields)), 1, now=0.0)
    made.token_ids += output
    made.block_ids = [5, 2]
    return made


def test_arrays_stay_as_they_are_when_the_request_goes_on() -> None:
    going_on = request([7, 8, 9], [4], repetition_penalty=2.0, num_prompt_logprobs=0)
    plan = StepPlan((ScheduledRequest(going_on, 0, 4),))
    arrays = step_arrays(plan, BLOCK_SIZE)
    before = encoded(arrays)
    going_on.token_ids += [1, 2]
    going_on.block_ids.append(3)
    assert encoded(arrays) == before


def test_each_token_has_its_place_in_the_sequence_and_in_the_cache() -> None:
    plan = StepPlan((ScheduledRequest(request([7, 8, 9, 6, 5], []), 2, 3), ScheduledRequest(request([1], [3]), 1, 1)))
    arrays = step_arrays(plan, BLOCK_SIZE)
    assert arrays.token_ids.tolist() == [9, 6, 5, 3]
    assert arrays.positions.tolist() == [2, 3, 4, 1]
    assert arrays.slot_mapping.tolist() == [22, 23, 8, 21]
    assert arrays.query_starts.tolist() == [0, 3, 4]
    assert arrays.seq_lens.tolist() == [5, 2]
    assert arrays.block_tables.tolist() == [[5, 2], [5, 2]]


def test_a_sequence_in_the_middle_of_its_prompt_is_not_drawn_from() -> None:
    plan = StepPlan((ScheduledRequest(request([7, 8, 9], []), 0, 2), ScheduledRequest(request([1], [3]), 1, 1)))
    arrays = step_arrays(plan, BLOCK_SIZE)
    assert arrays.num_drawn == (0, 1)
    assert [history.num_tokens for history in arrays.histories] == [2]
    assert arrays.logits_rows.tolist() == [2]


def test_a_token_is_drawn_after_each_draft_as_if_it_were_known() -> None:
    drafted = ScheduledRequest(request([7, 8], [9], presence_penalty=1.0), 2, 1, draft_token_ids=(4, 6))
    arrays = step_arrays(StepPlan((drafted, ScheduledRequest(request([1], [3]), 1, 1))), BLOCK_SIZE)
    assert arrays.token_ids.tolist() == [9, 4, 6, 3]
    assert arrays.positions.tolist() == [2, 3, 4, 1]
    assert arrays.seq_lens.tolist() == [5, 2]
    assert arrays.num_drawn == (3, 1)
    assert arrays.logits_rows.tolist() == [0, 1, 2, 3]
    assert [history.num_tokens for history in arrays.histories] == [3, 4, 5, 2]
    assert [counted(history) for history in arrays.histories] == [
        {7: 0, 8: 0, 9: 1},
        {7: 0, 8: 0, 9: 1, 4: 1},
        {7: 0, 8: 0, 9: 1, 4: 1, 6: 1},
        {},
    ]


def test_drafts_can_be_sequences_of_their_own_that_see_the_same_tokens() -> None:
    adapted = request([7, 8], [9])
    adapted.adapter_slot = 1
    plan = StepPlan((ScheduledRequest(request([1], [3]), 1, 1), ScheduledRequest(adapted, 2, 1, (4, 6))))
    together, apart = step_arrays(plan, BLOCK_SIZE), step_arrays(plan, BLOCK_SIZE, drafts_apart=True)
    assert apart.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert apart.seq_lens.tolist() == [2, 3, 4, 5]
    assert apart.block_tables.tolist() == [[5, 2]] * 4
    assert apart.max_query_len == 1
    for name in ("token_ids", "positions", "slot_mapping", "lora", "logits_rows", "logits_lora", "num_drawn"):
        assert np.array_equal(getattr(apart, name), getattr(together, name))
    assert [history.num_tokens for history in apart.histories] == [2, 3, 4, 5]


class ScriptedSampler:
    def __init__(self, drawn: list[int | None]) -> None:
        self.drawn = [None if token is None else SampledToken(token, None) for token in drawn]

    def sample(self, logits: torch.Tensor, histories: Sequence[History], mask: TokenMask | None) -> Drawn:
        assert len(logits) == len(histories) == len(self.drawn)
        return Drawn(torch.tensor([-1 if token is None else token.token_id for token in self.drawn]), self.reading())

    def reading(self) -> Reading[list[SampledToken | None]]:
        return Reading((), lambda here: self.drawn)


@pytest.mark.parametrize(
    ("drawn", "kept", "failed"),
    [
        ([4, 6, 8], [4, 6, 8], False),
        ([4, 5, None], [4, 5], False),
        ([5, 6, 8], [5], False),
        ([4, None, 8], [4], False),
        ([None, 6, 8], [], True),
    ],
)
def test_tokens_are_kept_up_to_the_first_that_is_not_the_draft_in_its_place(
    folder: Path, drawn: list[int | None], kept: list[int], failed: bool
) -> None:
    core, _ = load(folder)
    core.runner.sampler = ScriptedSampler([7, *drawn])  # type: ignore[assignment]
    drafted = ScheduledRequest(request([7, 8], [9]), 2, 1, draft_token_ids=(4, 6))
    result = core.runner.execute(StepPlan((ScheduledRequest(request([1], [3]), 1, 1), drafted))).result()
    core.close()
    assert [[token.token_id for token in tokens] for tokens in result.sampled] == [[7], kept]
    assert bool(result.not_finite) == failed


@pytest.mark.parametrize(
    ("computed", "new", "targets", "rows"),
    [(0, 2, [8, 9], [0, 1]), (2, 2, [6], [0]), (3, 1, [], []), (4, 1, [], [])],
)
def test_rows_of_the_prompt_predict_the_tokens_after_them(
    computed: int, new: int, targets: list[int], rows: list[int]
) -> None:
    plan = StepPlan((ScheduledRequest(request([7, 8, 9, 6], [3, 2], num_prompt_logprobs=1), computed, new),))
    arrays = step_arrays(plan, BLOCK_SIZE)
    assert [found.token_ids for found in arrays.prompt_targets] == [targets]
    assert arrays.logits_rows.tolist() == rows


@pytest.mark.parametrize(("start", "ranges"), [(0, ((1, 0, 3),)), (3, ((1, 1, 3),)), (5, ()), (None, ())])
def test_an_adapter_applies_to_the_rows_from_its_invocation_on(
    start: int | None, ranges: tuple[tuple[int, int, int], ...]
) -> None:
    adapted = request([7, 8, 9, 6, 5], [])
    adapted.adapter_slot, adapted.adapter_start = 1, start
    assert step_arrays(StepPlan((ScheduledRequest(adapted, 2, 3),)), BLOCK_SIZE).lora == ranges


def counted(history: History) -> dict[int, int]:
    """How often the output has each token of a history."""
    return dict(zip(*(column.tolist() for column in history.counts), strict=True))


def test_a_history_holds_its_tokens_only_where_a_parameter_reads_them() -> None:
    assert counted(History.of(request([7, 8], [9], presence_penalty=1.0))) == {7: 0, 8: 0, 9: 1}
    assert not counted(History.of(request([7, 8], [9])))


def test_a_sequence_that_branches_counts_its_own_tokens() -> None:
    parent = request([7, 8], [9], presence_penalty=1.0)
    History.of(parent)
    branch = parent.forked()
    parent.token_ids.append(9)
    branch.token_ids.append(7)
    assert counted(History.of(parent)) == {7: 0, 8: 0, 9: 2}
    assert counted(History.of(branch)) == {7: 1, 8: 0, 9: 1}
