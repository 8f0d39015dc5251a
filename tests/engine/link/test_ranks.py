"""What a configuration may say of the ranks of a model, and of their devices."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex_engine.link.config import EngineConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel 0 must be from 1 to 64"),
        ({"tensor_parallel": 1 << 20}, "must be 1 to 64 ranks"),
        ({"devices": ("cuda:0", "cuda:1")}, "devices names 2: 1 are needed"),
        ({"devices": ("cuda",)}, "'cuda': each is cpu or cuda:N"),
        ({"tensor_parallel": 2, "devices": ("cuda:0", "cpu")}, "cuda:0, cpu: they must be of one kind"),
        ({"tensor_parallel": 2, "devices": ("cuda:0", "cuda:0")}, "a GPU is named twice"),
        ({"tensor_parallel": 2, "host_cache_bytes": 1}, "host_cache_bytes has the blocks of one rank, and there are 2"),
        ({"device": "cpu", "devices": ("cpu",)}, "device 'cpu' and devices are both given"),
        ({"tensor_parallel": 4, "machines": 0}, "machines 0: 4 ranks cannot be shared out equally"),
        ({"tensor_parallel": 4, "machines": 3}, "machines 3: 4 ranks cannot be shared out equally"),
        ({"tensor_parallel": 4, "machines": 2, "devices": ("cuda:0",)}, "devices names 1: 2 are needed"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="/model", **fields).check()


@pytest.mark.parametrize(
    ("fields", "threads"),
    [
        ({}, 8),
        ({"tensor_parallel": 2}, 4),
        ({"pipeline_parallel": 2}, 8),
        ({"tensor_parallel": 16}, 1),
        ({"tensor_parallel": 4, "machines": 2}, 4),
        ({"tensor_parallel": 2, "machines": 2}, 8),
        ({"tensor_parallel": 2, "pipeline_parallel": 4, "machines": 2}, 4),
    ],
)
def test_the_ranks_of_a_stage_share_the_threads_and_stages_take_turns(fields: dict[str, Any], threads: int) -> None:
    assert EngineConfig(model="/model", threads=8, **fields).rank_threads == threads


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({}, ("auto",)),
        ({"devices": ("cuda:3",)}, ("cuda:3",)),
        ({"tensor_parallel": 2, "device": "cpu"}, ("cpu", "cpu")),
        ({"tensor_parallel": 2, "device": "cuda"}, ("cuda:0", "cuda:1")),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "device": "cuda:2"}, tuple(f"cuda:{n}" for n in range(2, 6))),
        ({"tensor_parallel": 4, "machines": 2, "device": "cuda"}, ("cuda:0", "cuda:1")),
        ({"tensor_parallel": 2, "machines": 2, "device": "auto"}, ("auto",)),
    ],
)
def test_ranks_take_the_devices_that_are_named_or_those_that_follow(
    fields: dict[str, Any], devices: tuple[str, ...]
) -> None:
    assert EngineConfig(model="/model", **fields).rank_devices == devices
