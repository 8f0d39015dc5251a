"""What this machine could do at best: how fast it reads memory, how fast it multiplies, and what follows for a model.

    python -m benchmarks.roofline [--model DIR/llama-160m] [--threads 2]

A step reads every weight once and multiplies every row with it: it takes at least the longer of the two. Everything
else (attention, norms, sampling, messages, waiting) counts as nothing, so no system can reach the limit quite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.workload import SCENARIOS, Scenario
from loraplex_kernels.selection import select_ops

BF16_BYTES = 2
LARGE_BATCH = 512  # rows: a chunk of a prompt


@dataclass(frozen=True)
class Roofline:
    """Rates of the machine, with the given number of threads."""

    threads: int
    bytes_per_second: float  # reading
    flops_per_second: float  # bfloat16 products of many rows: the best of torch's and our kernel


@dataclass(frozen=True)
class ModelCost:
    """What a model costs per row and per step."""

    layer_parameters: int  # of all linears in the layers
    head_parameters: int  # of the output layer, which only the last row of a prompt needs
    adapter_parameters: int  # of one adapter

    @classmethod
    def read(cls, model: Path) -> ModelCost:
        """Of a directory made by benchmarks.models: base/ and adapters/a00."""
        config = json.loads((model / "base" / "config.json").read_text())
        hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or hidden // heads
        shapes = [
            (hidden, heads * width),
            (hidden, kv_heads * width),
            (hidden, kv_heads * width),
            (heads * width, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        ]
        rank = json.loads((model / "adapters" / "a00" / "adapter_config.json").read_text())["r"]
        return cls(
            layers * sum(n * c for n, c in shapes),
            hidden * config["vocab_size"],
            layers * rank * sum(n + c for n, c in shapes),
        )


def output_limit(cost: ModelCost, roofline: Roofline, scenario: Scenario, concurrency: int) -> float:
    """Output tokens per second that nobody can exceed at this work.

    A request computes its prompt (a shared prefix is computed by one of them), then one token a step together with the
    others. Weights are bfloat16.
    """
    distinct = min(scenario.num_adapters, concurrency)
    step_bytes = BF16_BYTES * (cost.layer_parameters + cost.head_parameters + distinct * cost.adapter_parameters)
    row_parameters = cost.layer_parameters + (cost.adapter_parameters if scenario.num_adapters else 0)
    step_flops = 2 * concurrency * (row_parameters + cost.head_parameters)
    step_seconds = max(step_bytes / roofline.bytes_per_second, step_flops / roofline.flops_per_second)
    prompt_seconds = 2 * row_parameters * scenario.prompt / roofline.flops_per_second
    return concurrency * scenario.output / (scenario.output * step_seconds + concurrency * prompt_seconds)


def measure(threads: int) -> Roofline:
    """Some seconds of reading and multiplying. The best of several runs each: others may use the machine."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28, dtype=torch.float32)  # 1 GiB: far more than any cache
    reading = _best(data.sum, 8)
    x = torch.randn(LARGE_BATCH, 4096).to(torch.bfloat16)
    weight = torch.randn(4096, 4096).to(torch.bfloat16)
    ops = select_ops(torch.device("cpu"), threads=threads)
    packed = ops.pack_linear([weight], None)
    seconds = min(_best(lambda: F.linear(x, weight), 12), _best(lambda: ops.linear(x, packed), 12))
    return Roofline(threads, data.nbytes / reading, 2 * x.numel() * weight.shape[0] / seconds)


def _best(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.quantiles(times, n=4)[0]  # the fastest quarter: one lucky run is no limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory made by benchmarks.models: also print its limits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    roofline = measure(args.threads)
    if args.json:
        print(json.dumps(asdict(roofline)))
        return
    print(f"reads {roofline.bytes_per_second / 1e9:.1f} GB/s, multiplies {roofline.flops_per_second / 1e9:.0f} GFLOP/s")
    if args.model:
        cost = ModelCost.read(args.model)
        for scenario in SCENARIOS.values():
            limits = ", ".join(f"{c} streams {output_limit(cost, roofline, scenario, c):.0f}" for c in (1, 8, 32))
            print(f"{scenario.name:>13}: output tokens/s at most: {limits}")


if __name__ == "__main__":
    main()
