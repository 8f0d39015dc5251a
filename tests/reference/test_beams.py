"""Beam search against transformers' `generate(num_beams=…)`, token by token, beside requests of all other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.stepping import step

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCAB, EOS, BLOCK = 61, (2, 7), 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
}
EARLY = {EarlyStopping.HEURISTIC: False, EarlyStopping.ALWAYS: True, EarlyStopping.NEVER: "never"}


class Family:
    """A small model with an adapter, in transformers and on disk."""

    def __init__(self, name: str, folder: Path) -> None:
        model, config, fields = FAMILIES[name]
        torch.manual_seed(5)
        base = getattr(transformers, model)(getattr(transformers, config)(**SHAPE, **fields)).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(3.0)  # else every next token is nearly a tie
        base.save_pretrained(folder / "base")
        targets = ["q_proj", "v_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, lora, adapter_name="tuned")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.model.peft_config["tuned"].base_model_name_or_path = "base"
        self.model.save_pretrained(folder / "adapters")
        self.folder = folder
        self.key = AdapterKey("shared/tuned", digest(folder / "adapters" / "tuned"))

    def searched(self, prompt: list[int], tuned: bool, **options: Any) -> tuple[list[list[int]], list[float]]:
        """The outputs and their scores, as transformers finds them."""
        ids = torch.tensor([prompt])
        call = {
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": list(EOS),
            "attention_mask": torch.ones_like(ids),
        }
        call |= {"return_dict_in_generate": True, "output_scores": True} | options
        with torch.inference_mode():
            if tuned:
                found = self.model.generate(input_ids=ids, **call)
            else:
                with self.model.disable_adapter():
                    found = self.model.generate(input_ids=ids, **call)
        outputs = [_unpadded(row[len(prompt) :].tolist()) for row in found.sequences]
        return outputs, found.sequences_scores.tolist()


def _unpadded(tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in EOS]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


class Bench:
    """An engine, and what comes out of it by request."""

    def __init__(self, family: Family, **fields: Any) -> None:
        settings: dict[str, Any] = {"kernels": "cpu", "device": "cpu", "dtype": "float32", "kv_cache_bytes": 4 << 20}
        settings |= {"threads": 1, "block_size": BLOCK, "max_model_len": 96, "max_num_seqs": 16} | fields
        self.core = EngineCore.load(EngineConfig(model=str(family.folder / "base"), **settings))
        self.key = family.key
        self.core.want_adapter(WantAdapter(family.key, 1, str(family.folder / "adapters" / "tuned")))
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.finish()

    def search(self, number: int, prompt: list[int], tuned: bool, beams: Beams, **fields: Any) -> None:
        ids = [number * 100 + place for place in range(len(beams.output_ids))]
        sampled: dict[str, Any] = {"seed": 0, "temperature": 0.0, "eos_token_ids": EOS} | fields
        sampling = SamplingParams(**sampled, num_candidates=beams.num_candidates(len(EOS)))
        key = self.key if tuned else None
        self.core.add(AddRequest(ids[0], prompt, sampling, key, beams=replace_ids(beams, ids)))

    def step(self) -> None:
        for message in step(self.core):
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)

    def finish(self) -> None:
        while self.core.has_work():
            self.step()

    def found(self, number: int, count: int) -> tuple[list[list[int]], list[float]]:
        last = [self.outputs[number * 100 + place][-1] for place in range(count)]
        assert not any(output.error for output in last), last
        return [output.token_ids for output in last], [output.score or 0.0 for output in last]


def replace_ids(beams: Beams, ids: list[int]) -> Beams:
    return Beams(beams.width, ids, beams.length_penalty, beams.early_stopping)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCAB, (length,), generator=generator).tolist()


SEARCHES = [  # width, outputs, length penalty, early stopping, most tokens, least tokens
    (2, 1, 1.0, EarlyStopping.HEURISTIC, 12, 0),
    (4, 4, 1.0, EarlyStopping.ALWAYS, 16, 0),
    (3, 2, 0.0, EarlyStopping.NEVER, 20, 0),
    (5, 3, 2.0, EarlyStopping.NEVER, 14, 4),
    (4, 2, -1.0, EarlyStopping.HEURISTIC, 18, 6),
    (8, 8, 0.6, EarlyStopping.HEURISTIC, 9, 0),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 11},
        {"kv_cache_bytes": 28 * BLOCK * 2 * 2 * 2 * 16 * 4},
        {"enable_prefix_caching": False},
    ],
    ids=["plain", "chunked", "preempted", "uncached"],
)
def test_searches_equal_transformers_token_by_token(family: Family, settings: dict[str, Any]) -> None:
    bench = Bench(family, **settings)
    asked = {number: (prompt_of(3 + 5 * number, number), bool(number % 2), *SEARCHES[number]) for number in range(6)}
    for number, (prompt, tuned, width, count, penalty, early, most, least) in asked.items():
        beams = Beams(width, [0] * count, penalty, early)
        bench.search(number, prompt, tuned, beams, max_tokens=most, min_tokens=least)
        sampling = SamplingParams(seed=number, max_tokens=10)
        bench.core.add(AddRequest(9000 + number, prompt, sampling, None if tuned else bench.key))
        bench.step()
    bench.finish()
    for number, (prompt, tuned, width, count, penalty, early, most, least) in asked.items():
        outputs, scores = family.searched(
            prompt,
            tuned,
            num_beams=width,
            num_return_sequences=count,
            length_penalty=penalty,
            early_stopping=EARLY[early],
            max_new_tokens=most,
            **({"min_new_tokens": least} if least else {}),
        )
        found, found_scores = bench.found(number, count)
        assert found == outputs, (number, found_scores, scores)
        assert found_scores == pytest.approx(scores, rel=1e-3, abs=1e-3)
    if "kv_cache_bytes" in settings:
        assert bench.core.scheduler.num_preemptions > 0
    assert bench.core.blocks.num_used == 0
    bench.core.blocks.check()
    bench.core.close()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"logit_bias": {11: 2.0}}, {"sequence_bias": [[[11], 2.0]]}),
    ],
    ids=["penalty", "bias"],
)
def test_what_changes_logits_changes_log_probabilities_as_in_transformers(
    family: Family, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    bench = Bench(family)
    prompt = prompt_of(9, 3)
    bench.search(0, prompt, True, Beams(4, [0, 0]), max_tokens=12, **ours)
    bench.finish()
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12} | theirs
    outputs, scores = family.searched(prompt, True, **options)
    found, found_scores = bench.found(0, 2)
    assert found == outputs
    assert found_scores == pytest.approx(scores, rel=1e-3)
    bench.core.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("llama", tmp_path_factory.mktemp("one"))


def test_a_search_that_is_dropped_leaves_nothing(llama: Family) -> None:
    bench = Bench(llama)
    bench.search(0, prompt_of(9, 1), True, Beams(4, [0, 0]), max_tokens=40, eos_token_ids=())
    for _ in range(6):
        bench.step()
    bench.core.abort([0])
    bench.finish()
    assert [output.token_ids for output in bench.outputs[0]] == [[]] * len(bench.outputs[0])
    assert bench.core.blocks.num_used == 0
    bench.core.blocks.check()
    bench.core.close()


def test_a_search_at_its_time_limit_gives_the_best_that_it_has(llama: Family) -> None:
    bench = Bench(llama)
    now = 0.0
    bench.core.scheduler.clock = lambda: now
    bench.search(0, prompt_of(9, 1), False, Beams(3, [0, 0]), max_tokens=40, eos_token_ids=(), time_limit_seconds=1e9)
    for _ in range(6):
        bench.step()
    now = 1e12
    bench.finish()
    found, scores = bench.found(0, 2)
    assert [len(output) for output in found] == [6, 6]
    assert scores == sorted(scores, reverse=True)
    assert bench.outputs[0][-1].finish_reason is FinishReason.TIME_LIMIT
    assert bench.core.blocks.num_used == 0
    bench.core.close()


def test_a_search_whose_beams_do_not_fit_fails_alone(llama: Family) -> None:
    bench = Bench(llama, kv_cache_bytes=26 * BLOCK * 2 * 2 * 2 * 16 * 4)  # 26 blocks
    bench.search(0, prompt_of(9, 1), False, Beams(8, [0]), max_tokens=60, eos_token_ids=(), min_tokens=0)
    bench.core.add(AddRequest(9, prompt_of(5, 2), SamplingParams(seed=0, max_tokens=8)))
    bench.finish()
    assert "too few blocks" in bench.outputs[0][-1].error
    assert bench.outputs[9][-1].finish_reason is FinishReason.MAX_TOKENS
    assert bench.core.blocks.num_used == 0
    bench.core.close()


def test_a_search_says_what_it_takes_step_by_step(llama: Family) -> None:
    bench = Bench(llama)
    bench.search(0, prompt_of(9, 1), False, Beams(3, [0]), max_tokens=5, eos_token_ids=())
    bench.finish()
    assert [output.num_searched for output in bench.outputs[0]] == [1, 3, 3, 3, 3, 0]
    bench.core.close()
