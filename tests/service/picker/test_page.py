"""What a replica's metrics page says, and what it cannot do."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_service.picker.asked import Wanted
from loraplex_service.picker.page import MAX_BYTES, MAX_REQUESTS, MAX_SAMPLES, fetch_page, read_page
from loraplex_service.picker.policy import Place

PAGE = """# TYPE vllm:lora_adapter_loaded gauge
vllm:lora_adapter_loaded{adapter_name="busy",level="gpu",model_name="m",pinned="false",rank="8",tenant="shared"} 1.0
vllm:lora_adapter_loaded{adapter_name="idle",level="gpu",model_name="m",pinned="true",rank="8",tenant="acme"} 1.0
vllm:lora_adapter_loaded{adapter_name="near",level="cpu",model_name="m",pinned="false",rank="8",tenant="shared"} 1.0
vllm:lora_adapter_loaded{adapter_name="gone",level="gpu",model_name="m",pinned="false",rank="8",tenant="shared"} 0.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="busy",waiting_lora_adapters="coming"} 2.0
vllm:max_gpu_lora_adapters{model_name="m"} 4.0
loraplex_in_flight_sequences{model="m"} 3.0
loraplex_in_flight_sequences{model="n"} 2.0
loraplex_draining 0.0
something_else{a="b"} 1.0
"""


@pytest.mark.parametrize(
    ("adapter", "place"),
    [
        (Wanted(None, "busy"), Place.ACTIVE),
        (Wanted("acme", "busy"), Place.ACTIVE),  # a shared one is everybody's
        (Wanted(None, "idle"), Place.DEVICE),
        (Wanted("acme", "idle"), Place.DEVICE),
        (Wanted("other", "idle"), Place.ROOM),  # another tenant's is not meant
        (Wanted(None, "near"), Place.HOST),
        (Wanted(None, "coming"), Place.DEVICE),
        (Wanted(None, "gone"), Place.ROOM),
        (Wanted(None, "unheard-of"), Place.ROOM),
        (Wanted(None, "m"), Place.ACTIVE),
    ],
)
def test_a_page_says_where_an_adapter_is(adapter: Wanted, place: Place) -> None:
    assert read_page(PAGE).place(adapter) is place


def test_without_a_slot_that_is_free_an_adapter_has_no_room() -> None:
    page = read_page(
        PAGE.replace('max_gpu_lora_adapters{model_name="m"} 4.0', 'max_gpu_lora_adapters{model_name="m"} 2')
    )
    assert page.place(Wanted(None, "unheard-of")) is Place.FULL
    assert page.place(Wanted(None, "near")) is Place.FULL
    assert page.place(Wanted(None, "busy")) is Place.ACTIVE


def test_a_page_says_how_much_there_is_to_do() -> None:
    page = read_page(PAGE)
    assert (page.num_requests, page.is_draining) == (5, False)
    assert read_page("loraplex_draining 1.0").is_draining


@given(st.text(max_size=300))
def test_no_page_is_too_strange(text: str) -> None:
    read_page(text)
    read_page(PAGE + text)


@pytest.mark.parametrize("value", ["1e300", "inf", "nan", "-5", "0x10", "1_0"])
def test_counts_stay_within_reason(value: str) -> None:
    assert 0 <= read_page(f"loraplex_in_flight_sequences {value}").num_requests <= MAX_REQUESTS


def test_a_replica_with_adapters_without_end_takes_no_more_than_its_share() -> None:
    line = 'vllm:lora_adapter_loaded{{level="gpu",adapter_name="{}"}} 1'
    page = read_page("\n".join(line.format(number) for number in range(2 * MAX_SAMPLES)))
    assert len(page.loaded) == MAX_SAMPLES


def test_a_replica_with_names_without_end_in_use_takes_no_more_than_its_share() -> None:
    names = [str(number) for number in range(2 * MAX_SAMPLES)]
    rows = (names[::2], names[1::2])
    page = read_page("\n".join(f'vllm:lora_requests_info{{running_lora_adapters="{",".join(row)}"}} 1' for row in rows))
    assert len(page.in_use) == MAX_SAMPLES


@pytest.mark.parametrize(
    "labels",
    ["a" * MAX_BYTES, 'a="' + "x" * MAX_BYTES, 'a="' + 'b=\\"' * (MAX_BYTES // 4)],
    ids=["name", "value", "quotes"],
)
def test_a_page_of_one_long_line_is_read_in_the_time_and_memory_of_any(labels: str) -> None:
    began = time.process_time()
    tracemalloc.start()
    try:
        read_page(f"vllm:lora_adapter_loaded{{{labels}}} 1\n")
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_BYTES
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5  # backtracking takes half a minute


@asynccontextmanager
async def answering(answer: bytes, times: int = 1) -> AsyncIterator[int]:
    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(times):
                writer.write(answer)
                await writer.drain()
        except OSError:
            pass  # the picker has had enough
        finally:
            writer.close()

    server = await asyncio.start_server(answer_all, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_page_is_what_comes_behind_the_head() -> None:
    async with answering(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nloraplex_draining 1.0\n") as port:
        assert await fetch_page("127.0.0.1", port) == "loraplex_draining 1.0\n"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 Not Found\r\n\r\n", b"SSH-2.0\r\n\r\n", b""])
async def test_what_is_no_page_is_refused(answer: bytes) -> None:
    async with answering(answer) as port:
        with pytest.raises(ValueError, match="metrics page is"):
            await fetch_page("127.0.0.1", port)


async def test_a_page_without_end_is_cut() -> None:
    async with answering(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (1 << 20), times=MAX_BYTES >> 18) as port:
        with pytest.raises(ValueError, match="larger than"):
            await fetch_page("127.0.0.1", port)
