"""DoRA beside every kind of packed weight, on each backend that runs here, against its formula in float64."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapters.files.config import parse_config
from loraplex_adapters.runtime.binding import bind
from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_engine.layers.linear import Linear
from loraplex_kernels.ops import LoraSegments, Ops
from loraplex_kernels.quantized import AffineWeight, Float8Weight, QuantizedWeight, TableWeight, dequantize
from loraplex_kernels.selection import select_ops

C, N, START, R, SCALE = 100, 70, 30, 3, 2.0  # the adapted projection is rows START … N of the linear


def affine(random: torch.Generator, bits: int, group: int, ordered: bool = False) -> AffineWeight:
    groups, highest = -(-C // group), 1 << bits
    return AffineWeight(
        torch.randint(0, highest, (N, C), generator=random, dtype=torch.uint8),
        bits,
        (torch.rand(groups, N, generator=random) / highest + 0.01).half().float(),
        torch.randint(0, highest, (groups, N), generator=random).float(),
        group,
        torch.randperm(C, generator=random) if ordered else None,
    )


def table(random: torch.Generator, block: int) -> TableWeight:
    codes = torch.randint(0, 16, (N, C), generator=random, dtype=torch.uint8)
    return TableWeight(codes, torch.linspace(-1, 1, 16) ** 3, torch.rand(-(-N * C // block), generator=random), block)


def float8(random: torch.Generator, rows: int, columns: int) -> Float8Weight:
    codes = torch.randn(N, C, generator=random).to(torch.float8_e4m3fn)
    return Float8Weight(codes, torch.rand(-(-N // rows), -(-C // columns), generator=random) + 0.1, (rows, columns))


WEIGHTS: dict[str, Callable[[torch.Generator], QuantizedWeight | Tensor]] = {
    "dense": lambda random: torch.randn(N, C, generator=random),
    "2 bit": lambda random: affine(random, 2, 20),
    "3 bit": lambda random: affine(random, 3, 20),
    "4 bit": lambda random: affine(random, 4, 50),
    "8 bit": lambda random: affine(random, 8, C),
    "act-order, the last group short": lambda random: affine(random, 4, 32, ordered=True),
    "table": lambda random: table(random, 20),
    "table, blocks across rows": lambda random: table(random, 64),
    "float8 per channel": lambda random: float8(random, 1, C),
    "float8 blocks": lambda random: float8(random, 16, 32),
}


@pytest.fixture(params=["reference", "cpu", "triton"])
def ops(request: pytest.FixtureRequest) -> Ops:
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    try:
        return select_ops(torch.device(device), request.param)
    except ValueError as error:  # not installed here
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_dora_beside_a_packed_weight_is_its_formula(ops: Ops, kind: str) -> None:
    random = torch.Generator().manual_seed(5)
    weight = WEIGHTS[kind](random)
    dense = weight if isinstance(weight, Tensor) else dequantize(weight)
    bias, x = (torch.randn(*shape, generator=random) for shape in ((N,), (5, C)))
    a, b, noise = (torch.randn(*shape, generator=random) for shape in ((R, C), (N - START, R), (N - START,)))
    magnitude = noise.abs() + 0.5

    found = adapted(ops, weight, bias, {"lora_A": a, "lora_B": b, "lora_magnitude_vector": magnitude}, x)
    expected = x.double() @ dense.double().T + bias.double()
    changed = dense[START:].double() + SCALE * b.double() @ a.double()
    direction = changed / changed.norm(dim=1, keepdim=True)
    expected[2:, START:] = x[2:].double() @ (magnitude[:, None] * direction).T + bias[START:]
    # Sums of a hundred products in float32.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def on(device: torch.device, weight: QuantizedWeight) -> QuantizedWeight:
    moved: dict[str, Any] = {}
    for field in fields(weight):
        value = getattr(weight, field.name)
        moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
    return type(weight)(**moved)


def adapted(ops: Ops, weight: QuantizedWeight | Tensor, bias: Tensor, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a linear with a DoRA adapter makes of x, the first two rows of which are the base model's."""
    device = ops.device
    if isinstance(weight, Tensor):
        packed = ops.pack_linear([weight.to(device)], bias.to(device))
    else:
        packed = ops.pack_quantized(on(device, weight), bias.to(device), torch.float32)
    linear = Linear(ops, packed, bias.to(device))
    layer = LoRALinear(ops, linear, num_slots=1)
    config = parse_config(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": SCALE * R, "use_dora": True}).encode())
    targets = {"layers.0.k_proj": LoraTarget("0.qkv", C, START, N - START, base=linear)}
    tensors = {f"base_model.model.layers.0.k_proj.{part}.weight": tensor for part, tensor in parts.items()}
    adapter = bind(tensors, config, targets, torch.float32, max_rank=R)
    layer.table.put(0, ops.pack_lora(adapter.weights["0.qkv"]))
    rows = (0, 2, len(x))
    segments = LoraSegments((rows,), *(torch.tensor([number], dtype=torch.int32, device=device) for number in rows))
    return layer(x.to(device), segments).cpu()
