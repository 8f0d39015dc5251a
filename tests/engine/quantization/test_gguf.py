"""GGUF's blocks: their values to the last bit, and models made of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_adapters.files.gguf import TYPES
from loraplex_engine.checkpoint.gguf_blocks import READERS, dequantize_rows, record_of
from loraplex_engine.checkpoint.model_config import LinearScaling, ModelConfig, ModelError, YarnScaling
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model, read_model_config
from loraplex_kernels.ops import Ops
from loraplex_kernels.quantized import MinimumWeight, concatenate, dequantize
from loraplex_kernels.selection import select_ops
from tests.gguf_files import gguf, random_blocks, unpack, write_gguf
from tests.reference.test_model_logits import LENGTHS, Stepper, gemma3, llama, prompts, randomised

ROWS, BLOCKS = 6, 3


def stored(name: str) -> torch.Tensor:
    elements, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return torch.from_numpy(random_blocks(ROWS, BLOCKS * elements, gguf.GGMLQuantizationType[name]))


def test_sizes_and_numbers_are_those_of_the_format() -> None:
    for number, known in TYPES.items():
        kind = gguf.GGMLQuantizationType[known.name]
        assert (kind.value, *gguf.GGML_QUANT_SIZES[kind]) == (number, known.elements, known.nbytes)


@pytest.mark.parametrize("name", READERS)
def test_values_are_those_of_the_gguf_package_to_the_last_bit(name: str) -> None:
    rows = stored(name)
    expected = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(dequantize_rows(name, rows).numpy(), expected)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("name", READERS)
def test_products_are_those_of_the_values(name: str, kernels: str) -> None:
    ops = select_ops(torch.device("cpu"), kernels)
    record = record_of(name, stored(name))
    dense = dequantize(record)
    x = torch.randn(5, dense.shape[1], generator=torch.Generator().manual_seed(1))
    packed = ops.pack_quantized(record, None, torch.float32)
    assert_close(ops.linear(x, packed), x @ dense.t())
    assert_close(ops.dequantize(packed, 1, 4), dense[1:4])


# Bytes for each weight, as docs/quantization.md has them.
PACKED = {
    **{"Q4_0": 0.563, "IQ4_NL": 0.563, "Q4_1": 0.625, "Q5_0": 1.063, "Q5_1": 1.125, "Q8_0": 1.063, "Q2_K": 0.641},
    **{"Q3_K": 0.571, "Q4_K": 0.579, "Q5_K": 1.079, "Q6_K": 1.071, "IQ4_XS": 0.625, "MXFP4": 0.563},
}


@pytest.mark.parametrize("name", READERS)
def test_weights_stay_as_small_as_the_docs_say(name: str, cpu: Ops) -> None:
    kind = gguf.GGMLQuantizationType[name]
    rows = torch.from_numpy(random_blocks(256, 1024, kind))
    packed = cpu.pack_quantized(record_of(name, rows), None, torch.bfloat16)
    inputs = 4 * 1024  # a number for each input, whatever the rows
    room_ahead = 8 << 10  # that is prefetched
    assert packed.nbytes <= PACKED[name] * 256 * 1024 + inputs + room_ahead


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # float32 sums in another order, and zero points that are rounded once.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def test_a_group_without_a_scale_is_its_minimum(cpu: Ops) -> None:
    scale, minimum = torch.tensor([[0.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
    record = MinimumWeight(torch.full((2, 32), 9, dtype=torch.uint8), 4, scale, minimum, 32)
    packed = cpu.pack_quantized(record, None, torch.float32)
    assert torch.equal(cpu.dequantize(packed, 0, 2), dequantize(record))
    assert dequantize(record)[0, 0] == 3.0


def test_minimum_records_are_joined_where_they_are_alike() -> None:
    one, other = record_of("Q4_K", stored("Q4_K")), record_of("Q4_K", stored("Q4_K").flip(0))
    joined = concatenate([one, other])
    assert joined is not None
    assert torch.equal(dequantize(joined), torch.cat([dequantize(one), dequantize(other)]))
    assert concatenate([one, record_of("Q5_K", stored("Q5_K"))]) is None


@pytest.fixture
def cpu() -> Ops:
    return select_ops(torch.device("cpu"), "cpu")


@pytest.mark.parametrize("name", READERS)
def test_a_model_of_blocks_answers_as_the_dense_model_of_their_values(name: str, tmp_path: Path) -> None:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0]
    model = llama(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    packed, dense = tmp_path / "packed.gguf", tmp_path / "dense.gguf"
    write_gguf(packed, randomised(model), "llama", name)
    unpack(packed, dense, "llama")
    found = []
    for path in (packed, dense):
        ops = select_ops(torch.device("cpu"), "reference")
        loaded = load_model(EngineConfig(model=str(path), dtype="float32", max_model_len=64), path, ops)
        stepper = Stepper(loaded, prompts())
        stepper.step(*enumerate(LENGTHS))
        found.append(torch.cat(stepper.results()))
    assert_close(found[0], found[1])


def test_the_label_names_the_types(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), "llama", "Q8_0")
    ops = select_ops(torch.device("cpu"), "reference")
    assert load_model(EngineConfig(model=str(path)), path, ops).config.quantization == "gguf-Q8_0"


def test_rounding_what_is_rounded_already_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), "llama", "Q8_0")
    ops = select_ops(torch.device("cpu"), "reference")
    with pytest.raises(ModelError, match="quantised already"):
        load_model(EngineConfig(model=str(path), quantization="int8"), path, ops)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture not supported: mamba; the known ones are llama"):
        read_model_config(tmp_path / "model.gguf")


def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path: Path) -> None:
    model = llama()
    write_gguf(tmp_path / "model.gguf", model, "llama")
    data = (tmp_path / "model.gguf").read_bytes()
    place = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "model.gguf").write_bytes(data[:place] + (1 << 31).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(ModelError, match=r"block_count is 2147483648; it must be at most the \d+ tensors"):
        read_model_config(tmp_path / "model.gguf")


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "attention.key_length"])
def test_shapes_that_the_tensors_contradict_are_refused(key: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama(head_dim=8), "llama")
    data, name = (tmp_path / "model.gguf").read_bytes(), f"llama.{key}".encode()
    place = data.index(name + (4).to_bytes(4, "little")) + len(name) + 4
    (tmp_path / "model.gguf").write_bytes(data[:place] + (1 << 20).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        load_model(EngineConfig(model="x"), tmp_path / "model.gguf", select_ops(torch.device("cpu"), "reference"))


def test_a_split_model_is_read_from_all_its_parts(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, randomised(llama()), "llama")
    first = split(whole, tmp_path)
    ops = select_ops(torch.device("cpu"), "reference")
    config = EngineConfig(model=str(first), dtype="float32")
    one, other = (Stepper(load_model(config, path, ops), prompts()) for path in (whole, first))
    for stepper in (one, other):
        stepper.step(*enumerate(LENGTHS))
    assert torch.equal(torch.cat(one.results()), torch.cat(other.results()))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", llama(), "llama")
    first = split(tmp_path / "whole.gguf", tmp_path)
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.gguf: a part of the model, but not there"):
        read_model_config(first)


def split(whole: Path, directory: Path) -> Path:
    """All metadata and a half of the tensors in the first part, the others in the second."""
    reader = gguf.GGUFReader(whole)
    parts = [directory / f"model-0000{place}-of-00002.gguf" for place in (1, 2)]
    for place, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for key, field in reader.fields.items() if place == 0 else ():
            if key.startswith("llama."):
                writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in reader.tensors[place::2]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts[0]


def metadata_of(path: Path, family: str, model: Any, **entries: tuple[Any, str]) -> ModelConfig:
    """What is read of a file with further entries: each its value, and the writer's way to add it."""

    def add(writer: Any) -> None:
        for name, (value, kind) in entries.items():
            getattr(writer, f"add_{kind}")(f"{family}.{name}", value)

    write_gguf(path / "model.gguf", model, family, vocabulary=add)
    return read_model_config(path / "model.gguf")


@pytest.mark.parametrize("name", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_of_no_stated_type_is_linear(name: str, tmp_path: Path) -> None:
    config = metadata_of(tmp_path, "llama", llama(), **{name: (4.0, "float32")})
    rope = config.layers[0].rope
    assert rope is not None
    assert rope.scaling == LinearScaling(4.0)


@pytest.mark.parametrize(
    ("stated", "slides"),
    [
        ((3, "uint32"), [True, True, False, True, True, False]),
        (([False, True, True, True, True, True], "array"), [False, True, True, True, True, True]),
    ],
    ids=["of groups", "of each"],
)
def test_the_layers_with_windows_are_those_that_the_file_states(
    stated: tuple[Any, str], slides: list[bool], tmp_path: Path
) -> None:
    model = gemma3(num_hidden_layers=6)
    config = metadata_of(tmp_path, "gemma3", model, **{"attention.sliding_window_pattern": stated})
    assert [layer.window is not None for layer in config.layers] == slides


YARN = {
    "rope.scaling.type": ("yarn", "string"),
    "rope.scaling.factor": (4.0, "float32"),
    "rope.scaling.original_context_length": (16, "uint32"),
}


def test_a_factor_of_attention_that_is_what_yarn_makes_is_read(tmp_path: Path) -> None:
    stated = {"rope.scaling.attn_factor": (0.1 * math.log(4.0) + 1.0, "float32")}
    rope = metadata_of(tmp_path, "llama", llama(), **YARN, **stated).layers[0].rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnScaling)


@pytest.mark.parametrize(
    "entries",
    [
        {**YARN, "rope.scaling.attn_factor": (3.0, "float32")},
        {"rope.scaling.attn_factor": (3.0, "float32")},
        {"attention.causal": (False, "bool")},
        {"pooling_type": (1, "uint32")},
        {"attention.scale": (0.5, "float32")},
        {"rope.scaling.type": ("dynamic", "string")},
    ],
    ids=lambda entries: list(entries)[-1],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    entries: dict[str, tuple[Any, str]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"llama\.\*: {re.escape(list(entries)[-1])} is "):
        metadata_of(tmp_path, "llama", llama(), **entries)


@pytest.mark.parametrize("stated", [(-1, "int32"), ([True], "array")], ids=["negative", "short"])
def test_a_pattern_of_windows_that_makes_no_sense_is_refused(stated: tuple[Any, str], tmp_path: Path) -> None:
    name = "attention.sliding_window_pattern"
    with pytest.raises(ModelError, match=rf"{name} is .*; it must be a number of layers"):
        metadata_of(tmp_path, "gemma3", gemma3(num_hidden_layers=6), **{name: stated})
