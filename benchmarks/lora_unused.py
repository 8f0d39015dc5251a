"""What it costs a request of the base model that adapters could be used, and that some are resident.

    python -m benchmarks.lora_unused --model DIR/llama-160m [--adapters 32] [--streams 8] [--pairs 20]

Two engines in this process take turns with the same prompts: one whose linears are without any LoRA, and one as it
serves, with adapters resident that no request asks for. The figure is the median of the pairs' ratios of time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from unittest import mock

from torch import Tensor

from benchmarks.systems.loraplex_inprocess import Driver, load_adapters
from benchmarks.workload import SCENARIOS, make_work
from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_kernels.ops import LoraSegments


class BareLinear(LoRALinear):
    """What the model would call if there were no adapters."""

    def __call__(self, x: Tensor, segments: LoraSegments | None) -> Tensor:
        return self.linear(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--adapters", type=int, default=32, help="resident and unused")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = EngineConfig(
        model=str(args.model / "base"), threads=args.threads, max_model_len=1024, kv_cache_bytes=1 << 28
    )
    with mock.patch("loraplex_engine.models.loading.LoRALinear", BareLinear):
        bare = Driver(EngineCore.load(config), [])
    core = EngineCore.load(config)
    enabled = Driver(core, load_adapters(core, args.model, args.adapters))
    loop = asyncio.new_event_loop()
    seconds: dict[Driver, list[float]] = {bare: [], enabled: []}
    for driver in seconds:
        loop.run_until_complete(driver.run(driver.warm_up(), 8))
    for pair in range(args.pairs):
        work = make_work(SCENARIOS["base"], args.streams, pair)[: args.streams]
        for driver in (bare, enabled) if pair % 2 else (enabled, bare):
            started = time.perf_counter()
            loop.run_until_complete(driver.run(work, args.streams))
            seconds[driver].append(time.perf_counter() - started)
    ratios = [theirs / ours for ours, theirs in zip(seconds[bare], seconds[enabled], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{args.streams} streams, {args.adapters} adapters resident and unused, {args.pairs} pairs:")
    print(f"time / time without LoRA: {median:.4f} (quartiles {low:.4f} and {high:.4f})")


if __name__ == "__main__":
    main()
