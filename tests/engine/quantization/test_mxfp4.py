"""MXFP4 as gpt-oss has it: each value, the model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.shard import WHOLE, Shard
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model, parse_model_config
from loraplex_engine.models.layout import tensor_shapes
from loraplex_engine.quantization.four_bit_floats import Mxfp4Layout
from loraplex_engine.quantization.spec import LinearShape
from loraplex_engine.ranks.exchange import Alone
from loraplex_kernels.quantized import dequantize
from loraplex_kernels.selection import select_ops
from tests.engine.quantization.checkpoints import logits

MODEL: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
TOKENS = torch.arange(3, 20)
EXPERTS = 3
LAYOUT = Mxfp4Layout("_blocks", "_scales", by_block=True)


def random_blocks(count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(rows)
    blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(120, 126, blocks.shape[:-1], generator=generator, dtype=torch.uint8)


def values(blocks: Tensor, scales: Tensor) -> Tensor:
    """→ [E, N, C], as the format's specification has it."""
    codes = torch.stack((blocks % 16, blocks // 16), dim=-1).flatten(-2).int()
    exponent, mantissa = codes // 2 % 4, codes % 2
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    found = torch.where(codes >= 8, -magnitude, magnitude) * 2.0 ** (scales.int().unsqueeze(-1) - 127)
    return found.flatten(-2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in MXFP4, and with experts in floats."""
    generator = Generator().manual_seed(1)
    shapes = tensor_shapes(parse_model_config(MODEL, "config.json"))
    dense = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    packed = dict(dense)
    for name, shape in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = random_blocks(EXPERTS, shape[2], shape[1])
            dense[name] = values(blocks, scales).transpose(1, 2).contiguous()
            del packed[name]
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    folder = tmp_path_factory.mktemp("gpt-oss")
    for path, tensors, raw in ((folder / "packed", packed, MODEL | MXFP4), (folder / "dense", dense, MODEL)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw))
        save_file(tensors, path / "model.safetensors")
    return folder / "packed", folder / "dense"


def load(path: Path, backend: str, shard: Shard = WHOLE) -> LanguageModel:
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    return load_model(EngineConfig(model=str(path), max_resident_adapters=2), path, ops, ranks=Alone(shard))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_model_in_mxfp4_is_the_one_of_its_values(models: tuple[Path, Path], backend: str) -> None:
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    packed, dense = (logits(load(path, backend), TOKENS, ops) for path in models)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part(models: tuple[Path, Path], rank: int) -> None:
    packed, dense = (load(path, "reference", Shard(rank, 2)).lora_targets() for path in models)
    experts = [path for path in packed if ".experts." in path]
    assert len(experts) == 2 * EXPERTS * 2
    for path in experts:
        ours, theirs = (targets[path].base for targets in (packed, dense))
        assert ours is not None
        assert theirs is not None
        end = packed[path].columns.stop
        assert torch.equal(ours.dequantize(0, end), theirs.dequantize(0, end))


def test_each_value_is_as_transformers_has_it() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_blocks(1, 8, 64)
    blocks.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    wanted = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].t()
    record = LAYOUT.read(LinearShape("x", 8, 64, count=1), {"_blocks": blocks[0], "_scales": scales[0]})
    assert torch.equal(dequantize(record), wanted)


def test_exponents_that_are_not_numbers_are_refused_by_the_tensor(models: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(models[0] / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].clone()
    tensors[name][2, 3, 0] = 255
    (tmp_path / "config.json").write_text((models[0] / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj_scales holds NaN"):
        load(tmp_path, "reference")


def test_widths_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="no multiple of 32"):
        LAYOUT.tensors(LinearShape("x", 8, 40, count=2))
