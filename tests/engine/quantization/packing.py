"""Random quantised linears as each package writes them, and the weights that they stand for: slow and obvious.

A packer returns the tensors by what follows the module's path, and the float32 weights [N, C], which are exact: a code,
its zero and its scale have so few bits that only their product is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

Packer = Callable[[Generator, int, int], tuple[dict[str, Tensor], Tensor]]
INTEGERS = {32: torch.int32, 16: torch.int16, 8: torch.uint8}
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Iterable[int], bits: int, word_bits: int = 32) -> list[int]:
    """One number, the first code in its lowest bits, cut into words: unsigned."""
    whole, count = 0, 0
    for code in codes:
        whole |= int(code) << (bits * count)
        count += 1
    return [whole >> shift & ((1 << word_bits) - 1) for shift in range(0, bits * count, word_bits)]


def packed_rows(codes: Tensor, bits: int, word_bits: int = 32) -> Tensor:
    """[rows, columns] → signed words [rows, columns · bits / word_bits]"""
    return signed([words(row, bits, word_bits) for row in codes.tolist()], word_bits)


def signed(rows: list[list[int]], word_bits: int = 32) -> Tensor:
    wrapped = torch.tensor(rows, dtype=torch.int64)
    if word_bits == 8:
        return wrapped.to(torch.uint8)
    half = 1 << (word_bits - 1)
    return ((wrapped + half) % (2 * half) - half).to(INTEGERS[word_bits])


@dataclass
class Affine:
    """Random codes [N, C] in groups, their 16-bit scales [G, N] and whole zeros [G, N]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    groups: Tensor  # [C]: of each column

    @classmethod
    def random(
        cls, generator: Generator, n: int, c: int, bits: int, group: int, middle: bool = False, shuffled: bool = False
    ) -> Affine:
        highest, num_groups = (1 << bits) - 1, -(-c // group)
        zero = torch.randint(0, highest + 1, (num_groups, n), generator=generator)
        groups = torch.arange(c) // group
        return cls(
            torch.randint(0, highest + 1, (n, c), generator=generator),
            (torch.rand(num_groups, n, generator=generator) / highest + 0.01).half(),
            torch.full_like(zero, 1 << (bits - 1)) if middle else zero,
            groups[torch.randperm(c, generator=generator)] if shuffled else groups,
        )

    def dense(self) -> Tensor:
        scale, zero = self.scale.float()[self.groups].T, self.zero[self.groups].T
        return (scale * (self.codes - zero).float()).contiguous()


def gptq(
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    act_order: bool = False,
    version: int = 1,
    borrowing: bool = False,
    old_bias: bool = False,
) -> Packer:
    """borrowing: take 1 from all zeros of a word at once, as GPTQModel does, and not from each by itself."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        size = c if group == -1 else group
        affine = Affine.random(generator, n, c, bits, size, middle=sym, shuffled=act_order)
        mask = (1 << bits) - 1
        if version == 2:
            qzeros = packed_rows(affine.zero, bits)
        elif borrowing:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            rows = [[(word - ones) % (1 << 32) for word in words(row, bits)] for row in affine.zero.tolist()]
            qzeros = signed(rows)
        else:
            qzeros = packed_rows((affine.zero - 1) & mask, bits)
        tensors = {
            ".qweight": packed_rows(affine.codes, bits).T.contiguous(),
            ".qzeros": qzeros,
            ".scales": affine.scale,
            ".g_idx": affine.groups.int(),
        }
        return tensors | ({".bias": torch.zeros(n).half()} if old_bias else {}), affine.dense()

    return pack


def awq_gemm(group: int = 32) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, 4, group)

        def columns(codes: Tensor) -> Tensor:
            """[rows, N] → [rows, N / 8]"""
            return packed_rows(codes.view(len(codes), -1, 8)[..., list(GEMM_ORDER)].flatten(1), 4)

        return {
            ".qweight": columns(affine.codes.T),
            ".qzeros": columns(affine.zero),
            ".scales": affine.scale,
        }, affine.dense()

    return pack


def awq_gemv(group: int = 64) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, 4, group)
        room = padded_groups(len(affine.zero), group)
        zero, scale = torch.zeros(n, room, dtype=torch.int64), torch.zeros(n, room).half()
        zero[:, : len(affine.zero)], scale[:, : len(affine.zero)] = affine.zero.T, affine.scale.T
        return {
            ".qweight": packed_rows(affine.codes, 4),
            ".qzeros": packed_rows(zero, 4),
            ".scales": scale,
        }, affine.dense()

    return pack


def awq_gemv_fast(group: int = 64) -> Packer:
    """Zeros are stored as −zero · scale in 16 bits, so the weights are not exact multiples of the scale."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, 4, group)
        room = padded_groups(len(affine.zero), group)
        nibbles = torch.zeros(n // 4, c * 4, dtype=torch.int64)
        for row in range(n):
            for column in range(c):
                a, b, d = column % 32 // 8, column % 8 // 2, column % 2
                turned = 8 * b + 2 * a + d  # pairs in turn from each eight of thirty-two
                f, h = turned % 8 // 2, turned % 2
                place = column % 64 // 32 * 32 + turned // 8 * 8 + 4 * h + f  # even ones of each eight first
                nibbles[row // 4, column // 64 * 256 + row % 4 * 64 + place] = affine.codes[row, column]
        scale, offset = torch.zeros(room, n).half(), torch.zeros(room, n).half()
        scale[: len(affine.zero)] = affine.scale
        offset[: len(affine.zero)] = -(affine.zero * affine.scale.float()).half()
        tensors = {".qweight": packed_rows(nibbles, 4, 16), ".qzeros": offset, ".scales": scale}
        columns = affine.groups
        return tensors, affine.codes * scale.float()[columns].T + offset.float()[columns].T

    return pack


def padded_groups(groups: int, group: int) -> int:
    multiple = {128: 1, 64: 2, 32: 4}[min(group, 128)]
    in_words = -(-groups // 8)
    return -(-in_words // multiple) * multiple * 8


def bnb_4bit(kind: str = "nf4", nested: bool = False, block: int = 64, storage: torch.dtype = torch.uint8) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        codes = torch.randint(0, 16, (n * c,), generator=generator)
        table = torch.randn(16, generator=generator) / 3
        num_blocks = -(-n * c // block)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, c]}
        absmax = torch.rand(num_blocks, generator=generator)
        tensors: dict[str, Tensor] = {}
        stored = absmax
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            stored = torch.randint(0, 256, (num_blocks,), generator=generator).to(torch.uint8)
            maxima = torch.rand(-(-num_blocks // 256), generator=generator)
            values = torch.rand(256, generator=generator) / 2
            absmax = torch.stack([values[code] * maxima[i // 256] + 0.25 for i, code in enumerate(stored.tolist())])
            tensors |= {".weight.nested_absmax": maxima, ".weight.nested_quant_map": values}
        pairs = [first << 4 | second for first, second in codes.view(-1, 2).tolist()]
        tensors |= {
            ".weight": torch.tensor(pairs, dtype=torch.uint8).view(storage).view(-1, 1),
            ".weight.absmax": stored,
            ".weight.quant_map": table,
            f".weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode())).to(torch.uint8),
        }
        dense = torch.stack([table[code] * absmax[i // block] for i, code in enumerate(codes.tolist())])
        return tensors, dense.view(n, c)

    return pack


def bnb_int8(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
    weight = torch.randint(-127, 128, (n, c), generator=generator).to(torch.int8)
    maxima = torch.rand(n, generator=generator)
    tensors = {".weight": weight, ".SCB": maxima, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, (maxima / 127).unsqueeze(1) * weight.float()


def ct_packed(bits: int = 4, group: int | None = 32, symmetric: bool = True) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, bits, group or c, middle=symmetric)
        tensors = {
            ".weight_packed": packed_rows(affine.codes, bits),
            ".weight_scale": affine.scale.T.contiguous(),
            ".weight_shape": torch.tensor([n, c]),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = packed_rows(affine.zero.T.contiguous().T, bits).T.contiguous()
        return tensors, affine.dense()

    return pack


def ct_int8(strategy: str = "channel", symmetric: bool = True) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randint(-128, 128, (n, c), generator=generator).to(torch.int8)
        shape = {"channel": (n, 1), "tensor": (1,), "group": (n, c // 32)}[strategy]
        scale = torch.rand(shape, generator=generator) / 127 + 1e-3
        zero = torch.randint(-20, 20, shape, generator=generator).to(torch.int8)
        spread = 32 if strategy == "group" else 1
        by_column = scale.repeat_interleave(spread, -1)
        dense = by_column * weight.float()
        tensors = {".weight": weight, ".weight_scale": scale}
        if not symmetric:
            dense = by_column * (weight.float() - zero.float().repeat_interleave(spread, -1))
            tensors[".weight_zero_point"] = zero
        return tensors, dense

    return pack


def with_input_scale(packer: Packer, zero: int | None = None) -> Packer:
    """The same with what inputs are rounded by."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dense = packer(generator, n, c)
        tensors[".input_scale"] = torch.tensor([0.03125])
        if zero is not None:
            tensors[".input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
        return tensors, dense

    return pack


def smooth_quant(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
    tensors, dense = ct_int8()(generator, n, c)
    return {".weight": tensors[".weight"], ".scale": tensors[".weight_scale"]}, dense


def float8(
    scale_name: str = ".weight_scale_inv", block: tuple[int, int] | None = None, per_row: bool = False
) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(n, c, generator=generator).to(torch.float8_e4m3fn)
        rows, columns = block or ((1, c) if per_row else (n, c))
        scale = torch.rand(-(-n // rows), -(-c // columns), generator=generator) + 0.1
        spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :c]
        stored = scale if block or per_row else scale.view(())
        return {".weight": weight, scale_name: stored}, weight.float() * spread

    return pack


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def mxfp4(codes: str = ".weight_packed", scale: str = ".weight_scale") -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        numbers = torch.randint(0, 16, (n, c), generator=generator)
        exponents = torch.randint(120, 126, (n, c // 32), generator=generator).to(torch.uint8)
        powers = torch.tensor([[2.0 ** (each - 127) for each in row] for row in exponents.tolist()])
        dense = torch.tensor(E2M1)[numbers] * powers.repeat_interleave(32, 1)
        return {codes: packed_rows(numbers, 4, 8), scale: exponents}, dense

    return pack


def nvfp4(codes: str = ".weight_packed", whole: str = ".weight_global_scale", divides: bool = True) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        numbers = torch.randint(0, 16, (n, c), generator=generator)
        scale = (torch.rand(n, c // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
        of_all = torch.rand(1, generator=generator) * 3000 + 500
        if not divides:
            of_all = (1 / of_all).reshape(())
        scales = scale.float() / of_all if divides else scale.float() * of_all
        dense = torch.tensor(E2M1)[numbers] * scales.repeat_interleave(16, 1)
        tensors = {codes: packed_rows(numbers, 4, 8), ".weight_scale": scale, whole: of_all}
        return tensors, dense

    return pack


def mxfp8(scale: str = ".weight_scale") -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(n, c, generator=generator).to(torch.float8_e4m3fn)
        exponents = torch.randint(120, 126, (n, c // 32), generator=generator).to(torch.uint8)
        powers = torch.tensor([[2.0 ** (each - 127) for each in row] for row in exponents.tolist()])
        return {".weight": weight, scale: exponents}, weight.float() * powers.repeat_interleave(32, 1)

    return pack


def ct_int4_in_bytes(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
    affine = Affine.random(generator, n, c, 4, 32, middle=True)
    tensors = {".weight": (affine.codes - 8).to(torch.int8), ".weight_scale": affine.scale.T.contiguous()}
    return tensors, affine.dense()


def without(packer: Packer, *suffixes: str) -> Packer:
    """The same without tensors that another writer leaves out."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dense = packer(generator, n, c)
        return {suffix: tensor for suffix, tensor in tensors.items() if suffix not in suffixes}, dense

    return pack


def torchao_bytes(bits: int = 8, group: int | None = None, zeros: bool = True) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, bits, group or c)
        middle = 1 << (bits - 1)
        tensors = {
            "._weight_qdata": (affine.codes - middle).to(torch.int8),
            "._weight_scale": affine.scale.T.contiguous(),
            "._weight_zero_point": (affine.zero.T - middle).to(torch.int8).contiguous(),
        }
        if zeros:
            return tensors, affine.dense()
        del tensors["._weight_zero_point"]
        affine.zero.fill_(middle)
        return tensors, affine.dense()

    return pack


def torchao_pairs(group: int = 32) -> Packer:
    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine, zero = Affine.random(generator, n, c, 4, group), torch.randn(c // group, n, generator=generator).half()
        values = affine.codes - 8
        bytes_ = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
        tensors = {
            "._weight_qdata": bytes_.to(torch.int8),
            "._weight_scale": affine.scale,
            "._weight_zero_point": zero,
        }
        groups = affine.groups
        return tensors, (affine.scale.float()[groups].T * values + zero.float()[groups].T).contiguous()

    return pack


def torchao_tiles(group: int = 32) -> Packer:
    """As tinygemm's kernel for CUDA reads them: what each of 32 lanes has of a tile, one word after the other."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = -(-n // 8) * 8, -(-c // 1024) * 1024
        affine = Affine.random(generator, rows, columns, 4, group)
        zero = torch.randn(columns // group, rows, generator=generator).half()
        lane, word = torch.arange(32)[:, None, None], torch.arange(4)[:, None]
        places = word * 32 + lane % 4 * 2 + torch.tensor([0, 8, 16, 24, 1, 9, 17, 25])  # [lanes, words, codes]
        tiles = affine.codes.view(rows // 8, 8, columns // 128, 128)
        held = tiles[:, lane // 4, :, places].permute(3, 4, 0, 1, 2)  # [tiles, tiles, lanes, words, codes]
        packed = (held << 4 * torch.arange(8)).sum(-1).to(torch.uint32).view(torch.int32)
        tensors = {"._weight_qdata": packed, "._weight_scale_and_zero": torch.stack((affine.scale, zero), dim=-1)}
        groups = affine.groups
        dense = affine.scale.float()[groups].T * (affine.codes - 8) + zero.float()[groups].T
        return tensors, dense[:n, :c].contiguous()

    return pack


def torchao_float8(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
    tensors, dense = float8(".scale", per_row=True)(generator, n, c)
    return {"._weight_qdata": tensors[".weight"], "._weight_scale": tensors[".scale"]}, dense


def hqq(bits: int = 4, group: int = 32) -> Packer:
    """A byte, or 30 bits of a word, hold codes of groups that lie apart: of the first part in the high bits."""

    def pack(generator: Generator, n: int, c: int) -> tuple[dict[str, Tensor], Tensor]:
        affine = Affine.random(generator, n, c, bits, group)
        zero = (torch.rand(affine.scale.shape, generator=generator) * (1 << bits)).half()
        held, groups = {2: 4, 3: 10, 4: 2, 8: 1}[bits], affine.codes.view(-1, group)
        rows = -(-len(groups) // held)
        packed = torch.zeros(rows, group, dtype=torch.int64)
        for place, row in enumerate(groups):
            packed[place % rows] |= row << bits * (held - 1 - place // rows)
        tensors = {
            ".W_q": packed.to(torch.int32 if bits == 3 else torch.uint8),
            ".scale": affine.scale.T.reshape(-1, 1),
            ".zero": zero.T.reshape(-1, 1),
            ".shape": torch.tensor([n, c]),
            ".axis": torch.tensor(1, dtype=torch.int32),
            ".packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
        }
        scale, zeros = affine.scale.float()[affine.groups].T, zero.float()[affine.groups].T
        return tensors, (scale * (affine.codes - zeros)).contiguous()

    return pack
