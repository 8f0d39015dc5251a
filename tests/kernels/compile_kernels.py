"""Compile every kernel for a GPU that is not there, and print what each takes of it: one JSON object a line.

    python compile_kernels.py 90

A process of its own, because Triton either interprets or compiles. It stands in for the CUDA driver: launches end after
compiling, so the operations run as ever, on CPU tensors, and compute nothing.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import kernels.triton
from kernels.ops import QUANTIZED_KV, AttentionMetadata, HeadShape, LoraSegments, LoraSlice, LoraWeights, QKNorm
from kernels.quantized import AffineWeight, Float8Weight, TableWeight

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUM_MULTIPROCESSORS = 132
DTYPE = torch.bfloat16


class Utils:
    """What Triton asks of the driver about the device and about each binary."""

    def get_device_properties(self, device):
        return {"max_shared_mem": math.inf, "multiprocessor_count": NUM_MULTIPROCESSORS}

    def load_binary(self, name, binary, shared, device):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        print(json.dumps({"kernel": name, "shared": shared, "registers": registers, "stack": stack}))
        return 1, 1, registers, 0, 1024  # module, function, registers, spills, threads at most


class Driver(DriverBase):
    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = Utils()
        self.launcher_cls = lambda source, metadata: lambda *args: None

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError


def attention(ops, shape, new, lengths, window=None, soft_cap=None, stored=DTYPE):
    cache = ops.allocate_kv(4, 16, shape, stored)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    tables, slots = torch.zeros(len(new), 4, dtype=torch.int32), torch.zeros(sum(new), dtype=torch.long)
    metadata = AttentionMetadata(starts, lens, tables, slots, max(new), max(lengths))
    q = torch.zeros(sum(new), shape.num_heads, shape.head_dim, dtype=DTYPE)
    ops.paged_attention(q, cache, metadata, 0.1, window, soft_cap)


def lora(ops, in_features, out_features, ranks, rows):
    table, part = ops.lora_table(in_features, out_features, 1), out_features // len(ranks)
    slices, total = [], 0
    for index, rank in enumerate(ranks):
        slices.append(LoraSlice(total, index * part, torch.zeros(part, rank, dtype=DTYPE)))
        total += rank
    affine = torch.zeros(2, out_features)
    table.put(0, ops.pack_lora(LoraWeights(torch.zeros(total, in_features, dtype=DTYPE), tuple(slices), affine)))
    segments = LoraSegments(((0, 0, rows),), *torch.tensor([[0], [0], [rows]], dtype=torch.int32))
    y, x = torch.zeros(rows, out_features, dtype=DTYPE), torch.zeros(rows, in_features, dtype=DTYPE)
    ops.segmented_lora(y, x, segments, table)


def quantised(ops, in_features, out_features, rows):
    """Four bits in groups with act-order, eight bits, nf4 and block fp8; few groups and many."""

    def ones(*shape):
        return torch.ones(shape)

    codes, order = torch.zeros(out_features, in_features, dtype=torch.uint8), torch.arange(in_features)
    wide, blocks = (in_features // 128, out_features), (out_features // 128, in_features // 128)
    for record in (
        AffineWeight(codes, 4, ones(*wide), ones(*wide), 128),
        AffineWeight(codes, 4, ones(*wide) * 0.3, ones(*wide), 128, order),
        AffineWeight(codes, 8, ones(1, out_features), ones(1, out_features), in_features),
        TableWeight(codes, torch.arange(16).float(), ones(codes.numel() // 64), 64),
        Float8Weight(codes.view(torch.float8_e4m3fn), ones(*blocks), (128, 128)),
    ):
        packed = ops.pack_quantized(record, torch.zeros(out_features, dtype=DTYPE), DTYPE)
        for count in rows:
            ops.linear(torch.zeros(count, in_features, dtype=DTYPE), packed)


def small(ops, shape, width):
    norm, x = QKNorm(torch.zeros(shape.head_dim), torch.zeros(shape.head_dim), 1e-6), torch.zeros(2, width, dtype=DTYPE)
    qkv = torch.zeros(2, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, dtype=DTYPE)
    cos_sin, positions = torch.zeros(4, 2, shape.head_dim // 2), torch.zeros(2, dtype=torch.long)
    for stored in (DTYPE, *QUANTIZED_KV):
        ops.rotary_store_kv(qkv, shape, norm, positions, cos_sin, ops.allocate_kv(4, 16, shape, stored), positions)
    ops.add_rms_norm(x, x.clone(), torch.zeros(width), 1e-6)
    ops.gelu_tanh_and_mul(x)


def main():
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    triton.knobs.runtime.interpret = True  # too late to interpret anything; it lets the operations take CPU tensors
    kernels.triton.INTERPRETED_MULTIPROCESSORS = NUM_MULTIPROCESSORS
    ops = kernels.triton.TritonOps(torch.device("cpu"))
    eight_billion, gemma = HeadShape(32, 8, 128), HeadShape(8, 4, 256)
    attention(ops, eight_billion, [1], [30000])
    attention(ops, eight_billion, [300], [900])
    attention(ops, gemma, [300], [900], 512, 50.0)
    attention(ops, gemma, [1], [9000], 512, 50.0)
    for stored in QUANTIZED_KV:
        attention(ops, eight_billion, [1], [30000], stored=stored)
        attention(ops, gemma, [300], [900], 512, 50.0, stored=stored)
    lora(ops, 4096, 6144, (16, 16, 16), 8)
    lora(ops, 4096, 28672, (64, 64), 2048)
    quantised(ops, 2048, 1024, (1, 300))
    small(ops, eight_billion, 8192)


if __name__ == "__main__":
    main()
