"""How long each Triton kernel takes at the sizes of a real layer, beside torch and beside a plain copy.

Every call of a measurement works on data of its own, more in all than the cache holds: in a model, too, a layer's
weights have left the cache by the next step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loraplex_kernels.ops import AttentionMetadata, HeadShape, LayerKV, LoraSegments, LoraSlice, LoraWeights, Ops
from loraplex_kernels.quantized import (
    AffineWeight,
    Float8Weight,
    InputRounding,
    IntegerWeight,
    QuantizedWeight,
    TableWeight,
)
from loraplex_kernels.reference import ReferenceOps

Call = Callable[[], object]
BLOCK_SIZE = 16
COLD_BYTES = 200_000_000  # more than the L2 cache of any GPU at hand
MAX_COPIES = 48
NUM_REPLAYS = 10


@dataclass(frozen=True)
class Sizes:
    """A layer, and the loads that it is measured under."""

    hidden: int
    intermediate: int
    heads: HeadShape
    rows: tuple[int, ...]  # tokens in a step, from decoding to a prompt
    decoding: tuple[tuple[int, int], ...]  # (sequences, keys of each)
    uneven: tuple[tuple[int, int], ...]  # the same, side by side in one step
    prompts: tuple[tuple[int, int], ...]  # (sequences, tokens of each)
    ranks: tuple[int, ...]  # of adapters side by side
    cold_bytes: int


EIGHT_BILLION = Sizes(
    hidden=4096,
    intermediate=14336,
    heads=HeadShape(32, 8, 128),
    rows=(1, 8, 64, 2048),
    decoding=((1, 1024), (1, 32768), (8, 4096), (64, 1024)),
    uneven=((1, 32768), (64, 1024)),
    prompts=((1, 2048), (8, 512)),
    ranks=(16, 16, 8, 64, 16, 32, 8, 16),
    cold_bytes=COLD_BYTES,
)
TINY = Sizes(
    hidden=64,
    intermediate=96,
    heads=HeadShape(4, 2, 16),
    rows=(1, 5),
    decoding=((2, 40),),
    uneven=((1, 600), (2, 40)),
    prompts=((1, 12),),
    ranks=(4, 16),
    cold_bytes=0,
)


@dataclass(frozen=True)
class Case:
    name: str
    num_bytes: int  # that have to be read and written
    flops: int
    make: Callable[[], tuple[Call, Call | None]]  # on fresh data: our call, and torch's


@dataclass(frozen=True)
class Row:
    """One line of the report. Times in seconds for one call, medians of the replays."""

    name: str
    num_bytes: int
    flops: int
    seconds: float
    spread: float  # (slowest − fastest) / median
    torch_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_on_gpu(calls: Sequence[Call]) -> tuple[float, float]:
    """Median seconds of one call, and the spread, when all are replayed as one CUDA graph."""
    for call in calls[:2]:
        call()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(NUM_REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    seconds = seconds[1:]  # the first one also uploads the graph
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def time_on_host(calls: Sequence[Call]) -> tuple[float, float]:
    """The same shape of answer where there is no GPU: it says that the call works, not how fast it would be."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls), 0.0


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of the fastest plain copy: what memory-bound kernels can reach."""
    num_bytes = 1 << (30 if device.type == "cuda" else 20)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = time_on_gpu if device.type == "cuda" else time_on_host
    seconds, _ = timer([lambda: target.copy_(source)] * 5)
    return 2 * num_bytes / seconds


def measure(ops: Ops, sizes: Sizes, dtype: torch.dtype, in_time: Callable[[], bool]) -> Iterator[Row]:
    """Every case, as long as there is time."""
    timer = time_on_gpu if ops.device.type == "cuda" else time_on_host
    generator = torch.Generator(device=ops.device).manual_seed(1)
    for case in Cases(ops, sizes, dtype, generator).all():
        if not in_time():
            return
        copies = min(MAX_COPIES, max(1, math.ceil(sizes.cold_bytes / case.num_bytes)))
        pairs = [case.make() for _ in range(copies)]
        seconds, spread = timer([ours for ours, _ in pairs])
        theirs = [call for _, call in pairs if call is not None]
        torch_seconds = timer(theirs)[0] if theirs else None
        yield Row(case.name, case.num_bytes, case.flops, seconds, spread, torch_seconds)


class Cases:
    """The operations of a layer under several loads."""

    def __init__(self, ops: Ops, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.ops = ops
        self.sizes = sizes
        self.dtype = dtype
        self.reference = ReferenceOps(ops.device)
        self._generator = generator

    def all(self) -> Iterator[Case]:
        for rows in self.sizes.rows:
            yield from self.small(rows)
            yield from self.quantised(rows)
            yield self.lora("lora, one adapter", rows, self.sizes.ranks[:1])
            yield self.lora(f"lora, {len(self.sizes.ranks)} adapters of mixed ranks", rows, self.sizes.ranks)
        for sequences, keys in self.sizes.decoding:
            yield self.decode((sequences, keys))
        yield self.decode(*self.sizes.uneven)
        for sequences, tokens in self.sizes.prompts:
            yield self.prompt(sequences, tokens)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.ops.device, dtype=dtype or self.dtype)

    def int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.ops.device)

    def small(self, rows: int) -> Iterator[Case]:
        """What lies between the products."""
        hidden, wide, heads, size = self.sizes.hidden, self.sizes.intermediate, self.sizes.heads, self.dtype.itemsize

        def norm() -> tuple[Call, Call]:
            x, residual, weight = self.random(rows, hidden), self.random(rows, hidden), self.random(hidden).float()
            low = weight.to(self.dtype)
            return (
                lambda: self.ops.add_rms_norm(x, residual, weight, 1e-5),
                lambda: F.rms_norm(residual.add_(x), (hidden,), low, 1e-5),
            )

        def activation() -> tuple[Call, Call]:
            x = self.random(rows, 2 * wide)
            return lambda: self.ops.silu_and_mul(x), lambda: F.silu(x[:, :wide]) * x[:, wide:]

        def rotary() -> tuple[Call, Call]:
            width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
            qkv, cos_sin = self.random(rows, width), self.random(rows, 2, heads.head_dim // 2, dtype=torch.float32)
            positions = slots = torch.arange(rows, device=self.ops.device)
            blocks = -(-rows // BLOCK_SIZE)
            mine, theirs = (o.allocate_kv(blocks, BLOCK_SIZE, heads, self.dtype) for o in (self.ops, self.reference))
            return (
                lambda: self.ops.rotary_store_kv(qkv, heads, None, positions, cos_sin, mine, slots),
                lambda: self.reference.rotary_store_kv(qkv, heads, None, positions, cos_sin, theirs, slots),
            )

        qkv_bytes = rows * (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim * size
        yield Case(f"add_rms_norm, {rows} rows", 4 * rows * hidden * size, 0, norm)
        yield Case(f"silu_and_mul, {rows} rows", 3 * rows * wide * size, 0, activation)
        yield Case(f"rotary_store_kv, {rows} rows", 2 * qkv_bytes, 0, rotary)

    def quantised(self, rows: int) -> Iterator[Case]:
        """The fused gate and up projection, quantised, beside torch's product with the same weight in 16 bits."""
        c, n, group, device = self.sizes.hidden, 2 * self.sizes.intermediate, 128, self.ops.device
        groups = -(-c // group)
        scales = 2 * groups * n  # bytes

        def codes(bits: int) -> Tensor:
            shape, generator = (n, c), self._generator
            return torch.randint(0, 1 << bits, shape, generator=generator, device=device, dtype=torch.uint8)

        def ones(*shape: int) -> Tensor:
            return torch.ones(shape, device=device)

        records: list[tuple[str, int, Callable[[], QuantizedWeight]]] = [
            (
                "4 bit",
                n * c // 2 + scales + groups * n,
                lambda: AffineWeight(codes(4), 4, ones(groups, n), 8 * ones(groups, n), group),
            ),
            ("8 bit", n * c + 2 * n, lambda: AffineWeight(codes(8), 8, ones(1, n), 128 * ones(1, n), c)),
            (
                "nf4",
                n * c // 2 + 2 * n * c // 64,
                lambda: TableWeight(codes(4), ones(16), ones(-(-n * c // 64)), 64),
            ),
            (
                "fp8",
                n * c + 4 * groups * n,
                lambda: Float8Weight(codes(6).view(torch.float8_e4m3fn), ones(-(-n // group), groups), (group, group)),
            ),
            ("w8a8", n * c + 4 * n, lambda: IntegerWeight(codes(8).view(torch.int8), ones(n), InputRounding())),
        ]

        def make(record: Callable[[], QuantizedWeight]) -> tuple[Call, Call]:
            packed = self.ops.pack_quantized(record(), None, self.dtype)
            x, dense = self.random(rows, c), self.random(n, c)
            return lambda: self.ops.linear(x, packed), lambda: F.linear(x, dense)

        for name, moved, record in records:
            inputs = rows * (c + n) * self.dtype.itemsize
            yield Case(f"linear, {name}, {rows} rows", moved + inputs, 2 * rows * n * c, partial(make, record))

    def lora(self, name: str, rows: int, ranks: Sequence[int]) -> Case:
        """Beside a fused query, key and value projection; rows divided evenly, at least one for each adapter."""
        heads, hidden = self.sizes.heads, self.sizes.hidden
        parts, total = [], 0
        for width in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads):
            parts.append((total, width * heads.head_dim))
            total += width * heads.head_dim
        ranks = ranks[:rows]
        bounds = [rows * i // len(ranks) for i in range(len(ranks) + 1)]
        ranges = tuple((slot, bounds[slot], bounds[slot + 1]) for slot in range(len(ranks)))

        def make() -> tuple[Call, Call]:
            table = self.ops.lora_table(hidden, total, len(ranks))
            adapters = []
            for slot, rank in enumerate(ranks):
                slices = tuple(LoraSlice(i * rank, o, self.random(n, rank)) for i, (o, n) in enumerate(parts))
                adapters.append(LoraWeights(self.random(rank * len(parts), hidden), slices))
                table.put(slot, self.ops.pack_lora(adapters[-1]))
            segments = LoraSegments(ranges, *(self.int32(column) for column in zip(*ranges, strict=True)))
            x, y = self.random(rows, hidden), self.random(rows, total)

            def one_after_the_other() -> None:
                for slot, start, end in ranges:
                    shrunk = x[start:end] @ adapters[slot].a.t()
                    for part in adapters[slot].slices:
                        n, rank = part.b.shape
                        columns = y[start:end, part.out_start : part.out_start + n]
                        columns.addmm_(shrunk[:, part.rank_start : part.rank_start + rank], part.b.t())

            return lambda: self.ops.segmented_lora(y, x, segments, table), one_after_the_other

        size = self.dtype.itemsize
        weights = sum(rank * (len(parts) * hidden + total) for rank in ranks)
        moved = weights + rows * (hidden + 2 * total)
        flops = sum((end - start) * 2 * ranks[slot] * (len(parts) * hidden + total) for slot, start, end in ranges)
        return Case(f"{name}, {rows} rows", moved * size, flops, make)

    def decode(self, *groups: tuple[int, int]) -> Case:
        """Groups of (sequences, keys of each) in one step."""
        heads = self.sizes.heads
        keys = sum(sequences * each for sequences, each in groups)
        moved = 2 * keys * heads.num_kv_heads * heads.head_dim * self.dtype.itemsize
        name = " and ".join(f"{sequences} decoding over {each} keys" for sequences, each in groups)
        return Case(f"attention, {name}", moved, 0, self._attention(groups, prompts=False))

    def prompt(self, sequences: int, tokens: int) -> Case:
        heads = self.sizes.heads
        flops = 2 * sequences * tokens * tokens * heads.num_heads * heads.head_dim  # half of 4: causal
        columns = 2 * heads.num_heads + 2 * heads.num_kv_heads
        moved = sequences * tokens * columns * heads.head_dim * self.dtype.itemsize
        make = self._attention([(sequences, tokens)], prompts=True)
        return Case(f"attention, {sequences} prompts of {tokens} tokens", moved, flops, make)

    def _attention(self, groups: Sequence[tuple[int, int]], prompts: bool) -> Callable[[], tuple[Call, Call]]:
        """Groups of (sequences, keys of each). All of these keys are of new tokens, or all but the last."""
        heads = self.sizes.heads
        lengths = [keys for sequences, keys in groups for _ in range(sequences)]
        new = lengths if prompts else [1] * len(lengths)
        per_sequence = -(-max(lengths) // BLOCK_SIZE)
        num_blocks, scale = len(lengths) * per_sequence, heads.head_dim**-0.5

        def dense(sequences: int, keys: int) -> Call:
            """torch's gets contiguous keys, without a block table, and sequences of one length."""
            q = self.random(sequences, heads.num_heads, keys if prompts else 1, heads.head_dim)
            k, v = (self.random(sequences, heads.num_kv_heads, keys, heads.head_dim) for _ in range(2))
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=prompts, enable_gqa=True)

        def make() -> tuple[Call, Call]:
            empty = self.ops.allocate_kv(num_blocks, BLOCK_SIZE, heads, self.dtype)
            cache = LayerKV(self.random(*empty.k.shape), self.random(*empty.v.shape), num_blocks, BLOCK_SIZE)
            tables = torch.randperm(num_blocks, generator=self._generator, device=self.ops.device).int()
            metadata = AttentionMetadata(
                self.int32([0, *accumulate(new)]),
                self.int32(lengths),
                tables.view(len(lengths), per_sequence),
                torch.zeros(sum(new), dtype=torch.long, device=self.ops.device),
                max(new),
                max(lengths),
            )
            q = self.random(sum(new), heads.num_heads, heads.head_dim)
            theirs = [dense(*group) for group in groups]
            return (
                lambda: self.ops.paged_attention(q, cache, metadata, scale, None, None),
                lambda: [call() for call in theirs],
            )

        return make
