"""Compile every kernel for a GPU that is not there, and print what each takes of it: one JSON object a line.

    python compile_kernels.py 90 bfloat16

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

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import loraplex_kernels.triton
from loraplex_kernels.draws import Draws, LogitChanges, Penalties, RowTokens, Watermarks
from loraplex_kernels.ops import (
    QUANTIZED_KV,
    AttentionMetadata,
    HeadShape,
    LoraSegments,
    LoraSlice,
    LoraWeights,
    QKNorm,
    Xielu,
)
from loraplex_kernels.quantized import AffineWeight, Float8Weight, InputRounding, IntegerWeight, TableWeight

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUM_MULTIPROCESSORS = 132


class Utils:
    """What Triton asks of the driver about the device and about each binary."""

    def get_device_properties(self, device):
        return {"max_shared_mem": math.inf, "multiprocessor_count": NUM_MULTIPROCESSORS}

    def load_binary(self, name, binary, shared, device):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command: list[str | Path] = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        [numbers] = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
        registers, stack, local = map(int, numbers)
        used = {"shared": shared, "registers": registers, "spilled": stack + local}
        print(json.dumps({"kernel": name} | used), flush=True)
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


class Launches:
    """Calls of the operations with activations of one type, such that every kernel is launched in every variant."""

    def __init__(self, ops, dtype):
        self.ops = ops
        self.dtype = dtype

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=self.dtype)

    def attention(self, shape, new, lengths, window=None, soft_cap=None, stored=None, sinks=None):
        cache = self.ops.allocate_kv(4, 16, shape, stored or self.dtype)
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        lens = torch.tensor(lengths, dtype=torch.int32)
        tables, slots = torch.zeros(len(new), 4, dtype=torch.int32), torch.zeros(sum(new), dtype=torch.long)
        metadata = AttentionMetadata(starts, lens, tables, slots, max(new), max(lengths))
        q = self.zeros(sum(new), shape.num_heads, shape.head_dim)
        self.ops.paged_attention(q, cache, metadata, 0.1, window, soft_cap, sinks)

    def lora(self, in_features, out_features, ranks, rows, num_segments=1):
        table, part = self.ops.lora_table(in_features, out_features, 1), out_features // len(ranks)
        slices, total = [], 0
        for index, rank in enumerate(ranks):
            slices.append(LoraSlice(total, index * part, self.zeros(part, rank)))
            total += rank
        affine = torch.zeros(2, out_features)
        table.put(0, self.ops.pack_lora(LoraWeights(self.zeros(total, in_features), tuple(slices), affine)))
        each = rows // num_segments
        ranges = tuple((0, first, first + each) for first in range(0, rows, each))
        segments = LoraSegments(ranges, *torch.tensor(ranges, dtype=torch.int32).T.contiguous())
        self.ops.segmented_lora(self.zeros(rows, out_features), self.zeros(rows, in_features), segments, table)

    def quantised(self, in_features, out_features, rows):
        """Four bits in groups, with act-order, eight bits, nf4 and block fp8; few groups and many; with bias or not."""
        codes, order = torch.zeros(out_features, in_features, dtype=torch.uint8), torch.arange(in_features)
        wide, blocks = (in_features // 128, out_features), (out_features // 128, in_features // 128)
        narrow = torch.ones(in_features // 24 + 1, out_features)  # a step crosses the ends of such groups
        records = (
            AffineWeight(codes, 4, torch.ones(wide), torch.ones(wide), 128),
            AffineWeight(codes, 4, torch.ones(wide) * 0.3, torch.ones(wide), 128, order),
            AffineWeight(codes, 4, narrow, narrow, 24),
            AffineWeight(codes, 8, torch.ones(1, out_features), torch.ones(1, out_features), in_features),
            TableWeight(codes, torch.arange(16).float(), torch.ones(codes.numel() // 64), 64),
            Float8Weight(codes.view(torch.float8_e4m3fn), torch.ones(blocks), (128, 128)),
        )
        for index, record in enumerate(records):
            packed = self.ops.pack_quantized(record, self.zeros(out_features) if index % 2 else None, self.dtype)
            for count in rows:
                self.ops.linear(self.zeros(count, in_features), packed)

    def integers(self, in_features, out_features, rows):
        """Inputs rounded in each way; few rows and many; with bias or not."""
        codes, scale = torch.zeros(out_features, in_features, dtype=torch.int8), torch.ones(out_features)
        for index, rounding in enumerate((InputRounding(), InputRounding(False), InputRounding(False, 0.1, 3))):
            bias = self.zeros(out_features) if index else None
            packed = self.ops.pack_quantized(IntegerWeight(codes, scale, rounding), bias, self.dtype)
            for count in rows:
                self.ops.linear(self.zeros(count, in_features), packed)

    def experts(self, in_features, out_features, rows, bias=False):
        bias = self.zeros(out_features) if bias else None
        linears = [self.ops.pack_linear([self.zeros(out_features, in_features)], bias) for _ in range(2)]
        starts = torch.tensor([0, rows // 2, rows])
        self.ops.grouped_linear(self.zeros(rows, in_features), starts, self.ops.group_linears(linears))

    def small(self, shape, width):
        weight = torch.zeros(shape.head_dim)
        qkv = self.zeros(2, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        positions = torch.zeros(2, dtype=torch.long)
        whole, part = torch.zeros(4, 2, shape.head_dim // 2), torch.zeros(4, 2, shape.head_dim // 4)
        for stored in (self.dtype, *QUANTIZED_KV):
            cache = self.ops.allocate_kv(4, 16, shape, stored)
            for norm in (None, QKNorm(weight, weight, 1e-6)):
                self.ops.rotary_store_kv(qkv, shape, norm, positions, whole, cache, positions)
                self.ops.rotary_store_kv(qkv, shape, norm, positions, part, cache, positions, True)
        x = self.zeros(2, width)
        self.ops.rms_norm(x, torch.zeros(width), 1e-6)
        self.ops.add_rms_norm(x, x.clone(), torch.zeros(width), 1e-6)
        self.ops.layer_norm(x, torch.zeros(width), torch.zeros(width), 1e-6)
        self.ops.gelu_tanh(x)
        self.ops.xielu(x, Xielu(0.9, 1.3, 0.5, -1e-6))
        self.ops.silu_and_mul(x)
        self.ops.gelu_tanh_and_mul(x)

    def sampling(self, rows, vocab_size):
        tokens = RowTokens.of(range(rows), [np.arange(3000)] * rows)
        assert tokens is not None
        ones, whole = np.ones(rows), np.arange(rows)
        marks = Watermarks(whole, whole.astype(np.uint64), ones, ones.astype(np.float32))
        penalties = Penalties(tokens, tokens.token_ids, ones, ones, ones)
        added = np.ones(len(tokens.token_ids), dtype=np.float32)
        changes = LogitChanges(whole + 9, penalties, tokens, added, tokens, tokens, marks)
        logits, draws = (
            torch.zeros(rows, vocab_size),
            Draws(ones, whole, ones, ones, ones, whole.astype(np.uint64), whole),
        )
        self.ops.adjust_logits(logits, changes)
        self.ops.draw_tokens(logits, draws)
        self.ops.cut_logits(logits, draws)

    def all(self):
        eight_billion, gemma, tiny = HeadShape(32, 8, 128), HeadShape(8, 4, 256), HeadShape(2, 2, 8)
        for stored in (self.dtype, *QUANTIZED_KV):
            self.attention(eight_billion, [1], [30000], stored=stored)
            self.attention(eight_billion, [300], [900], stored=stored)
            self.attention(gemma, [1], [9000], 512, 50.0, stored=stored)
            self.attention(gemma, [300], [900], 512, 50.0, stored=stored)
        self.attention(HeadShape(14, 2, 64), [1] * 2000, [200] * 2000)  # of one chunk each
        sinks = torch.zeros(14)
        for new, lengths in (([1], [3000]), ([1] * 64, [900] * 64), ([300], [900])):
            self.attention(HeadShape(14, 2, 64), new, lengths, 128, sinks=sinks)
        self.attention(tiny, [1], [40])
        self.attention(tiny, [30], [40])
        self.lora(4096, 6144, (16, 16, 16), 8)
        self.lora(4096, 28672, (64, 64), 2048)
        self.lora(4096, 4097, (256,), 200)
        self.lora(4096, 6144, (16, 16, 16), 8192, num_segments=4096)
        self.quantised(2048, 1024, (1, 300))
        self.integers(2048, 1024, (1, 300))
        self.experts(2048, 1536, 16)
        self.experts(768, 2048, 400, bias=True)
        self.small(eight_billion, 8192)
        if self.dtype == torch.bfloat16:  # logits are always float32
            self.sampling(2, 128256)


def main():
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    triton.knobs.runtime.interpret = True  # too late to interpret anything; it lets the operations take CPU tensors
    loraplex_kernels.triton.INTERPRETED_MULTIPROCESSORS = NUM_MULTIPROCESSORS
    ops = loraplex_kernels.triton.TritonOps(torch.device("cpu"))
    Launches(ops, getattr(torch, sys.argv[2])).all()


if __name__ == "__main__":
    main()
