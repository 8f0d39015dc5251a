"""What the formats of quantised weights take on the CPU: memory, and the time of a product, side by side in one run.

    python -m benchmarks.formats [--size 2048] [--threads 2] [--rounds 60]

Prints a table. Matrices are [size, size] and random, products are computed in bfloat16, and every product reads a
matrix that has left the cache. In each round all formats take their turn at each number of rows; the least of the
rounds is shown, which others on the machine disturb the least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.measure import machine
from loraplex_kernels.ops import Ops
from loraplex_kernels.quantized import AffineWeight, Float8Weight, QuantizedWeight, TableWeight
from loraplex_kernels.selection import select_ops

ROWS = (1, 8, 32)
COPIES = 4  # of each matrix, multiplied in turn
MILLI = 1e3


def affine(size: int, bits: int, group: int, whole_zeros: bool = True) -> AffineWeight:
    scale = (torch.rand(size // group, size) / 100 + 0.001).half().float()
    zero = torch.full_like(scale, 1 << (bits - 1)) if whole_zeros else (torch.rand_like(scale) * 8).half().float()
    return AffineWeight(codes(size, 1 << bits), bits, scale, zero, group)


def four_bit_floats(size: int, block: int, scale: Tensor) -> TableWeight:
    return TableWeight(codes(size, 16), torch.randn(16), scale, block)


def float8(size: int, block: int, scale: Tensor) -> Float8Weight:
    values = torch.randn(size, size).to(torch.float8_e4m3fn)
    return Float8Weight(values, scale.view(size, size // block), (1, block))


def codes(size: int, end: int) -> Tensor:
    return torch.randint(0, end, (size, size), dtype=torch.uint8)


def exponents(count: int) -> Tensor:
    return torch.exp2(torch.randint(-8, 0, (count,)).float())


# By the names of the documentation: bytes of a weight in the file, and a matrix.
FORMATS: Mapping[str, tuple[float, Callable[[int], QuantizedWeight]]] = {
    "GPTQ, auto-round, int4 in groups of 128": (0.5 + 2.5 / 128, lambda n: affine(n, 4, 128)),
    "HQQ, 4 bits in groups of 64": (0.5 + 4 / 64, lambda n: affine(n, 4, 64, whole_zeros=False)),
    "MXFP4": (0.5 + 1 / 32, lambda n: four_bit_floats(n, 32, exponents(n * n // 32))),
    "NVFP4": (0.5 + 1 / 16, lambda n: four_bit_floats(n, 16, torch.rand(n * n // 16) + 0.1)),
    "int8 by rows": (1.0, lambda n: affine(n, 8, n)),
    "float8 by rows": (1.0, lambda n: float8(n, n, torch.rand(n) + 0.1)),
    "MXFP8": (1 + 1 / 32, lambda n: float8(n, 32, exponents(n * n // 32))),
}
DENSE = "bfloat16"


class Subject:
    """Copies of a matrix, multiplied in turn."""

    def __init__(self, ops: Ops, make: Callable[[int], QuantizedWeight] | None, size: int) -> None:
        dtype = torch.bfloat16
        self._ops, self._size, self._turn = ops, size, 0
        self._packed = [
            ops.pack_linear([torch.randn(size, size).to(dtype)], None)
            if make is None
            else ops.pack_quantized(make(size), None, dtype)
            for _ in range(COPIES)
        ]
        self.bytes_per_weight = self._packed[0].nbytes / size**2
        self.least = dict.fromkeys(ROWS, float("inf"))

    def run(self, x: Tensor) -> None:
        self._turn = (self._turn + 1) % COPIES
        start = time.perf_counter()
        self._ops.linear(x, self._packed[self._turn])
        self.least[len(x)] = min(self.least[len(x)], time.perf_counter() - start)


def measure(ops: Ops, size: int, rounds: int) -> dict[str, Subject]:
    makers = {DENSE: None, **{name: make for name, (_, make) in FORMATS.items()}}
    subjects = {name: Subject(ops, make, size) for name, make in makers.items()}
    inputs = [torch.randn(rows, size).to(torch.bfloat16) for rows in ROWS]
    for _ in range(rounds):
        for x in inputs:
            for subject in subjects.values():
                subject.run(x)
    return subjects


def as_table(subjects: Mapping[str, Subject]) -> str:
    heads = ["format", "bytes in the file", "in memory", *(f"{rows} rows, ms" for rows in ROWS)]
    lines = [heads, ["---"] * len(heads)]
    for name, subject in subjects.items():
        in_file = FORMATS[name][0] if name in FORMATS else 2.0
        times = (f"{subject.least[rows] * MILLI:.2f}" for rows in ROWS)
        lines.append([name, f"{in_file:.3f}", f"{subject.bytes_per_weight:.3f}", *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    ops = select_ops(torch.device("cpu"), "cpu", threads=options.threads)
    print(f"{machine()}, {options.threads} threads, [{options.size}, {options.size}]\n")
    print(as_table(measure(ops, options.size, options.rounds)))


if __name__ == "__main__":
    main()
