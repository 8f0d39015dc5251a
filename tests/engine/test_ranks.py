"""An engine of two processes, each with a share of the model, draws the tokens of one process.

Logits are sums in another order: they differ in the last bits, and these models draw the same tokens all the same.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.residency import Residency
from loraplex_engine.drafting.costs import StepCosts
from loraplex_engine.execution.rank_runners import LeadingRunner
from loraplex_engine.following.leader import Leader
from loraplex_engine.following.ready import READ
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.grammar import regex_grammar
from loraplex_engine.link.load_report import UNREPORTED
from loraplex_engine.link.messages import AdaptersChanged, AddRequest, WantAdapter
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.ranks.group import RanksLostError
from tests.engine.forms import EOS, VOCAB, Engine
from tests.engine.models.loras import write_lora
from tests.reference.stepping import step

HIDDEN, INNER, LAYERS, HEADS = 32, 48, 2, 4
BLOCK_BYTES = LAYERS * 2 * 4 * HIDDEN // 2 * 4  # of the keys and values of four tokens on one rank of one
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"top_p": 0.9, "num_prompt_logprobs": 1},
    {"grammar": regex_grammar("[a-f]{3,9}")},
    {"stop_token_ids": tuple(range(100, 200)), "top_k": 50},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"pooling": PoolingParams(method=PoolingMethod.MEAN), "max_tokens": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": HEADS, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = transformers.LlamaConfig(**shape, vocab_size=VOCAB, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    return folder


def written(folder: Path, dora: bool) -> tuple[AdapterKey, Path]:
    """An adapter on all that ranks divide, and where it is."""
    path = folder / ("dora" if dora else "lora")
    if path.exists():
        return AdapterKey("shared/lora", digest(path)), path
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in MODULES.items()}
    return write_lora(path, modules | ({} if dora else {"lm_head": (VOCAB, HIDDEN)}), dora=dora), path


class Bench:
    """An engine with a LoRA adapter, a DoRA adapter and their base."""

    def __init__(self, folder: Path, world: int, num_blocks: int = 400, **settings: Any) -> None:
        fields: dict[str, Any] = {"kernels": "cpu", "dtype": "float32", "max_num_batched_tokens": 24}
        fields |= {"max_model_len": 64, "kv_cache_bytes": num_blocks * BLOCK_BYTES // world, "tensor_parallel": world}
        self.engine = Engine(folder / "base", **(fields | settings))
        self.core = self.engine.core
        self.kind = DraftKind.NGRAM  # of the drafts that requests ask for
        self.adapters: list[AdapterKey | None] = [None]
        for dora in (False, True):
            key, path = written(folder, dora)
            self.core.want_adapter(WantAdapter(key, 1, str(path), least=Residency.DEVICE))
            self.adapters.append(key)
        self.engine.finish()  # until both are there: no test depends on those before it

    def ask(self, count: int = 12) -> dict[int, tuple[Any, ...]]:
        """What each of so many requests is told, some of which arrive while others run."""
        for number in range(count):
            self.add(number, **ASKED[number % len(ASKED)])
            if number % 3 == 0:
                self.engine.step()
        self.engine.finish()
        return {number: self.told(number) for number in range(count)}

    def add(self, number: int, grammar: str = "", pooling: PoolingParams | None = None, **fields: Any) -> None:
        usual: dict[str, Any] = {"seed": number, "max_tokens": 9 + number % 5, "eos_token_ids": (EOS,)}
        sampling = SamplingParams(**(usual | fields))
        prompt = [(7 * place) % 200 for place in range(6 + number)]  # beginnings of each other
        drafts = Drafts(self.kind, 3) if number % 2 else Drafts()
        key = self.adapters[number % 3]
        self.core.add(AddRequest(number, prompt, sampling, key, pooling=pooling, grammar=grammar, drafts=drafts))

    def told(self, number: int) -> tuple[Any, ...]:
        end, tokens = self.engine.end(number), self.engine.tokens(number)
        return tokens, end.finish_reason, end.error, len(end.pooled)


@pytest.fixture(scope="module")
def benches(folder: Path) -> Iterator[dict[int, Bench]]:
    """Of one rank and of two; with drafts, and too few blocks for all requests."""
    drafts = DraftConfig(kind=DraftKind.NGRAM, tokens=3)
    found = {world: Bench(folder, world, num_blocks=40, drafts=drafts) for world in (1, 2)}
    yield found
    for bench in found.values():
        bench.core.close()


def group_of(bench: Bench) -> Any:
    assert isinstance(bench.core.runner, LeadingRunner)
    return bench.core.runner.group


def test_two_ranks_draw_what_one_draws(benches: dict[int, Bench]) -> None:
    one, two = (benches[world].ask() for world in (1, 2))
    assert two == one
    for bench in benches.values():
        stats = bench.core.stats()
        assert stats.num_preemptions
        assert stats.prefix_cache_hits
        assert stats.draft_tokens
        bench.core.blocks.check()


def test_hidden_states_are_those_of_one_rank(benches: dict[int, Bench]) -> None:
    found = []
    for bench in benches.values():
        bench.add(50, pooling=PoolingParams(method=PoolingMethod.LAST), max_tokens=0)
        bench.engine.finish()
        found.append(np.frombuffer(bench.engine.end(50).pooled, np.float32))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_composition_is_put_together_on_each_rank(benches: dict[int, Bench]) -> None:
    found = []
    for bench in benches.values():
        lora = bench.adapters[1]
        assert lora is not None
        prompt, key = [5, 6, 7], compose([(lora, 0.5)])
        bench.core.add(AddRequest(60, prompt, SamplingParams(seed=0, max_tokens=8, temperature=0.0), key))
        bench.engine.finish()
        found.append(bench.told(60))
    assert found[1] == found[0]


def test_a_step_has_two_sums_a_layer_and_gathers_its_logits_once(benches: dict[int, Bench]) -> None:
    bench = benches[2]
    bench.core.add(AddRequest(70, [1, 2, 3], SamplingParams(seed=0, max_tokens=2), bench.adapters[2]))
    bench.engine.step()
    traffic = group_of(bench).traffic
    before = traffic.sums, traffic.gatherings, traffic.nbytes
    bench.engine.step()
    assert (traffic.sums - before[0], traffic.gatherings - before[1]) == (2 * LAYERS, 1)
    # One row, adapter or not; of the vocabulary, half.
    assert traffic.nbytes - before[2] == 4 * (2 * LAYERS * HIDDEN + -(-VOCAB // 2))


def test_with_each_heartbeat_all_ranks_say_what_they_have_exchanged(benches: dict[int, Bench]) -> None:
    assert benches[1].core.beat().ranks == []
    bench = benches[2]
    before = bench.core.beat().ranks
    bench.core.add(AddRequest(75, [1, 2, 3], SamplingParams(seed=0, max_tokens=1), bench.adapters[2]))
    bench.engine.finish()
    after = bench.core.beat().ranks
    assert [(new.sums - old.sums, new.gatherings - old.gatherings) for new, old in zip(after, before, strict=True)] == [
        (2 * LAYERS, 1)
    ] * 2
    assert all(new.nbytes > old.nbytes and new.seconds > old.seconds for new, old in zip(after, before, strict=True))
    assert all(each.resident_bytes > 1 << 20 for each in after)


def test_an_adapter_that_no_rank_can_read_is_refused_and_others_go_on(
    benches: dict[int, Bench], tmp_path: Path
) -> None:
    bench = benches[2]
    key = write_lora(tmp_path / "damaged", {"model.layers.0.mlp.down_proj": (HIDDEN, INNER - 1)}, dora=True)
    bench.core.want_adapter(WantAdapter(key, 1, str(tmp_path / "damaged"), least=Residency.DEVICE))
    told = []
    while bench.core.has_work():
        told += [one for event in step(bench.core) if isinstance(event, AdaptersChanged) for one in event.statuses]
    assert any("shape" in problem for status in told for problem in status.problems)
    bench.core.add(AddRequest(80, [1, 2, 3], SamplingParams(seed=0, max_tokens=2), bench.adapters[2]))
    bench.engine.finish()
    assert len(bench.engine.tokens(80)) == 2


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is closed with the test."""
    with ExitStack() as stack:
        yield stack


def test_adapters_are_read_while_both_ranks_compute(benches: dict[int, Bench], tmp_path: Path) -> None:
    bench, modules = benches[2], {"model.layers.0.mlp.down_proj": (HIDDEN, INNER)}
    bench.core.add(AddRequest(90, [1, 2, 3], SamplingParams(seed=0, max_tokens=50), bench.adapters[2]))
    bench.engine.step()
    keys = [write_lora(tmp_path / str(rank), modules, rank=rank, dora=True) for rank in range(1, 7)]
    for rank, key in enumerate(keys, 1):  # each takes one sum over the ranks, in two threads of each
        bench.core.want_adapter(WantAdapter(key, 1, str(tmp_path / str(rank)), least=Residency.HOST))
    bench.engine.finish()
    assert len(bench.engine.tokens(90)) == 50
    while bench.core.store.is_loading():
        bench.core.step()
    assert all(bench.core.store.holds(key) for key in keys)


class Fixed(StepCosts):
    """Costs that no step changes."""

    def note(self, rows: int, seconds: float) -> None:
        pass


@pytest.mark.slow
def test_the_drafts_of_a_small_model_are_checked_by_both_ranks(
    folder: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = itertools.cycle([Fixed({1: 1e-6, 256: 2e-6}), Fixed({1: 1.0, 256: 1.01})])  # of the small one, then of both
    monkeypatch.setattr("loraplex_engine.core.measured", lambda *_: next(costs))
    drafts = DraftConfig(kind=DraftKind.MODEL, tokens=3, model=str(folder / "base"))
    found = []
    for world in (1, 2):
        bench = Bench(folder, world, num_blocks=200, drafts=drafts)
        opened.callback(bench.core.close)
        bench.kind = DraftKind.MODEL
        for number in (1, 3, 5, 9):  # two of the base, which drafts for itself
            bench.add(number, temperature=0.0, max_tokens=16)
        bench.engine.finish()
        found.append([bench.told(number) for number in (1, 3, 5, 9)])
        assert bench.core.stats().accepted_draft_tokens
    assert found[1] == found[0]


def test_the_problem_of_a_rank_that_cannot_load_is_told(folder: Path, opened: ExitStack) -> None:
    config = EngineConfig(model=str(folder / "base"), tensor_parallel=2, devices=("cpu", "cuda:99"))
    leader = Leader(config, folder / "base", UNREPORTED)
    opened.callback(leader.close)
    with pytest.raises(ValueError, match="rank 1: device 'cuda:99' asked for"):
        leader.join(torch.device("cpu"))


def test_a_rank_tells_of_every_tensor_that_it_reads(benches: dict[int, Bench]) -> None:
    leader = benches[2].core.leader
    assert leader is not None
    assert leader._notes.add(READ, 0) > LAYERS * len(MODULES)


class OneWait:
    """A `LoadReport` that kills a process at the first wait that is told, and bears no other."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.what = ""

    def __call__(self, bytes_loaded: int, bytes_total: int) -> None:
        raise AssertionError("nothing is read here")

    def waits(self, what: str) -> None:
        assert not self.what
        assert self.pid is not None
        self.what = what
        os.kill(self.pid, signal.SIGKILL)


def test_that_ranks_are_waited_for_is_told(folder: Path, opened: ExitStack) -> None:
    config, report = EngineConfig(model=str(folder / "base"), tensor_parallel=2, device="cpu"), OneWait()
    leader = Leader(config, folder / "base", report)
    opened.callback(leader.close)
    (report.pid,) = leader.pids
    os.kill(report.pid, signal.SIGSTOP)
    with pytest.raises(RanksLostError, match="has ended with status -9"):
        leader.join(torch.device("cpu"))
    assert report.what == "the processes of its other ranks"


def test_steps_that_start_before_the_last_tokens_are_read_tell_them_to_the_other_rank(
    folder: Path, opened: ExitStack
) -> None:
    found = []
    for world in (1, 2):
        bench = Bench(folder, world, run_ahead=True)
        opened.callback(bench.core.close)
        found.append(bench.ask(6))
    assert found[1] == found[0]


def test_an_engine_whose_rank_was_killed_says_so_at_once(folder: Path, opened: ExitStack) -> None:
    bench = Bench(folder, 2)
    opened.callback(bench.core.close)
    bench.core.add(AddRequest(1, [1, 2, 3], SamplingParams(seed=0, max_tokens=50), bench.adapters[1]))
    bench.engine.step()
    assert bench.core.leader is not None
    (process,) = bench.core.leader.pids
    os.kill(process, signal.SIGKILL)
    with suppress(ChildProcessError):  # where the leader has noticed already
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    with pytest.raises(RanksLostError, match="rank 1"):
        bench.core.beat()
    with pytest.raises(RanksLostError):
        bench.engine.finish()
