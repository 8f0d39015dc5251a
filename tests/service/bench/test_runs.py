"""A run of requests against doors whose answers are made up."""

import asyncio
from collections.abc import Callable

import pytest

from loraplex_service.bench.loops import RequestError, closed_loop, open_loop
from loraplex_service.bench.plans import Request
from loraplex_service.bench.records import Record
from loraplex_service.bench.report import as_text
from loraplex_service.bench.runs import is_the_limit, run, summarise_all


def requests(count: int, output: int = 3) -> list[Request]:
    return [Request("m", [1, 2], output, number) for number in range(count)]


async def answers(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
    for _ in range(request.output):
        await asyncio.sleep(0)
        on_tokens(1)
    return [7] * request.output


async def fails_every_other(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
    if request.seed % 2:
        raise RequestError("OVERLOADED: the queue is full")
    return await answers(request, on_tokens)


async def test_a_request_that_fails_is_counted_and_others_go_on() -> None:
    figures = await run(fails_every_other, requests(6), 2, 1.0, 0.1)
    assert (figures["requests"], figures["failed"]) == (6, 3)
    assert figures["errors"] == {"OVERLOADED: the queue is full": 3}
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (6, 9)


async def test_a_request_that_fails_is_not_in_time() -> None:
    figures = await run(fails_every_other, requests(6), 2, 60.0, 60.0)
    assert figures["share_in_time"] == 0.5


async def test_the_report_says_how_long_prompts_and_outputs_were() -> None:
    text = as_text({"load": "2 streams"} | await run(fails_every_other, requests(6), 2, 1.0, 0.1))
    assert "2 prompt and 3 output tokens each, on average" in text


async def test_where_all_fail_there_are_no_figures() -> None:
    async def fails(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        raise RequestError("no")

    figures = await run(fails, requests(2), None, 1.0, 0.1)
    assert figures["failed"] == 2
    assert "wall_seconds" not in figures


async def test_a_closed_loop_has_so_many_requests_at_once() -> None:
    now, most = 0, 0

    async def watched(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        tokens = await answers(request, on_tokens)
        now -= 1
        return tokens

    await closed_loop(watched, requests(20), 4)
    assert most == 4


async def test_an_open_loop_waits_for_nobody() -> None:
    started = []
    everybody = asyncio.Event()

    async def waits(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        started.append(request.seed)
        if len(started) == 5:
            everybody.set()
        await everybody.wait()
        return await answers(request, on_tokens)

    records, _ = await open_loop(waits, requests(5))
    assert len(records) == 5


async def test_an_answer_of_another_length_is_an_error_of_the_run() -> None:
    async def short(request: Request, on_tokens: Callable[[int], None]) -> list[int]:
        on_tokens(1)
        return [7]

    with pytest.raises(RuntimeError, match="asked for 3 tokens, got 1"):
        await closed_loop(short, requests(1), 1)


def test_figures_are_of_what_the_sender_saw() -> None:
    records = [Record(10.0, 5, 4, [(10.5, 1), (10.6, 1), (10.7, 1), (10.8, 1)]), Record(10.0, 5, 1, [(12.0, 1)])]
    figures = summarise_all(records, ttft_limit=1.0, tpot_limit=0.2)
    assert figures["wall_seconds"] == 2.0
    assert figures["output_tokens_per_second"] == 2.5
    assert figures["requests_per_second"] == 1.0
    assert (figures["share_in_time"], figures["requests_in_time_per_second"]) == (0.5, 0.5)
    assert figures["ttft_p50_seconds"] == pytest.approx(1.25)
    assert figures["tpot_p50_seconds"] == pytest.approx(0.1)
    assert figures["gap_p99_seconds"] == pytest.approx(0.1)
    assert figures["e2e_p50_seconds"] == pytest.approx(1.4)


@pytest.mark.parametrize(("cpu_share", "late", "limit"), [(0.3, 0.001, False), (0.97, 0.001, True), (0.3, 0.2, True)])
def test_a_sender_that_is_busy_or_late_is_the_limit(cpu_share: float, late: float, limit: bool) -> None:
    assert is_the_limit(cpu_share, late) == limit


async def test_a_report_reads_at_80_columns_and_says_that_the_sender_was_the_limit() -> None:
    figures = await run(fails_every_other, requests(6), 2, 1.0, 0.1)
    figures["sender"] = {"cpu_share": 0.97, "late_p99_seconds": 0.03, "is_the_limit": True}
    text = as_text({"load": "2 streams", **figures})
    said = " ".join(text.split())
    assert "The load generator was the limit of this run: it used 97% of a core and was 30 ms late." in said
    assert max(map(len, text.splitlines())) <= 80
    assert "3 x OVERLOADED" in text
    assert "first token" in text
