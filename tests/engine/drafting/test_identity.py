"""Drafts change how many steps an output takes, and nothing else: whatever is asked for, and whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.drafting.drafting import Drafting
from loraplex_engine.drafting.model import ModelDrafts
from loraplex_engine.drafting.source import FREE, Costs, Ngrams, Source
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.grammar import choice_grammar, regex_grammar, schema_grammar
from loraplex_engine.link.messages import AddRequest, RequestOutput, SetVocabulary, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import Request
from tests.reference.stepping import step

pytest.importorskip("transformers")
pytest.importorskip("loraplex_kernels.cpu.library")

from tests.engine.forms import EOS, TOKENS, VOCAB, save_tiny_model

P = 4
ROOM, TIGHT = 400, 16  # blocks
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2, "num_logprobs": 0},
    {"temperature": 0.9, "top_p": 0.9, "num_logprobs": 3},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.02, "typical_p": 0.95},
    {"temperature": 0.6, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 0.3, "logit_bias": {65: 9.0, 66: 8.0, 67: 8.5}, "num_prompt_logprobs": 1},
    {"temperature": 0.7, "min_tokens": 6, "stop_token_ids": tuple(range(97, 110)), "logit_bias": {98: 3.0}},
    {"temperature": 1.0, "allowed_token_ids": (65, 66, 67, 68), "num_logprobs": 1},
)
GRAMMARS = (
    "",
    schema_grammar({"type": "array", "items": {"enum": ["ab", "abab"]}, "minItems": 2, "maxItems": 8}),
    regex_grammar("(abc|abd){4,12}"),
    choice_grammar(["ABCABCABCABCABCABC", "ABC"]),
)


class Asked(NamedTuple):
    sampling: int
    grammar: int
    adapted: bool
    prompt: tuple[int, ...]
    seed: int
    drafts: int
    most: int


ASKED = st.builds(
    Asked,
    st.integers(0, len(SAMPLINGS) - 1),
    st.integers(0, len(GRAMMARS) - 1),
    st.booleans(),
    st.lists(st.sampled_from([65, 66, 67, 97]), min_size=1, max_size=12).map(tuple),
    st.integers(0, 1 << 53),
    st.integers(0, 6),
    st.integers(1, 40),
)


class FreeCosts(StepCosts):
    """Drafts cost nothing, so that there are many of them."""

    def prices(self, num_requests: int, rows: int, most: int) -> list[float]:
        return [0.0] * most


class Gambler(Source):
    """Drafts that are sometimes right whatever is drawn: the next tokens of the plain output, and rubbish."""

    is_free = True

    def __init__(self) -> None:
        self.outputs: dict[int, Sequence[int]] = {}  # of the plain engine, by request id
        self.num_asked = 0

    def costs(self, request: Request, num_requests: int, token_seconds: float) -> Costs:
        return FREE

    def propose(self, wanted: Mapping[int, tuple[Request, int]]) -> dict[int, Sequence[int]]:
        return {key: self.guess(request, count) for key, (request, count) in wanted.items()}

    def guess(self, request: Request, count: int) -> Sequence[int]:
        self.num_asked += 1
        known = request.num_output_tokens
        right = list(self.outputs[request.request_id % 1000][known : known + self.num_asked % 4])
        return [*right, EOS, self.num_asked % VOCAB, 65, 66, 67, 68][:count]

    def forget(self, request: Request) -> None:
        return


class Engine:
    """An engine core with an adapter, whose requests may have drafts."""

    def __init__(self, folder: Path, num_blocks: int, source: Source | None) -> None:
        """`source`: where drafts come from; None: from a small model."""
        cache = num_blocks * P * 1 * 2 * 16 * 4 * (2 if source is None else 1)
        fields: dict[str, Any] = {"dtype": "float32", "kernels": "cpu", "threads": 1, "kv_cache_bytes": cache}
        limits: dict[str, Any] = {"block_size": P, "max_num_batched_tokens": 24, "max_model_len": 64}
        self.kind = DraftKind.MODEL if source is None else DraftKind.NGRAM
        drafts = DraftConfig(kind=self.kind, model=str(folder / "small") if source is None else None)
        self.core = EngineCore.load(EngineConfig(model=str(folder / "base"), drafts=drafts, **fields, **limits))
        configured = self.core.scheduler.drafter
        assert isinstance(configured, Drafting)
        self.source = source or configured._sources[self.kind]
        self.core.scheduler.drafter = Drafting(
            self.core.blocks, {self.kind: self.source}, FreeCosts({1: 1.0}), 256, 64, self.core.scheduler.clock
        )
        self.core.set_vocabulary(SetVocabulary(TOKENS))
        self.adapter = AdapterKey("shared/one", digest(folder / "adapter"))
        self.core.want_adapter(WantAdapter(self.adapter, 1, str(folder / "adapter")))

    def run(self, asked: Sequence[Asked], drafts: bool, resumed_after: int = 0) -> list[list[RequestOutput]]:
        """The outputs of each request. After some steps all go on anew, as with the next engine."""
        found: list[list[RequestOutput]] = [[] for _ in asked]
        for number, each in enumerate(asked):
            self.add(number, each, drafts, [])
        steps = 0
        while self.core.has_work():
            self.take(step(self.core), found)
            self.core.blocks.check()
            steps += 1
            if steps == resumed_after:
                self.resume(asked, drafts, found)
        return found

    def add(self, request_id: int, asked: Asked, drafts: bool, output: list[int]) -> None:
        chosen = SAMPLINGS[asked.sampling]
        grammar = GRAMMARS[0 if "allowed_token_ids" in chosen else asked.grammar]
        sampling = SamplingParams(
            seed=asked.seed, max_tokens=max(asked.most, 7), **({"eos_token_ids": (EOS,)} | chosen)
        )
        self.core.add(
            AddRequest(
                request_id,
                list(asked.prompt),
                sampling,
                self.adapter if asked.adapted else None,
                grammar=grammar,
                output_token_ids=output,
                drafts=Drafts(self.kind, asked.drafts if drafts else 0),
            )
        )

    def take(self, events: Sequence[Any], found: list[list[RequestOutput]]) -> None:
        for event in events:
            for output in event.outputs if isinstance(event, StepOutput) else ():
                found[output.request_id % 1000].append(output)

    def resume(self, asked: Sequence[Asked], drafts: bool, found: list[list[RequestOutput]]) -> None:
        for number, each in enumerate(asked):
            if not found[number] or found[number][-1].finish_reason is None:
                self.core.abort([number])
                tokens = [token for output in found[number] for token in output.token_ids]
                self.add(number + 1000, each, drafts, tokens)


def told(outputs: Sequence[RequestOutput]) -> tuple[Any, ...]:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    prompt = next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), None)
    return tokens, logprobs, prompt, outputs[-1].finish_reason, outputs[-1].stop_token_id, outputs[-1].error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    save_tiny_model(folder / "base")
    save_tiny_model(folder / "small")  # the same, but for what a little noise changes
    weights = load_file(folder / "small" / "model.safetensors")
    noise = torch.Generator().manual_seed(2)
    noisy = {name: each + 0.002 * torch.randn(each.shape, generator=noise) for name, each in weights.items()}
    save_file(noisy, folder / "small" / "model.safetensors", {"format": "pt"})
    (folder / "adapter").mkdir()
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 30, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    prefix, generator = "base_model.model.model.layers.0.mlp.up_proj", torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 32, generator=generator), torch.randn(48, 3, generator=generator)
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return folder


def no_source() -> None:
    return None


class Engines(NamedTuple):
    plain: Engine
    drafted: Sequence[Engine]  # with n-grams, a gambler or a small model, with room for all or for few


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[Engines]:
    drafted = [Engine(folder, blocks, source()) for blocks in (ROOM, TIGHT) for source in (Ngrams, Gambler, no_source)]
    made = Engines(Engine(folder, ROOM, Ngrams()), drafted)
    yield made
    assert made.plain.core.scheduler.draft_tokens == 0
    for engine in drafted:
        assert engine.core.scheduler.draft_tokens >= engine.core.scheduler.accepted_draft_tokens > 0
        assert not isinstance(engine.source, ModelDrafts) or engine.source._blocks.num_used == 0
    assert sum(engine.core.scheduler.num_preemptions for engine in drafted) > 0
    for engine in (made.plain, *drafted):
        engine.core.close()


@settings(deadline=None, max_examples=50)
@example(asked=[Asked(kind, kind % 4, kind % 2 == 0, (65, 66, 65), kind, 5, 40) for kind in range(5)], resumed_after=9)
@given(asked=st.lists(ASKED, min_size=1, max_size=5), resumed_after=st.integers(0, 8))
def test_tokens_ends_and_log_probabilities_are_those_without_drafts(
    engines: Engines, asked: list[Asked], resumed_after: int
) -> None:
    expected = [told(outputs) for outputs in engines.plain.run(asked, drafts=False)]
    for drafted in engines.drafted:
        if isinstance(drafted.source, Gambler):
            drafted.source.outputs = {number: tokens for number, (tokens, *_) in enumerate(expected)}
        found = [told(outputs) for outputs in drafted.run(asked, drafts=True, resumed_after=resumed_after)]
        assert found == expected
