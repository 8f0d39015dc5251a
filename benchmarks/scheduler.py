"""What planning a step costs, and that it does not grow with the queue.

    python -m benchmarks.scheduler [--out RESULT.json]

A batch decodes while others wait: because it is full, for one adapter that never arrives, and for as many adapters as
there are requests (the batch has room, and each step looks whether somebody can join); each for one tenant, and for as
many tenants as there are requests. Times `schedule` plus `update` alone: no model, no messages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from loraplex_adapters.key import AdapterKey
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.adapters import AdapterPreparer
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import SampledToken, StepResult

BATCH = 32
BLOCK_SIZE = 16
PROMPT = list(range(128))
NEVER = 1 << 20  # tokens


class NoAdapters:
    """Adapters that are never on the device."""

    changes = 0

    def invocation_tokens(self, key: AdapterKey) -> tuple[int, ...]:
        return ()

    def acquire(self, key: AdapterKey) -> int | None:
        return None

    def make_room(self, key: AdapterKey) -> None:
        """There is none to make."""

    def leaves_cache(self, key: AdapterKey) -> bool:
        return False

    def has_head(self, key: AdapterKey) -> bool:
        return False

    def release(self, key: AdapterKey) -> None:
        raise AssertionError("nothing was acquired")


def fill(num_waiting: int, num_adapters: int, num_tenants: int) -> Scheduler:
    """A scheduler whose batch is full and decodes, with `num_waiting` requests behind it."""
    blocks = BlockManager(BATCH * 64, BLOCK_SIZE, enable_prefix_caching=True)
    places = BATCH + 8 if num_adapters else BATCH
    scheduler = Scheduler(blocks, [AdapterPreparer(NoAdapters())], places, 4096, 1024, time.monotonic)
    for index in range(BATCH + num_waiting):
        adapter = None
        if index >= BATCH and num_adapters:
            adapter = AdapterKey(f"shared/a{index % num_adapters}", f"{index % num_adapters:064x}")
        sampling = SamplingParams(seed=0, max_tokens=NEVER)
        message = AddRequest(index, PROMPT, sampling, adapter, tenant=f"t{index % num_tenants}")
        scheduler.add(Request(message, index, 0.0))
        if index == BATCH - 1:
            for _ in range(4):
                step(scheduler)
    for _ in range(4):
        step(scheduler)
    assert len(scheduler.running) == BATCH
    return scheduler


def step(scheduler: Scheduler) -> float:
    """Seconds of one step's planning and bookkeeping."""
    started = time.perf_counter()
    plan = scheduler.schedule()
    result = StepResult(tuple((SampledToken(1, None),) if item.samples else () for item in plan.scheduled), {})
    scheduler.update(plan, result)
    sum(map(len, scheduler.rooms), len(scheduler.waiting))  # every step's statistics ask for it
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs=2, default=[100, 10_000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    cases = {
        "base": (lambda n: 0, lambda n: 1),
        "one adapter": (lambda n: 1, lambda n: 1),
        "all adapters different": (lambda n: n, lambda n: 1),
        "all tenants different": (lambda n: 0, lambda n: n),
        "all of both different": (lambda n: n, lambda n: n),
    }
    for name, (adapters, tenants) in cases.items():
        few, many = (fill(count, adapters(count), tenants(count)) for count in args.waiting)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.steps):  # taking turns, so that both see the same machine
            times[0].append(step(few))
            times[1].append(step(many))
        medians = [statistics.median(values) * 1e6 for values in times]
        results[name] = {"microseconds": medians, "ratio": medians[1] / medians[0]}
        waiting = f"{args.waiting[0]} waiting {medians[0]:6.1f} µs, {args.waiting[1]} waiting {medians[1]:6.1f} µs"
        print(f"{name:>22}: {waiting}, ratio {medians[1] / medians[0]:.3f}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
