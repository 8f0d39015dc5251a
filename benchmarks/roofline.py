"""What this machine could do at best: how fast it reads memory, how fast it multiplies, and what follows for a model.

    python -m benchmarks.roofline [--model DIR/llama-160m] [--threads 2]

A step reads every weight once and multiplies every row with it: it takes at least the longer of the two. Everything
else (attention, norms, sampling, messages, waiting) counts as nothing, so no system can reach the limit quite.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
class Part:
    """What a row goes through in all layers together: the same linears for all rows, or those of a few experts."""

    parameters: int  # of one expert
    adapter_parameters: int  # of one adapter beside it
    experts: int = 1
    per_row: int = 1  # of these experts

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], layers: int, rank: int, experts: int = 1, per_row: int = 1) -> Part:
        """shapes: of the linears in a layer, of one expert."""
        parameters, beside = (sum(map(each, shapes)) for each in (math.prod, sum))
        return cls(layers * parameters, layers * rank * beside, experts, per_row)

    def touched(self, rows: float) -> float:
        """How many experts so many rows need, if each goes to any of them alike."""
        return self.experts * (1 - (1 - self.per_row / self.experts) ** rows)


@dataclass(frozen=True)
class ModelCost:
    """What a model costs per row and per step."""

    parts: tuple[Part, ...]
    head_parameters: int  # of the output layer, which only the last row of a prompt needs

    @classmethod
    def read(cls, model: Path) -> ModelCost:
        """Of a directory made by benchmarks.models: base/ and adapters/a00."""
        config = json.loads((model / "base" / "config.json").read_text())
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or hidden // heads
        rank = json.loads((model / "adapters" / "a00" / "adapter_config.json").read_text())["r"]
        queries, keys = (hidden, heads * width), (hidden, kv_heads * width)
        attention = Part.of([queries, keys, keys, queries], layers, rank)
        if experts := config.get("num_local_experts"):
            inner, per_row = config["moe_intermediate_size"], config["num_experts_per_tok"]
            forward = Part.of([(hidden, 2 * inner), (inner, hidden)], layers, rank, experts, per_row)
        else:
            forward = Part.of([(hidden, config["intermediate_size"])] * 3, layers, rank)
        return cls((attention, forward), hidden * config["vocab_size"])

    def with_adapters(self, parameters: int) -> ModelCost:
        """The same beside other adapters, of so many parameters and none on experts."""
        first, *others = self.parts
        parts = replace(first, adapter_parameters=parameters), *(replace(part, adapter_parameters=0) for part in others)
        return replace(self, parts=parts)

    def of_row(self, adapted: bool) -> int:
        """Parameters that a row is multiplied by, without the head."""
        return sum(part.per_row * (part.parameters + adapted * part.adapter_parameters) for part in self.parts)

    def of_step(self, rows: int, adapters: int) -> float:
        """Parameters that are read for so many rows, each with its last token, of so many adapters."""
        base = sum(part.touched(rows) * part.parameters for part in self.parts)
        beside = sum(part.touched(rows / max(1, adapters)) * part.adapter_parameters for part in self.parts)
        return self.head_parameters + base + adapters * beside


def output_limit(cost: ModelCost, roofline: Roofline, scenario: Scenario, concurrency: int) -> float:
    """Output tokens per second that nobody can exceed at this work.

    A request computes its prompt (a shared prefix is computed by one of them), then one token a step together with the
    others. Weights are bfloat16.
    """
    row_parameters = cost.of_row(scenario.num_adapters > 0)
    step_bytes = BF16_BYTES * cost.of_step(concurrency, min(scenario.num_adapters, concurrency))
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
