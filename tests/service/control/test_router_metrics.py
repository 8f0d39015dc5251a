"""The families that routers read, of engines made by hand."""

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.messages import AdapterFacts, AdapterStatus
from loraplex_service.control.metrics_snapshot import EngineSnapshot, ModelSnapshot
from loraplex_service.control.router_metrics import router_families
from loraplex_service.telemetry.series import MAX_SERIES

FACTS = AdapterFacts(rank=16, size_bytes=1, target_modules=[], warnings=[])


def status(name: str, tier: Residency, digest: str = "0", pinned: bool = False) -> AdapterStatus:
    return AdapterStatus(AdapterKey(name, digest * 64), 1, tier, pinned, FACTS)


def loaded(*statuses: AdapterStatus) -> list[dict[str, str]]:
    engine = EngineSnapshot(None, {each.key: each for each in statuses}, {}, {})
    model = ModelSnapshot("tiny", True, None, 8, (), engine)
    families = {family.name: family for family in router_families([model])}
    return [sample.labels for sample in families["vllm:lora_adapter_loaded"].samples]


def test_an_adapter_on_disk_alone_is_not_loaded() -> None:
    assert loaded(status("shared/a", Residency.DISK)) == []


def test_levels_pins_and_ranks_have_the_words_of_vllm() -> None:
    rows = loaded(status("shared/a", Residency.DEVICE, pinned=True), status("shared/b", Residency.HOST))
    base = {"model_name": "tiny", "tenant": "shared", "rank": "16"}
    assert rows == [
        base | {"adapter_name": "a", "level": "gpu", "pinned": "true"},
        base | {"adapter_name": "b", "level": "cpu", "pinned": "false"},
    ]


def test_of_versions_of_one_adapter_the_nearest_to_the_device_shows() -> None:
    rows = loaded(status("shared/a", Residency.HOST), status("shared/a", Residency.DEVICE, "1"))
    assert [(row["adapter_name"], row["level"]) for row in rows] == [("a", "gpu")]


def test_adapters_of_several_tenants_with_one_id_show_each() -> None:
    rows = loaded(status("shared/a", Residency.HOST), status("acme/a", Residency.DEVICE, "1"))
    assert [(row["tenant"], row["level"]) for row in rows] == [("acme", "gpu"), ("shared", "cpu")]


def test_more_adapters_than_the_page_shows_leave_out_those_that_are_farthest() -> None:
    many = [status(f"shared/h{number}", Residency.HOST) for number in range(MAX_SERIES)]
    rows = loaded(*many, status("shared/z", Residency.DEVICE))
    assert len(rows) == MAX_SERIES
    assert rows[0]["adapter_name"] == "z"
