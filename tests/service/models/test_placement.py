"""Models on the devices of one machine: by their sizes, and never two over one device's memory."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from loraplex_engine.link.messages import EngineSized, LoadOn
from loraplex_engine.link.sizes import DeviceMemory, Needs
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.devices import Wish, arrange, shared_out
from loraplex_service.models.placement import NoRoomError, Placement

GIB = 1 << 30
HOST = DeviceMemory("cpu", 64 * GIB)


def gpus(*sizes: int) -> list[DeviceMemory]:
    return [DeviceMemory(f"cuda:{index}", size * GIB) for index, size in enumerate(sizes)]


def needs(weights: float) -> Needs:
    """With two GiB beside the weights on a GPU, and one on the host."""
    return Needs(int(weights * GIB), GIB // 2, GIB // 2, GIB)


def models(*fields: dict[str, Any]) -> list[HostedModelConfig]:
    return [HostedModelConfig(name=f"m{index}", model="/m", **each) for index, each in enumerate(fields)]


def sized(weights: float, *sizes: int, host: DeviceMemory = HOST) -> EngineSized:
    return EngineSized(needs(weights), [host, *gpus(*sizes)])


async def placed(placement: Placement, weights: Sequence[float | None], *sizes: int) -> list[LoadOn | str]:
    """Where each model that is loaded comes to, or why not. None: it is not loaded."""

    async def of(index: int, size: float) -> LoadOn | str:
        try:
            return await placement.seat(f"m{index}").take(sized(size, *sizes))
        except NoRoomError as error:
            return str(error)

    return await asyncio.gather(*(of(index, size) for index, size in enumerate(weights) if size is not None))


def on(device: str, fraction: float) -> Any:
    return LoadOn([device], pytest.approx(fraction))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ([{"device": "cuda"}], [("cuda:0", 0.9)]),
        ([{"device": "cuda"}, {}], [("cuda:0", 0.45), ("cuda:0", 0.45)]),
        (
            [{"device": "cuda", "device_memory_fraction": 0.6}, {"device": "cuda:0"}, {"load": False}],
            [("cuda:0", 0.6), ("cuda:0", 0.15)],
        ),
        ([{"device_memory_fraction": 0.7}, {"device_memory_fraction": 0.3}], [("cuda:0", 0.7), ("cuda:0", 0.3)]),
    ],
)
async def test_models_on_one_gpu_share_it_out(fields: list[dict[str, Any]], places: list[tuple[str, float]]) -> None:
    sizes = [None if each.get("load") is False else 1.0 for each in fields]
    assert await placed(Placement(models(*fields)), sizes, 80) == [on(*each) for each in places]


async def test_models_without_a_device_of_their_own_come_to_where_the_most_room_is() -> None:
    found = await placed(Placement(models({}, {}, {})), [10, 40, 20], 80, 80)
    assert found == [on("cuda:1", 0.45), on("cuda:0", 0.9), on("cuda:1", 0.45)]


async def test_a_model_of_a_named_device_is_there_whatever_else_is() -> None:
    found = await placed(Placement(models({"device": "cuda:1"}, {"device": "cpu"}, {})), [60, 1, 5], 80, 80)
    assert found == [on("cuda:1", 0.9), LoadOn(["cpu"], 0.5), on("cuda:0", 0.9)]


async def test_a_model_that_needs_more_than_an_equal_part_gets_what_it_needs() -> None:
    found = await placed(Placement(models({}, {})), [48, 1], 80)
    assert found == [on("cuda:0", 50 / 80), on("cuda:0", 0.9 - 50 / 80)]


async def test_two_models_are_never_over_one_gpus_memory() -> None:
    first, second = await placed(Placement(models({}, {})), [40, 50], 80)
    assert second == on("cuda:0", 0.9)
    assert isinstance(first, str)
    for part in (
        "model 'm0' does not fit: it needs 42.0 GiB at least (weights 40.0 GiB, cache 512.0 MiB, a step 512.0 MiB, ",
        "adapters 1.0 GiB)",
        "cuda:0, where the most room is, has ",
        "left of 80.0 GiB beside 'm1' 72.0 GiB",
        "quantise it",
    ):
        assert part in first


async def test_gpus_are_given_out_once_the_sizes_of_all_models_are_known() -> None:
    placement = Placement(models({}, {}, {"load": False}))
    first = asyncio.ensure_future(placement.seat("m0").take(sized(1, 80)))
    await asyncio.sleep(0)
    assert not first.done()
    await placement.seat("m1").take(sized(40, 80))
    assert await first == on("cuda:0", (0.9 - 42 / 80) / 2)


async def test_nobody_waits_for_a_model_that_has_failed() -> None:
    placement = Placement(models({}, {}))
    first = asyncio.ensure_future(placement.seat("m0").take(sized(1, 80)))
    await asyncio.sleep(0)
    placement.seat("m1").leave()
    assert (await first).devices == ["cuda:0"]


async def test_an_engine_that_starts_again_gets_its_place_again() -> None:
    placement = Placement(models({}, {}))
    before = await placed(placement, [1, 40], 80, 80)
    assert await placed(placement, [1, 40], 80, 80) == before


async def test_a_model_that_is_loaded_later_gets_the_part_that_was_set_aside() -> None:
    placement = Placement(models({}, {"load": False}))
    await placed(placement, [1, None], 80)
    assert await placement.seat("m1").take(sized(20, 80)) == on("cuda:0", 0.45)


async def test_a_model_that_is_loaded_later_and_needs_more_than_was_set_aside_is_refused() -> None:
    placement = Placement(models({}, {"load": False}))
    await placed(placement, [1, None], 80)
    with pytest.raises(NoRoomError, match=r"'m1' does not fit: it needs 62\.0 GiB .* left of 80\.0 GiB beside 'm0' 36"):
        await placement.seat("m1").take(sized(60, 80))


async def test_a_model_that_was_unloaded_gives_way_to_one_that_needs_its_part() -> None:
    placement = Placement(models({}, {"load": False}))
    await placed(placement, [48, None], 80)
    with pytest.raises(NoRoomError, match="beside 'm0' 50"):
        await placement.seat("m1").take(sized(38, 80))
    placement.seat("m0").leave()
    assert await placement.seat("m1").take(sized(38, 80)) == on("cuda:0", 0.5)
    with pytest.raises(NoRoomError, match=r"'m0' does not fit: it needs 50\.0 GiB .* beside 'm1' 40"):
        await placement.seat("m0").take(sized(48, 80))
    placement.seat("m1").leave()
    assert await placement.seat("m0").take(sized(48, 80)) == on("cuda:0", 50 / 80)


async def test_models_with_fractions_of_their_own_are_exchanged() -> None:
    fields = models({"device_memory_fraction": 0.7}, {"device_memory_fraction": 0.6, "load": False})
    placement = Placement(fields)
    await placed(placement, [1, None], 80)
    placement.seat("m0").leave()
    assert await placement.seat("m1").take(sized(1, 80)) == on("cuda:0", 0.6)
    with pytest.raises(NoRoomError, match=r"beside 'm1' 48"):
        await placement.seat("m0").take(sized(1, 80))


async def test_what_an_engine_holds_does_not_give_way_while_it_starts_again() -> None:
    placement = Placement(models({}, {"load": False}, {"load": False}))
    await placed(placement, [48, None, None], 80)
    found = await asyncio.gather(*(placement.seat(name).take(sized(9, 80)) for name in ("m1", "m2")))
    assert found == [on("cuda:0", (0.9 - 50 / 80) / 2)] * 2
    assert await placement.seat("m0").take(sized(48, 80)) == on("cuda:0", 50 / 80)


async def test_a_fraction_that_is_less_than_the_model_needs_is_refused() -> None:
    (found,) = await placed(Placement(models({"device_memory_fraction": 0.1})), [20], 80)
    assert isinstance(found, str)
    assert "its device_memory_fraction of 0.1 is 8.0 GiB of cuda:0: raise it" in found


async def test_fractions_that_are_more_than_the_gpus_of_the_machine_are_refused() -> None:
    fields = models({"device_memory_fraction": 0.7}, {"device_memory_fraction": 0.5})
    assert [type(each) for each in await placed(Placement(fields), [1, 1], 80)] == [LoadOn, str]
    assert [
        each.devices[0] for each in await placed(Placement(fields), [1, 1], 80, 80) if isinstance(each, LoadOn)
    ] == [
        "cuda:0",
        "cuda:1",
    ]


def test_fractions_that_leave_nothing_to_another_model_are_named() -> None:
    _, refused = arrange([Wish("a", fraction=0.95), Wish("b")], gpus(80))
    assert refused.keys() == {"b"}
    assert "beside 'a' 76.0 GiB" in refused["b"]


async def test_a_gpu_that_the_machine_does_not_have_is_refused_with_those_that_it_has() -> None:
    (found,) = await placed(Placement(models({"device": "cuda:3"})), [1], 80, 80)
    assert isinstance(found, str)
    assert "device 'cuda:3' is asked for, and this machine has cuda:0, cuda:1" in found


def test_parts_are_equal_but_never_less_than_what_is_needed() -> None:
    assert shared_out(90, {"a": 10, "b": 60, "c": 0}) == {"b": 60, "a": 15, "c": 15}


async def test_each_rank_of_a_model_gets_a_gpu_of_its_own() -> None:
    fields = models({"tensor_parallel": 2}, {}, {"tensor_parallel": 2, "devices": ("cuda:2", "cuda:1")})
    found = await placed(Placement(fields), [30, 60, 10], 80, 80, 80)
    assert [sorted(each.devices) if isinstance(each, LoadOn) else each for each in found] == [
        ["cuda:1", "cuda:2"],
        ["cuda:0"],
        ["cuda:1", "cuda:2"],
    ]


def test_a_model_with_more_ranks_than_there_are_gpus_is_refused_and_takes_nothing() -> None:
    parts, refused = arrange([*[Wish("wide", needs=needs(1))] * 3, Wish("other")], gpus(80, 80))
    assert "more ranks than this machine has GPUs (cuda:0, cuda:1)" in refused["wide"]
    assert parts.keys() == {"other"}
    assert parts["other"].fraction == pytest.approx(0.9)


# ---- the host --------------------------------------------------------------------------------------------------------


async def test_models_without_a_gpu_share_the_hosts_free_memory_out() -> None:
    fields = models({}, {"kv_cache_fraction": 0.3}, {"kv_cache_bytes": 1}, {})
    found = await placed(Placement(fields), [1, 1, 1, 1])
    assert found == [LoadOn(["cpu"], each) for each in (0.25, 0.3, 0.25, 0.25)]


async def test_models_are_never_over_the_hosts_memory() -> None:
    placement = Placement(models({}, {}))
    small = DeviceMemory("cpu", 10 * GIB)
    await placement.seat("m0").take(sized(6, host=small))
    with pytest.raises(
        NoRoomError, match=r"'m1' does not fit: it needs 5\.0 GiB .* host has 3\.0 GiB left of 10\.0 GiB beside 'm0' 7"
    ):
        await placement.seat("m1").take(sized(4, host=small))


async def test_each_rank_of_a_model_counts_among_the_hosts_memory() -> None:
    placement = Placement(models({"tensor_parallel": 2}, {}))
    small = DeviceMemory("cpu", 10 * GIB)
    with pytest.raises(NoRoomError, match=r"'m0' does not fit: it needs 12\.0 GiB .* for each of 2 ranks\)"):
        await placement.seat("m0").take(sized(5, host=small))
    assert (await placement.seat("m0").take(sized(3, host=small))).devices == ["cpu", "cpu"]
    with pytest.raises(NoRoomError, match=r"host has 2\.0 GiB left of 10\.0 GiB beside 'm0' 8\.0 GiB"):
        await placement.seat("m1").take(sized(2, host=small))


async def test_the_memory_of_a_model_that_was_unloaded_is_there_for_others() -> None:
    placement = Placement(models({}, {}))
    small = DeviceMemory("cpu", 10 * GIB)
    await placement.seat("m0").take(sized(6, host=small))
    placement.seat("m0").leave()
    assert (await placement.seat("m1").take(sized(4, host=small))).devices == ["cpu"]
