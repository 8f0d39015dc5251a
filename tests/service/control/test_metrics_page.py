"""The Prometheus page, as it is scraped."""

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from copy import deepcopy
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex import InvalidArgument, NotFound
from loraplex.v1.adapters_pb2 import Adapter
from loraplex_engine.link.messages import RankStats
from loraplex_service.picker.page import NAMES, PATH
from loraplex_service.telemetry.metrics import RequestMetrics
from loraplex_service.telemetry.series import MAX_SERIES
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

DOCUMENTED = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


class Page:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        families = list(text_string_to_metric_families(text))
        self.names = {family.name for family in families}
        self._samples = [sample for family in families for sample in family.samples]

    def values(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        return [(sample.labels, sample.value) for sample in self._samples if sample.name == name]

    def value(self, name: str, **labels: str) -> float:
        [value] = [value for found, value in self.values(name) if labels.items() <= found.items()]
        return value


def get_page(control: ControlPlane, query: str = "") -> bytes:
    with urllib.request.urlopen(f"http://{control.addresses.metrics}/metrics{query}", timeout=MOST_SECONDS) as response:
        return bytes(response.read())


async def scrape(control: ControlPlane) -> Page:
    return Page((await asyncio.to_thread(get_page, control)).decode())


@pytest.fixture
async def control(byte_tokenizer_directory: Path, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(byte_tokenizer_directory, tmp_path, metrics_listen="127.0.0.1:0") as control:
        yield control


async def test_the_page_has_every_documented_name_and_no_other(control: ControlPlane) -> None:
    documented = set(re.findall(r"`((?:loraplex_|vllm:)\w+)`", DOCUMENTED.read_text()))
    assert (await scrape(control)).names == {name.removesuffix("_total") for name in documented}


async def test_a_generation_counts_for_its_tenant_model_and_adapter(control: ControlPlane) -> None:
    write_adapter(control.roots / "pirate")
    source = str(control.roots / "pirate")
    await control.admin.create_adapter("pirate", base_model="tiny", source=source, tenant="default")
    await control.client.generate("pirate", "abc", max_tokens=5)
    page = await scrape(control)
    user = {"tenant": "default", "model": "tiny", "adapter": "tenants/default/adapters/pirate"}
    assert page.value("loraplex_requests_total", **user, status="OK") == 1
    assert page.value("loraplex_prompt_tokens_total", **user) == 3
    assert page.value("loraplex_completion_tokens_total", **user) == 5
    assert page.value("loraplex_adapter_resident", adapter=user["adapter"]) == 1
    assert page.value("loraplex_adapter_loads_total", model="tiny") == 1
    assert page.value("loraplex_adapter_load_seconds_total", model="tiny") > 0


async def create(control: ControlPlane, adapter_id: str, seed: int = 0) -> Adapter:
    source = str(write_adapter(control.roots / f"{adapter_id}-{seed}", seed=seed))
    return await control.admin.create_adapter(adapter_id, base_model="tiny", source=source, wait=MOST_SECONDS)


async def test_a_weighted_sum_counts_for_each_of_its_adapters_and_once_for_its_tenant(control: ControlPlane) -> None:
    adapters = [await create(control, "pirate", 0), await create(control, "poet", 1)]
    await control.client.generate("pirate*0.7 + poet*0.3", "abc", max_tokens=5)
    page = await scrape(control)
    for adapter in adapters:
        assert page.value("loraplex_requests_total", adapter=adapter.name, status="OK") == 1
        assert page.value("loraplex_completion_tokens_total", adapter=adapter.name) == 5
    assert page.value("loraplex_tenant_requests_total", tenant="default", model="tiny", status="OK") == 1
    assert page.value("loraplex_tenant_completion_tokens_total", tenant="default", model="tiny") == 5


async def test_a_weighted_sum_that_runs_shows_at_each_of_its_adapters(control: ControlPlane) -> None:
    adapters = [await create(control, "pirate", 0), await create(control, "poet", 1)]
    async with control.client.stream_generate("pirate*0.7 + poet*0.3", "abc", max_tokens=1_000_000) as stream:
        await anext(stream)
        page = await scrape(control)
    for adapter in adapters:
        assert page.value("loraplex_adapter_requests", model="tiny", adapter=adapter.name) == 1
    [(info, _)] = page.values("vllm:lora_requests_info")
    assert info["running_lora_adapters"] == "pirate,poet"  # as in `model`: what a router compares it with
    assert info["waiting_lora_adapters"] == ""


async def test_sequences_that_were_let_in_are_in_flight(control: ControlPlane) -> None:
    async with control.client.stream_generate("tiny", "abc", max_tokens=1_000_000, n=2) as stream:
        await anext(stream)
        assert (await scrape(control)).value("loraplex_in_flight_sequences", model="tiny") == 2


async def test_an_adapter_in_memory_shows_by_the_name_that_requests_have_for_it(control: ControlPlane) -> None:
    await create(control, "pirate")
    await control.client.generate("pirate", "abc", max_tokens=2)
    page = await scrape(control)
    [(loaded, value)] = page.values("vllm:lora_adapter_loaded")
    assert (loaded["adapter_name"], loaded["tenant"], loaded["model_name"]) == ("pirate", "shared", "tiny")
    assert (loaded["level"], loaded["pinned"], loaded["rank"]) == ("gpu", "false", "4")
    assert value == 1
    assert page.value("vllm:num_gpu_loaded_lora_adapters", model_name="tiny") == 1


async def test_the_slots_for_adapters_show_before_any_adapter_is_there(control: ControlPlane) -> None:
    page = await scrape(control)
    assert page.values("vllm:lora_adapter_loaded") == []
    assert page.value("vllm:num_gpu_loaded_lora_adapters", model_name="tiny") == 0
    assert page.value("vllm:max_gpu_lora_adapters", model_name="tiny") > 0


async def test_loads_are_counted_by_their_seconds(control: ControlPlane) -> None:
    await create(control, "pirate")
    page = await scrape(control)
    name = "vllm:lora_adapter_load_seconds"
    assert page.value(f"{name}_count", model_name="tiny", transition="load") == 1
    assert page.value(f"{name}_sum", model_name="tiny") == page.value("loraplex_adapter_load_seconds_total") > 0


async def test_a_part_of_the_page_is_had_by_name(control: ControlPlane) -> None:
    query = "?name[]=loraplex_draining&name[]=vllm:prompt_tokens_total"
    page = Page((await asyncio.to_thread(get_page, control, query)).decode())
    assert page.names == {"loraplex_draining", "vllm:prompt_tokens"}


async def test_what_routers_read_is_had_by_name(control: ControlPlane) -> None:
    query = f"?{PATH.partition('?')[2]}"
    page = Page((await asyncio.to_thread(get_page, control, query)).decode())
    assert page.names == set(NAMES)


async def test_the_series_of_an_adapter_end_with_its_last_version(control: ControlPlane) -> None:
    pirate, poet = await create(control, "pirate", 0), await create(control, "poet", 1)
    await create(control, "pirate", 2)
    for model in ("pirate", "poet"):
        await control.client.generate(model, "abc", max_tokens=5)
    await control.admin.delete_adapter(pirate.version, wait=MOST_SECONDS)
    assert (await scrape(control)).value("loraplex_completion_tokens_total", adapter=pirate.name) == 5
    await control.admin.delete_adapter("pirate", wait=MOST_SECONDS)
    page = await scrape(control)
    assert pirate.name not in page.text
    assert page.value("loraplex_requests_total", adapter=poet.name, status="OK") == 1
    assert page.value("loraplex_completion_tokens_total", adapter=poet.name) == 5
    assert page.value("loraplex_tenant_completion_tokens_total", tenant="default", model="tiny") == 10
    [tenant] = (await anext(control.admin.watch_load())).tenants
    assert (tenant.requests_total, tenant.completion_tokens_total) == (2, 10)


async def test_requests_without_finite_logits_are_counted_by_model(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = control.core()
    stats = core.stats
    monkeypatch.setattr(core, "stats", lambda: msgspec.structs.replace(stats(), num_not_finite=3))
    await control.client.generate("tiny", "abc", max_tokens=5)
    assert (await scrape(control)).value("loraplex_not_finite_requests_total", model="tiny") == 3


async def test_each_rank_of_a_model_shows_what_it_exchanges_and_holds(
    control: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = control.core()
    stats, ranks = core.stats, [RankStats(4, 1, 2, 640, 0.5, 7000), RankStats(4, 1, 2, 640, 0.25, 6000)]
    monkeypatch.setattr(core, "stats", lambda: msgspec.structs.replace(stats(), ranks=ranks))
    await control.client.generate("tiny", "abc", max_tokens=5)
    page = await scrape(control)
    names = ("sums_total", "gatherings_total", "passes_total", "exchanged_bytes_total", "exchange_seconds_total")
    found = [page.value(f"loraplex_rank_{name}", model="tiny", rank="1") for name in (*names, "resident_memory_bytes")]
    assert found == [4, 1, 2, 640, 0.25, 6000]
    assert page.value("loraplex_rank_exchange_seconds_total", model="tiny", rank="0") == 0.5


async def test_forms_are_counted_by_what_became_of_them(control: ControlPlane) -> None:
    for pattern in ("[abc]+", "[abc]+", "[0-9]+"):
        await control.client.generate("tiny", "abc", max_tokens=3, regex=pattern)
    with pytest.raises(InvalidArgument):
        await control.client.generate("tiny", "abc", regex="(a")
    page = await scrape(control)
    counts = [page.value("loraplex_form_checks_total", outcome=outcome) for outcome in ("read", "kept", "refused")]
    assert counts == [3, 1, 1]


async def test_a_page_of_thousands_of_adapters_hardly_holds_the_event_loop(control: ControlPlane) -> None:
    counters = control.app.telemetry.metrics.adapters
    for number in range(MAX_SERIES):
        labels = ("default", "tiny", f"tenants/default/adapters/number-{number}")
        counters.requests.add((*labels, "OK"))
        for counter in (counters.prompt_tokens, counters.cached_prompt_tokens, counters.completion_tokens):
            counter.add(labels)
    before = time.thread_time()  # of this thread, the loop's: what other threads do does not count
    page = await asyncio.to_thread(get_page, control)
    assert time.thread_time() - before < 0.05
    assert page.count(b"\nloraplex_completion_tokens_total{") == MAX_SERIES


def test_what_is_counted_later_is_not_in_a_snapshot() -> None:
    metrics = RequestMetrics()
    metrics.finished.add(("tiny", "stop"))
    metrics.queue.observe(("tiny",), 1.0)
    snapshot = deepcopy(metrics)
    metrics.finished.add(("tiny", "stop"))
    metrics.queue.observe(("tiny",), 2.0)
    assert snapshot.finished.values["tiny", "stop"] == 1
    assert snapshot.queue.values["tiny",].total == sum(snapshot.queue.values["tiny",].counts) == 1


async def test_the_times_of_a_generation_are_under_both_names(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=5)
    page = await scrape(control)
    for name, alias in (
        ("loraplex_request_duration_seconds", "vllm:e2e_request_latency_seconds"),
        ("loraplex_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
        ("loraplex_time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"),
        ("loraplex_queue_seconds", "vllm:request_queue_time_seconds"),
    ):
        assert page.value(f"{name}_count", model="tiny") == 1
        assert page.value(f"{alias}_count", model_name="tiny") == 1
        assert page.value(f"{name}_sum", model="tiny") == page.value(f"{alias}_sum", model_name="tiny") > 0
    assert page.value("vllm:request_success_total", model_name="tiny", finished_reason="max_tokens") == 1


async def test_each_gap_between_the_tokens_of_an_output_counts(control: ControlPlane) -> None:
    await control.client.generate("tiny", "abc", max_tokens=5, n=2)
    page = await scrape(control)
    for name, label in (
        ("loraplex_inter_token_latency_seconds", "model"),
        ("vllm:inter_token_latency_seconds", "model_name"),
    ):
        assert page.value(f"{name}_count", **{label: "tiny"}) == 2 * (5 - 1)
        assert page.value(f"{name}_sum", **{label: "tiny"}) > 0


async def test_gaps_count_while_the_generation_runs(control: ControlPlane) -> None:
    async with control.client.stream_generate("tiny", "abc", max_tokens=1_000_000) as stream:
        for _ in range(4):  # that it has started, and three pieces
            await anext(stream)
        page = await scrape(control)
    assert page.value("loraplex_inter_token_latency_seconds_count", model="tiny") >= 2
    assert page.values("loraplex_requests_total") == []


async def test_a_refused_call_counts_with_its_status(control: ControlPlane) -> None:
    with pytest.raises(NotFound):
        await control.client.generate("nobody", "abc", max_tokens=5)
    page = await scrape(control)
    method = "loraplex.v1.InferenceService/Generate"
    assert page.value("loraplex_rpc_duration_seconds_count", method=method, status="NOT_FOUND") == 1
    assert page.values("loraplex_requests_total") == []


async def test_a_model_that_is_not_loaded_is_down(control: ControlPlane) -> None:
    page = await scrape(control)
    assert page.value("loraplex_model_up", model="tiny") == 1
    assert page.value("loraplex_model_up", model="other") == 0


async def test_prompts_and_outputs_are_not_on_the_page(control: ControlPlane) -> None:
    await control.client.generate("tiny", "secret", max_tokens=6)
    assert "secret" not in (await scrape(control)).text
