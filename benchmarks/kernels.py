"""How long each operation takes on the CPU at the sizes of a real layer, beside torch and beside what is possible.

    python -m benchmarks.kernels [--model llama-160m] [--threads 2] [--isa avx2] [--json OUT.json]

Every call of a measurement works on data of its own, more in all than the caches hold: in a model, too, a layer's
weights have left the cache by the next step. Ours and torch's calls alternate in blocks, medians are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu_kernels import Call, Case, Cases, Sizes
from benchmarks.roofline import Roofline
from benchmarks.roofline import measure as measure_roofline
from loraplex_kernels.ops import HeadShape, Ops
from loraplex_kernels.quantized import AffineWeight, InputRounding, IntegerWeight, TableWeight
from loraplex_kernels.selection import select_ops

COLD_BYTES = 160_000_000  # more than the last-level cache of a small machine
MAX_COPIES = 64
GROUP = 128  # inputs that share a scale in the 4-bit products
ROUNDS = 7
# libgomp's threads spin for a while after each parallel region: they must leave the cores to the kernels' own.
SETTLE_SECONDS = 0.05

MODELS = {
    "llama-160m": Sizes(
        hidden=768,
        intermediate=2048,
        heads=HeadShape(12, 4, 64),
        rows=(1, 8, 32, 128, 512),
        decoding=((1, 192), (8, 192), (32, 192), (1, 8192)),
        uneven=((1, 4096), (8, 256)),
        prompts=((1, 128), (8, 128), (1, 2048)),
        ranks=(16,) * 8,
        cold_bytes=COLD_BYTES,
    ),
    "llama-1b": Sizes(
        hidden=2048,
        intermediate=8192,
        heads=HeadShape(32, 8, 64),
        rows=(1, 8, 32, 128, 512),
        decoding=((1, 192), (8, 192), (32, 192), (1, 8192)),
        uneven=((1, 4096), (8, 256)),
        prompts=((1, 128), (8, 128), (1, 2048)),
        ranks=(16, 8, 64, 16, 32, 8, 16, 4),
        cold_bytes=COLD_BYTES,
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the report. Times in seconds for one call, medians of the rounds."""

    name: str
    num_bytes: int
    flops: int
    seconds: float
    spread: float  # (slowest - fastest) / median
    torch_seconds: float | None
    least_seconds: float  # by the roofline


class CpuCases(Cases):
    """The operations between the products, LoRA and attention as on any device; and the products themselves."""

    def all(self) -> Iterator[Case]:
        hidden, wide, heads = self.sizes.hidden, self.sizes.intermediate, self.sizes.heads
        fused = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        for rows in self.sizes.rows:
            for n, c in ((fused, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)):
                yield self.linear(rows, n, c)
            for make in (self.int4, self.int8, self.w8a8, self.nf4):
                yield make(rows, 2 * wide, hidden)
        yield from super().all()

    def linear(self, rows: int, n: int, c: int) -> Case:
        def make() -> tuple[Call, Call]:
            weight, x = self.random(n, c), self.random(rows, c)
            packed = self.ops.pack_linear([weight], None)
            return lambda: self.ops.linear(x, packed), lambda: F.linear(x, weight)

        moved = (n * c + rows * (n + c)) * self.dtype.itemsize
        return Case(f"linear {n} x {c}, {rows} rows", moved, 2 * rows * n * c, make)

    def int4(self, rows: int, n: int, c: int) -> Case:
        """Groups of 128 with zeros, beside torch's own packed product of the same shape."""

        def make() -> tuple[Call, Call]:
            groups = c // GROUP
            codes = torch.randint(0, 16, (n, c), dtype=torch.uint8)
            weight = AffineWeight(codes, 4, torch.full((groups, n), 0.01), torch.full((groups, n), 7.0), GROUP)
            packed, x = self.ops.pack_quantized(weight, None, self.dtype), self.random(rows, c)
            torchs = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            scales = torch.full((groups, n, 2), 0.01, dtype=self.dtype)
            return (
                lambda: self.ops.linear(x, packed),
                lambda: torch._weight_int4pack_mm_for_cpu(x, torchs, GROUP, scales),
            )

        moved = n * c // 2 + n * c // GROUP * 4 + rows * (n + c) * self.dtype.itemsize
        return Case(f"int4 {n} x {c}, {rows} rows", moved, 2 * rows * n * c, make)

    def int8(self, rows: int, n: int, c: int) -> Case:
        """One scale per output, beside torch's own product of the same shape."""

        def make() -> tuple[Call, Call]:
            codes, scale = torch.randint(0, 256, (n, c), dtype=torch.uint8), torch.full((1, n), 0.01)
            weight = AffineWeight(codes, 8, scale, torch.full((1, n), 128.0), c)
            packed, x = self.ops.pack_quantized(weight, None, self.dtype), self.random(rows, c)
            signed, scales = (codes ^ 128).view(torch.int8), scale[0].to(self.dtype)
            return lambda: self.ops.linear(x, packed), lambda: torch._weight_int8pack_mm(x, signed, scales)

        moved = n * c + 4 * n + rows * (n + c) * self.dtype.itemsize
        return Case(f"int8 {n} x {c}, {rows} rows", moved, 2 * rows * n * c, make)

    def w8a8(self, rows: int, n: int, c: int) -> Case:
        """The same with inputs that are rounded as well; torch has no such product."""

        def make() -> tuple[Call, None]:
            codes = torch.randint(-128, 128, (n, c), dtype=torch.int8)
            weight = IntegerWeight(codes, torch.full((n,), 0.01), InputRounding())
            packed, x = self.ops.pack_quantized(weight, None, self.dtype), self.random(rows, c)
            return lambda: self.ops.linear(x, packed), None

        moved = n * c + 8 * n + rows * (n + c) * self.dtype.itemsize
        return Case(f"w8a8 {n} x {c}, {rows} rows", moved, 2 * rows * n * c, make)

    def nf4(self, rows: int, n: int, c: int) -> Case:
        """A table of 16 values, blocks of 64; torch has no such product."""

        def make() -> tuple[Call, None]:
            codes = torch.randint(0, 16, (n, c), dtype=torch.uint8)
            weight = TableWeight(codes, torch.linspace(-1, 1, 16), torch.full((n * c // 64,), 0.01), 64)
            packed, x = self.ops.pack_quantized(weight, None, self.dtype), self.random(rows, c)
            return lambda: self.ops.linear(x, packed), None

        moved = n * c // 2 + n * c // 64 * 4 + rows * (n + c) * self.dtype.itemsize
        return Case(f"nf4 {n} x {c}, {rows} rows", moved, 2 * rows * n * c, make)


def measure(ops: Ops, sizes: Sizes, dtype: torch.dtype, roofline: Roofline) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(1)
    for case in CpuCases(ops, sizes, dtype, generator).all():
        copies = min(MAX_COPIES, max(1, math.ceil(sizes.cold_bytes / case.num_bytes)))
        pairs = [case.make() for _ in range(copies)]
        ours, theirs = [call for call, _ in pairs], [call for _, call in pairs if call is not None]
        seconds: list[float] = []
        torch_seconds: list[float] = []
        for _ in range(ROUNDS):
            seconds.append(_block(ours))
            if theirs:
                torch_seconds.append(_block(theirs))
        median = statistics.median(seconds)
        yield Row(
            case.name,
            case.num_bytes,
            case.flops,
            median,
            (max(seconds) - min(seconds)) / median,
            statistics.median(torch_seconds) if torch_seconds else None,
            max(case.num_bytes / roofline.bytes_per_second, case.flops / roofline.flops_per_second),
        )


def _block(calls: Sequence[Call]) -> float:
    """Seconds of one call, all of them one after the other, once the threads of the block before have gone to sleep."""
    time.sleep(SETTLE_SECONDS)
    calls[0]()  # wakes the threads
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def as_line(row: Row) -> str:
    beside = f"{row.torch_seconds / row.seconds:6.2f}x" if row.torch_seconds else ""
    return (
        f"{row.name:<44} {row.seconds * 1e6:9.1f} us ±{row.spread * 50:3.0f} % "
        f"{row.num_bytes / row.seconds / 1e9:6.1f} GB/s {row.flops / row.seconds / 1e9:6.0f} GFLOP/s "
        f"{100 * row.least_seconds / row.seconds:4.0f} % of the limit {beside}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-160m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default=None, help="instruction set of the kernels instead of the best")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    args = parser.parse_args(arguments)
    roofline = measure_roofline(args.threads)
    ops = select_ops(torch.device("cpu"), "cpu", threads=args.threads, isa=args.isa)
    print(
        f"{args.model}, {args.threads} threads, {args.isa or 'best'} instruction set; this machine reads "
        f"{roofline.bytes_per_second / 1e9:.1f} GB/s and multiplies {roofline.flops_per_second / 1e9:.0f} GFLOP/s; "
        "last column: torch's time / ours"
    )
    rows = []
    with torch.inference_mode():
        for row in measure(ops, MODELS[args.model], torch.bfloat16, roofline):
            print(as_line(row), flush=True)
            rows.append(row)
    if args.json:
        report: dict[str, Any] = {"model": args.model, "threads": args.threads, "roofline": asdict(roofline)}
        args.json.write_text(json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
