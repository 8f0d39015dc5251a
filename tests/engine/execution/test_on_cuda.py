"""An engine on a GPU that is not there: it loads, sizes its cache, captures its graphs and generates with them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.execution.device import described, loading_turn, select_device
from loraplex_engine.execution.loading import load_runner
from loraplex_engine.execution.memory_profile import cache_budget, largest_step
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind
from loraplex_engine.link.load_report import UNREPORTED
from loraplex_engine.link.messages import AddRequest, Device, StepOutput, WantAdapter
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.link.watermark import Watermark
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import PendingResult, ScheduledRequest, StepPlan
from loraplex_kernels.ops import LoraSlice, LoraWeights
from loraplex_kernels.selection import select_ops
from tests.engine.execution.cuda_stand_in import TOTAL_BYTES, StandIn, Waits, one_cuda_device
from tests.reference.stepping import step

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")

MIB = 1 << 20
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with one_cuda_device(monkeypatch) as device:
        yield device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(**SHAPE, vocab_size=40, num_hidden_layers=1, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # the initial weights are so small that every next token is nearly a tie
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(1)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = torch.randn(3, 32, generator=generator), torch.randn(48, 3, generator=generator)
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": "base"}))
    return folder


def configure(checkpoint: Path, **fields: Any) -> EngineConfig:
    settings: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 16}
    config = EngineConfig(model=str(checkpoint), **(settings | fields))
    config.check()
    return config


def load(config: EngineConfig) -> ModelRunner:
    return load_runner(config, Path(config.model), UNREPORTED)


# ---- the device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_model_loads_onto_the_device_by_its_index(cuda: StandIn, checkpoint: Path, device: str) -> None:
    runner = load(configure(checkpoint, device=device, kv_cache_bytes=MIB, cuda_graphs=False))
    assert runner.ops.name == "triton"
    assert runner.ops.device == torch.device("cuda", 0)
    assert cuda.selected == [0]


def test_callers_are_told_which_device_it_is(cuda: StandIn) -> None:
    assert described(select_device("cuda")) == Device("cuda:0", "stand-in", TOTAL_BYTES)


def test_a_second_device_is_selected_by_its_own_index(cuda: StandIn) -> None:
    cuda.num_devices = 2
    assert select_device("cuda:1") == torch.device("cuda", 1)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(cuda: StandIn) -> None:
    cuda.num_devices = 2
    with pytest.raises(ValueError, match=r"'cuda:2' asked for, but torch sees 2: cuda:0 to cuda:1"):
        select_device("cuda:2")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:01", "cpu:0", "mps", ""])
def test_a_name_that_is_no_device_is_refused_with_the_configuration(device: str) -> None:
    with pytest.raises(ValueError, match=r"device .* is not auto, cpu, cuda or cuda:N"):
        EngineConfig(model="any", device=device).check()


# ---- captured graphs -------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(cuda: StandIn, checkpoint: Path) -> ModelRunner:
    return load(configure(checkpoint, kv_cache_bytes=MIB, cuda_graphs=False, max_num_seqs=16))


def generate(config: EngineConfig, adapter: Path) -> list[list[int]]:
    """Greedy tokens of three requests that run together, the last two with an adapter."""
    core, narrow = EngineCore.load(config), AdapterKey("shared/narrow", digest(adapter))
    try:
        core.want_adapter(WantAdapter(narrow, 1, str(adapter)))
        while core.has_work():
            step(core)
        tokens: list[list[int]] = [[], [], []]
        for index, prompt in enumerate(([1, 2, 3], [4], [5, 6, 7, 8, 9])):
            sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=3 + index)
            core.add(AddRequest(index, prompt, sampling, narrow if index else None))
        while core.has_work():
            for message in step(core):
                for output in message.outputs if isinstance(message, StepOutput) else ():
                    assert not output.error
                    tokens[output.request_id] += output.token_ids
        return tokens
    finally:
        core.close()


def test_replayed_graphs_give_the_tokens_of_the_reference(cuda: StandIn, checkpoint: Path, adapter: Path) -> None:
    """Of batches of three, two and one, each padded to a captured size or not."""
    common = {"kv_cache_bytes": MIB, "block_size": 4, "max_num_seqs": 4, "max_adapter_rank": 4}
    expected = generate(configure(checkpoint, device="cpu", kernels="reference", **common), adapter)
    assert generate(configure(checkpoint, device="cuda", **common), adapter) == expected
    assert cuda.num_replays >= 4


# ---- waits -----------------------------------------------------------------------------------------------------------

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "num_logprobs": 2},
    {"top_k": 5, "top_p": 0.9, "logit_bias": {3: 1.0}, "num_token_ids": 39, "num_logprobs": 0},
    {"min_p": 0.1, "allowed_token_ids": (1, 2, 3), "num_prompt_logprobs": 1, "logprob_token_ids": (4,)},
    {"typical_p": 0.5, "min_tokens": 2, "eos_token_ids": (0,), "num_logprobs": 3, "processed_logprobs": True},
    {"watermark": Watermark(key=bytes(16), gamma=0.5, delta=1.0, context_tokens=1)},
    {"num_candidates": 4, "num_logprobs": 1},
]


def plan_of(samplings: list[dict[str, Any]], pooling: PoolingParams | None = None) -> StepPlan:
    """One step that computes a prompt for each of these."""
    requests = []
    for number, fields in enumerate(samplings):
        sampling = SamplingParams(**({"seed": number, "max_tokens": 5} | fields))
        requests.append(Request(AddRequest(number, [1, 2 + number], sampling, pooling=pooling), number, now=0.0))
        requests[-1].block_ids = [number]
    return StepPlan(tuple(ScheduledRequest(request, 0, 2) for request in requests))


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_a_step_waits_once_whatever_its_parameters(cuda: StandIn, runner: ModelRunner, number: int) -> None:
    with Waits(cuda):
        pending = runner.execute(plan_of([SAMPLINGS[number]]))
        assert cuda.num_waits == 0
        result = pending.result()
    assert cuda.num_waits == 1
    assert not result.not_finite


def test_a_step_with_all_parameters_draws_what_the_reference_draws(
    cuda: StandIn, runner: ModelRunner, checkpoint: Path
) -> None:
    reference = load(configure(checkpoint, device="cpu", kernels="reference", kv_cache_bytes=MIB, max_num_seqs=16))
    expected, found = (each.execute(plan_of(SAMPLINGS)).result() for each in (reference, runner))
    tokens = [[[token.token_id for token in row] for row in result.sampled] for result in (found, expected)]
    assert tokens[0] == tokens[1]


def test_a_step_that_pools_waits_once(cuda: StandIn, runner: ModelRunner) -> None:
    pooled = plan_of([{"max_tokens": 0}, {"max_tokens": 0}], PoolingParams(method=PoolingMethod.MEAN))
    with Waits(cuda):
        result = runner.execute(pooled).result()
    assert cuda.num_waits == 1
    assert len(result.pooled) == 2


def test_an_adapter_comes_to_each_linear_in_two_copies_that_nobody_waits_for(cuda: StandIn) -> None:
    ops = select_ops(torch.device("cuda", 0), "triton")
    slices = [LoraSlice(start, 8 * start, torch.ones(8, 2)) for start in (0, 2, 4)]
    packed = ops.pack_lora(LoraWeights(torch.ones(6, 32), tuple(slices), torch.ones(2, 48)))
    with Waits(cuda):
        table = ops.lora_table(32, 48, 2)
        table.put(1, packed)
        table.remove(0)
        table.remove(1)
    assert (cuda.num_copies, cuda.num_waits) == (2, 0)  # of the weights, and of where they lie


def test_what_waits_is_counted(cuda: StandIn) -> None:
    with Waits(cuda):
        there = torch.zeros(4, device=torch.device("cuda"))
        for wait in (there.tolist, there.cpu, lambda: there[[0, 1]], lambda: there[there > 0], lambda: bool(there[0])):
            before = cuda.num_waits
            wait()
            assert cuda.num_waits == before + 1


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_cache_gets_what_is_left_of_the_share_beside_weights_adapters_and_graphs(
    cuda: StandIn, checkpoint: Path
) -> None:
    runner = load(configure(checkpoint, kv_cache_bytes=MIB, cuda_graphs=False))
    cuda.reserved_bytes, cuda.bytes_per_graph = 1000 * MIB, 10 * MIB
    budget = cache_budget(
        runner, configure(checkpoint, device_memory_fraction=0.5, adapter_device_bytes=500 * MIB, max_num_seqs=2)
    )
    graphs = 2 * 2 * 10 * MIB  # batches of one and two, each with adapters and without
    assert budget == TOTAL_BYTES // 2 - 1000 * MIB - 500 * MIB - graphs


def test_what_the_largest_step_takes_is_not_the_caches(
    cuda: StandIn, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(checkpoint, cuda_graphs=False)
    runner = load(configure(checkpoint, kv_cache_bytes=MIB, cuda_graphs=False))
    before = cache_budget(runner, config)
    execute = ModelRunner.execute

    def greedy(self: ModelRunner, plan: StepPlan) -> PendingResult:
        cuda.reserved_bytes += 300 * MIB
        return execute(self, plan)

    monkeypatch.setattr(ModelRunner, "execute", greedy)
    assert cache_budget(runner, config) == before - 300 * MIB


def test_a_gpu_that_others_have_filled_is_refused_with_what_can_be_done(cuda: StandIn, checkpoint: Path) -> None:
    cuda.others_bytes = TOTAL_BYTES - cuda.reserved_bytes - 10 * MIB
    with pytest.raises(ValueError, match=r"holds 0 tokens.*raise device_memory_fraction, or lower max_model_len"):
        load(configure(checkpoint, cuda_graphs=False))


def test_a_step_that_does_not_fit_beside_the_weights_is_refused_with_what_can_be_done(
    cuda: StandIn, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(self: ModelRunner, plan: StepPlan) -> PendingResult:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ModelRunner, "execute", execute)
    with pytest.raises(ValueError, match=r"no room for a step of 16 tokens.*lower max_num_batched_tokens"):
        load(configure(checkpoint, cuda_graphs=False))


@pytest.mark.parametrize(("tokens", "sequences", "lengths"), [(16, 3, [6, 5, 5]), (2, 5, [1, 1]), (500, 2, [63, 63])])
def test_the_largest_step_has_all_tokens_sequences_and_samples_that_a_step_may_have(
    tokens: int, sequences: int, lengths: list[int]
) -> None:
    config = EngineConfig(model="any", max_num_batched_tokens=tokens, max_num_seqs=sequences)
    plan = largest_step(config, max_model_len=64, block_size=4)
    assert [item.num_new_tokens for item in plan.scheduled] == lengths
    assert all(item.samples and item.request.adapter_slot == 0 for item in plan.scheduled)


def test_the_largest_step_draws_after_drafts_too() -> None:
    config = EngineConfig(
        model="any", max_num_batched_tokens=16, max_num_seqs=2, drafts=DraftConfig(kind=DraftKind.NGRAM)
    )
    plan = largest_step(config, max_model_len=64, block_size=4)
    assert plan.num_tokens == 16
    assert sum(1 + len(item.draft_token_ids) for item in plan.scheduled) == config.most_drawn == 9


def test_engines_load_onto_a_gpu_one_after_another(cuda: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    device, events, waits = torch.device("cuda", 0), [], threading.Event()

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waits.set()

    def second() -> None:
        with loading_turn(device, UNREPORTED):
            events.append("second loads")

    logger, handler = logging.getLogger("loraplex_engine.execution.device"), Waiting(logging.INFO)
    caplog.set_level(logging.INFO, "loraplex_engine.execution.device")
    logger.addHandler(handler)
    thread = threading.Thread(target=second)
    try:
        with loading_turn(device, UNREPORTED):
            thread.start()
            assert waits.wait(60)
            events.append("first has loaded")
        thread.join(60)
    finally:
        logger.removeHandler(handler)
    assert events == ["first has loaded", "second loads"]
