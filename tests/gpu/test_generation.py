"""The whole engine on a GPU, decoding by captured graphs, against the reference operations on the CPU in float32."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = [None, "narrow", "middle", "wide"]
LENGTHS = [1, 5, 16, 17, 40, 64, 130, 300, 33, 2, 77]
ON_GPU = {"device": "cuda", "kernels": "triton"}
ON_CPU = {"device": "cpu", "kernels": "reference"}


def requests(names):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(3, 1000, (length,), generator=generator).tolist(), names[index % len(names)])
        for index, length in enumerate(LENGTHS)
    ]


def loaded(engine, names=NAMES):
    for name in names:
        if name is not None:
            engine.load(name)
    return engine


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 50}, {"block_size": 4}], ids=str)
def test_mixed_batch_gives_the_tokens_of_the_reference(make_engine, settings):
    work = requests(NAMES)
    expected = loaded(make_engine(**ON_CPU)).generate(work, 24)
    assert loaded(make_engine(**ON_GPU, **settings)).generate(work, 24) == expected


def test_blocks_that_come_back_from_host_memory_give_the_tokens_of_the_reference(make_engine):
    work = requests([None])
    expected = make_engine(**ON_CPU).generate(work, 24)
    room = {"kv_cache_bytes": 40 * 3 * 2 * 16 * 2 * 64 * 4, "host_cache_bytes": 8 << 20}  # 40 blocks, and 170
    engine = make_engine(**ON_GPU, **room)
    assert [engine.generate(work, 24) for _ in range(2)] == [expected] * 2
    assert engine.core.stats().num_restored_blocks > 0


def test_graphs_give_the_tokens_of_plain_launches(make_engine):
    engine, plain = loaded(make_engine(**ON_GPU)), loaded(make_engine(**ON_GPU))
    assert engine.core.runner.decode_graphs is not None
    plain.core.runner.decode_graphs = None
    for names in (NAMES, [None], ["wide"]):
        assert engine.generate(requests(names), 16) == plain.generate(requests(names), 16)


def test_adapter_that_comes_after_the_capture(make_engine):
    """Wider than any before it, and into linears that had no adapter when the graphs were captured."""
    engine, reference = make_engine(**ON_GPU), make_engine(**ON_CPU)
    growth = engine.core.runner.ops.lora_growth
    names: list[str | None] = [None]
    for name in ("narrow", "wide", "middle"):
        names.append(name)
        engine.load(name)
        reference.load(name)
        assert engine.generate(requests(names), 8) == reference.generate(requests(names), 8)
    assert engine.core.runner.ops.lora_growth == growth  # no graph had to be captured again


def test_graphs_can_be_switched_off(make_engine):
    engine, reference = loaded(make_engine(**ON_GPU, cuda_graphs=False)), loaded(make_engine(**ON_CPU))
    assert engine.core.runner.decode_graphs is None
    assert engine.generate(requests(NAMES), 8) == reference.generate(requests(NAMES), 8)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2, "num_logprobs": 2}]
)
def test_a_step_is_started_without_waiting_for_the_device(make_engine, monkeypatch, sampling):
    engine = loaded(make_engine(**ON_GPU))
    runner = engine.core.runner
    execute = runner.execute
    engine.generate(requests(NAMES), 8, **sampling)  # compiles, which may wait

    def watched(plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return execute(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner, "execute", watched)
    runner.decode_graphs = None
    engine.generate(requests(NAMES), 8, **sampling)


def test_tokens_are_those_of_an_engine_that_reads_each_step_before_the_next(make_engine):
    ahead, waiting = loaded(make_engine(**ON_GPU)), loaded(make_engine(**ON_GPU, run_ahead=False))
    assert ahead.generate(requests(NAMES), 8) == waiting.generate(requests(NAMES), 8)


def test_the_cache_gets_what_is_left_beside_the_largest_step_and_the_graphs(make_engine):
    share, (_, total) = 0.1, torch.cuda.mem_get_info()
    engine = loaded(make_engine(**ON_GPU, kv_cache_bytes=None, device_memory_fraction=share))
    assert engine.generate(requests(NAMES), 8) == loaded(make_engine(**ON_CPU)).generate(requests(NAMES), 8)
    assert torch.cuda.memory_reserved() <= share * total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_generates(make_engine, dtype):
    """Roundings differ, so tokens may. By chance alone, one in a thousand would be the same."""
    work = requests(NAMES)
    expected = loaded(make_engine(**ON_CPU)).generate(work, 1)
    actual = loaded(make_engine(**ON_GPU, dtype=dtype)).generate(work, 1)
    same = sum(a == b for a, b in zip(actual, expected, strict=True))
    assert same > len(work) // 2
