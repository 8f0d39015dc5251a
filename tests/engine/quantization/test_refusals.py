"""What cannot be read right is refused, and the message names the field or the tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.quantization import LinearShape, parse
from loraplex_engine.quantization.modules import MAX_PATTERN_CHARACTERS
from loraplex_kernels.quantized import dequantize
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import load, make_twins
from tests.engine.quantization.formats import (
    FORMATS,
    INTEGERS,
    auto_round,
    awq,
    bitsandbytes,
    compressed,
    gptq,
    hqq,
    modelopt,
    quark,
    torchao,
)

INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
PACKED = compressed("pack-quantized", **INT4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"quant_method": "exl3"},
            r"quant_method is 'exl3'; it must be one of gptq, awq, bitsandbytes, compr",
        ),
        ({"bits": 4}, "quant_method is missing"),
        (gptq(bits=5), "bits is 5; it must be one of 2, 3, 4, 8"),
        (gptq(bits=None), "bits is missing"),
        (gptq(group_size=0), "group_size is 0"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (gptq(format="bitblas"), "format is 'bitblas'"),
        (gptq(is_marlin_format=True), "is_marlin_format is True"),
        (gptq(pack_dtype="int16"), "pack_dtype is 'int16'"),
        (gptq(dynamic={"+:a": {"bits": 7}}), r"dynamic: \+:a: bits is 7"),
        (gptq(dynamic={"+:(": {"bits": 8}}), "regular expression"),
        (awq(bits=8), "bits is 8; it must be 4"),
        (awq(version="marlin"), "version is 'marlin'"),
        (awq(group_size=0), "group_size is 0"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is missing"),
        (bitsandbytes(bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type is 'int4'"),
        (bitsandbytes(bnb_4bit_quant_storage="int64"), "bnb_4bit_quant_storage is 'int64'"),
        (compressed("marlin-24", **INT4), "format is 'marlin-24'"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "group_size is missing; it must be 16"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="int"), "num_bits is 4"),
        (compressed("mxfp4-pack-quantized", num_bits=8, type="float"), "type is 'float of 8 bits'"),
        (compressed("pack-quantized", **{**INT4, "actorder": "group"}), "actorder is 'group'"),
        (compressed("pack-quantized", **{**INT4, "num_bits": 3}), "num_bits is 3"),
        (
            compressed("int-quantized", **{**INT4, "num_bits": 2}),
            "num_bits is 2; it must be 4 or 8 where the format is int",
        ),
        (compressed("pack-quantized", **{**INT4, "group_size": None}), "group_size is missing"),
        (compressed("float-quantized", **FP8, strategy="block"), "strategy is 'block'"),
        (compressed("float-quantized", **FP8, strategy="group"), "group_size is missing"),
        (
            compressed("int-quantized", num_bits=8, type="int", strategy="block", block_structure=[8, 8]),
            "strategy is 'bl",
        ),
        (compressed("int-quantized", num_bits=8, type="int", dynamic=True), "dynamic is True"),
        ({**PACKED, "config_groups": {}}, "config_groups is missing"),
        (
            auto_round("auto_round:mlx"),
            "packing_format is 'auto_round:mlx'; it must be one of auto_round, auto_round:au",
        ),
        (auto_round("autoround:gptq"), "packing_format is 'autoround:gptq'"),
        (auto_round("auto_round", data_type="mx_int"), "data_type is 'mx_int'; it must be int where packing_format is"),
        (auto_round("auto_round:llm_compressor"), "data_type is 'int of 4 bits'; it must be nv_fp"),
        (auto_round("auto_round", rotation_config={"type": "hadamard"}), "rotation_config is 'not empty'"),
        (auto_round("auto_round", extra_config={"(": {"bits": 8}}), r"extra_config: \( is .*regular expression"),
        (auto_round("auto_round", extra_config={"a": {"bits": 7}}), "extra_config: a: bits is 7"),
        (auto_round("auto_round:auto_awq", extra_config={"a": {"bits": 8}}), "bits is 8; it must be 4"),
        (modelopt("W4A16_AWQ"), "quant_algo is 'W4A16_AWQ'; it must be one of FP8, "),
        (modelopt("NVFP4", group_size=32), "group_size is 32; it must be 16 for NVFP4"),
        ({"quant_method": "modelopt"}, "quant_algo is missing"),
        (
            modelopt("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "NVFP4_AWQ"}}),
            "quantized_layers: a: quant_algo is 'NVFP4_AWQ'",
        ),
        (
            {**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config",
        ),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "quant_type is 'int4_weight_only'"),
        (torchao("UIntXWeightOnlyConfig"), "_type is 'UIntXWeightOnlyConfig'; it must be one of Int4WeightOnlyConfig"),
        (torchao("Int4WeightOnlyConfig", int4_packing_format="preshuffled"), "int4_packing_format is 'preshuffled'"),
        (torchao("Int4WeightOnlyConfig", int4_tile_packed_ntile=16), "int4_tile_packed_ntile is 16"),
        (torchao("IntxWeightOnlyConfig", weight_dtype="int7"), "weight_dtype is 'int7'"),
        (torchao("IntxWeightOnlyConfig", granularity={"_type": "PerBlock"}), "granularity is 'PerBlock'"),
        (torchao("Float8WeightOnlyConfig", weight_dtype="float8_e5m2"), "weight_dtype is 'float8_e5m2'"),
        (torchao("FqnToConfig", fqn_to_config={"re:(": {"_type": "Float8WeightOnlyConfig", "_version": 2}}), "regular"),
        (torchao("FqnToConfig"), "fqn_to_config is missing"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1}}},
            "_version is 1; it must be 2",
        ),
        ({"quant_method": "quark"}, "global_quant_config is missing"),
        (quark("int4", "per_group"), "dtype is 'int4 per_group'; it must be fp8_e4m3 per_tensor"),
        (quark("fp8_e4m3", "per_channel", ch_axis=1), "ch_axis is 1; it must be 0 where qscheme is per_channel"),
        (quark("fp4", "per_group", ch_axis=0), "ch_axis is 0; it must be 1 where qscheme is per_group"),
        (quark("fp4", "per_group", group_size=16, scale_format="e8m0"), "dtype is 'fp4 per_group'"),
        ({**quark("fp8_e4m3"), "export": {"weight_format": "fake_quantized"}}, "weight_format is 'fake_quantized'"),
        ({**quark("fp8_e4m3"), "algo_config": [{"name": "awq"}, {"name": "rotation"}]}, "algo_config is 'rotation'"),
        ({"quant_method": "hqq"}, "quant_config is missing"),
        (hqq(nbits=1), "nbits is 1; it must be one of 2, 3, 4, 8"),
        (hqq(axis=0), "axis is 0; it must be 1: groups across the outputs"),
        (hqq(view_as_float=True), "view_as_float is True"),
        (hqq({"nbits": 8}), "scale_quant_params is 'not empty'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 1 << 70]}, "two numbers from 1 to 65536: rows and columns"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme is 'none'"),
        (
            {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"},
            "quant_dtype is 'float8_e4m3fn'; it must be",
        ),
        ({**PACKED, "quant_method": "w8a8_int8"}, "config_groups is 'given'; it must be absent"),
    ],
)
def test_configuration(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse(ConfigFields(section, "config.json: quantization_config"))


def only(value: float, at: int = 0) -> Callable[[Tensor], Tensor]:
    """The tensor with one of its values replaced."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[at] = value
        return changed

    return change


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "suffix", "change", "message"),
    [
        ("gptq", ".scales", only(NAN), r"up_proj\.scales holds NaN"),
        ("gptq", ".scales", only(0.0), r"\.scales holds 0, and scales are positive"),
        ("gptq", ".scales", only(-1.0), r"\.scales holds -1"),
        ("gptq", ".qzeros", only(0), r"\.qzeros holds other zero points than 8, and sym is true"),
        ("gptq act-order", ".g_idx", only(4), r"\.g_idx names groups outside 0 … 3"),
        ("gptq act-order", ".g_idx", only(-1), r"\.g_idx names groups outside"),
        ("gptq act-order", ".g_idx", torch.zeros_like, r"\.g_idx does not divide the input features into groups of 32"),
        ("gptq with zero biases", ".bias", only(1.0), r"\.bias is not zero"),
        ("awq gemm", ".scales", only(float("inf")), r"\.scales holds NaN or Inf"),
        ("awq gemv_fast", ".qzeros", only(NAN), r"\.qzeros holds NaN"),
        ("bitsandbytes nf4", ".weight.absmax", only(NAN), r"\.weight\.absmax holds NaN"),
        (
            "bitsandbytes nf4",
            ".weight.absmax",
            lambda t: t[:-1],
            r"absmax has 63 values; 4096 weights in blocks of 64",
        ),
        ("bitsandbytes nf4", ".weight.quant_map", only(NAN), "quant_map holds NaN"),
        ("bitsandbytes nf4, nested", ".weight.nested_absmax", only(-1.0), "nested_absmax holds -1"),
        ("bitsandbytes nf4", ".weight.quant_state.bitsandbytes__nf4", only(0), "nf4 is not valid JSON"),
        ("bitsandbytes int8", ".SCB", only(NAN), r"\.SCB holds NaN"),
        ("bitsandbytes int8", ".weight_format", only(1), r"\.weight_format is 1, a layout of one GPU generation"),
        ("compressed-tensors int4", ".weight_shape", only(7), r"\.weight_shape is \[7, 128\]"),
        ("compressed-tensors int4", ".weight_scale", only(NAN), r"\.weight_scale holds NaN"),
        (
            "compressed-tensors int8 per tensor",
            ".weight_scale",
            lambda t: t.expand(3).clone(),
            r"\.weight_scale has 3 values: one, or 1 for each output feature",
        ),
        ("fp8 blocks", ".weight", lambda t: only(NAN)(t.float()).to(t.dtype), r"\.weight holds NaN"),
        ("fp8 blocks", ".weight_scale_inv", only(NAN), r"\.weight_scale_inv holds NaN"),
        ("compressed-tensors nvfp4", ".weight_scale", lambda t: only(NAN)(t.float()).to(t.dtype), "_scale holds NaN"),
        ("compressed-tensors nvfp4", ".weight_global_scale", only(0.0), r"\.weight_global_scale holds 0"),
        ("compressed-tensors nvfp4", ".weight_global_scale", only(1e-38), r"\.weight_scale holds NaN or Inf"),
        ("compressed-tensors nvfp4", ".weight_global_scale", lambda t: t.expand(3), "has 3 values"),
        ("compressed-tensors mxfp4", ".weight_scale", only(255), r"\.weight_scale holds NaN"),
        ("compressed-tensors mxfp8", ".weight_scale", only(255), r"\.weight_scale holds NaN"),
        ("hqq", ".scale", only(0.0), r"\.scale holds 0"),
        ("hqq", ".zero", only(NAN), r"\.zero holds NaN"),
        ("hqq", ".axis", lambda t: t - 1, r"\.axis is 0, config\.json makes it 1"),
        ("torchao int8", "._weight_scale", lambda t: t[:3], "_weight_scale has 3 values: one, or 1 for each output"),
        ("torchao int4 in bytes", "._weight_qdata", only(8), "_weight_qdata holds values outside -8 … 7"),
        ("torchao int4 in pairs", "._weight_zero_point", only(NAN), "_weight_zero_point holds NaN"),
        ("torchao int4 in tiles", "._weight_scale_and_zero", only(NAN), "_weight_scale_and_zero holds NaN"),
        ("torchao int4 in tiles", "._weight_scale_and_zero", only(NAN, 1), "_weight_scale_and_zero holds NaN"),
        ("torchao fp8", "._weight_scale", only(-1.0), "_weight_scale holds -1"),
        ("compressed-tensors int4 in bytes", ".weight", only(8), r"\.weight holds values outside -8 … 7"),
        ("fp8 per tensor", ".weight_scale_inv", lambda t: t.expand(3).clone(), r"has 3 values: one, or 32"),
        (
            "torchao fp8",
            "._weight_scale",
            lambda t: t.view(8, 4),
            r"32, one for each output feature, not \[8, 4\]",
        ),
        ("w8a8 per token", ".weight_scale", only(0.0), r"\.weight_scale holds 0, and scales are positive"),
        ("w8a8 per tensor", ".weight_scale", lambda t: t.expand(3).clone(), r"\.weight_scale has 3 values: one, or 32"),
        ("w8a8 per tensor", ".input_scale", only(NAN), r"\.input_scale holds NaN"),
        ("w8a8 per tensor", ".input_scale", only(-1.0), r"\.input_scale holds -1"),
        (
            "w8a8 per tensor",
            ".input_scale",
            lambda t: t.expand(2).clone(),
            r"\.input_scale has 2 values, and needs one",
        ),
        (
            "w8a8 per tensor, asymmetric",
            ".input_zero_point",
            lambda t: t.int() + 300,
            r"\.input_zero_point is 293, and",
        ),
        ("SmoothQuant of LMDeploy", ".scale", only(NAN), r"\.scale holds NaN"),
    ],
)
def test_values(name: str, suffix: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    section, packer = (FORMATS | INTEGERS)[name]
    linear = LinearShape("model.layers.0.mlp.up_proj", 32, 128)
    tensors, _ = packer(torch.Generator().manual_seed(2), 32, 128)
    tensors[suffix] = change(tensors[suffix])
    with pytest.raises(ModelError, match=message):
        parse(ConfigFields(section, "config.json")).read(linear, tensors)


@pytest.mark.parametrize(
    ("section", "packer"),
    [
        (gptq(group_size=1 << 70), packing.gptq(group=-1)),
        (compressed("int-quantized", **{**INT4, "num_bits": 8, "group_size": 1 << 70}), packing.ct_int8()),
    ],
)
def test_a_group_of_more_than_there_is_is_all_there_is(section: dict[str, Any], packer: packing.Packer) -> None:
    tensors, values = packer(torch.Generator().manual_seed(2), 32, 128)
    record = parse(ConfigFields(section, "config.json")).read(LinearShape("a", 32, 128), tensors)
    assert torch.equal(dequantize(record), values)


def test_a_quant_state_of_another_shape() -> None:
    section, packer = FORMATS["bitsandbytes nf4"]
    tensors, _ = packer(torch.Generator(), 32, 128)
    with pytest.raises(ModelError, match=r"bitsandbytes__nf4: shape is \[32, 128\]; it must be \[64, 64\]"):
        parse(ConfigFields(section, "config.json")).read(LinearShape("a", 64, 64), tensors)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gptq", (32, 36), "36 input features, no multiple of 8"),
        ("gptq 3 bit", (48, 64), "48 output features, no multiple of 32"),
        ("awq gemm", (12, 64), "12 output features, no multiple of 8"),
        ("awq gemm", (16, 48), "48 input features, no multiple of 32"),
        ("hqq", (16, 40), "40 input features, no multiple of 32"),
        ("hqq", (3, 32), "has 3 groups, no multiple of 2"),
        ("modelopt nvfp4", (16, 40), "40 input features, no multiple of 16"),
        ("modelopt mxfp4", (16, 48), "48 input features, no multiple of 32"),
        ("awq gemv_fast", (6, 64), "6 output features, no multiple of 4"),
    ],
)
def test_shapes_that_codes_cannot_be_packed_from(name: str, shape: tuple[int, int], message: str) -> None:
    spec = parse(ConfigFields(FORMATS[name][0], "config.json"))
    with pytest.raises(ModelError, match=message):
        spec.tensors(LinearShape("a", *shape))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}.scales": None}, rf"1 tensors missing: {UP}\.scales"),
        ({f"{UP}.qweight": None}, rf"missing: {UP}\.qweight"),
        ({f"{UP}.zeros": torch.zeros(1)}, rf"1 tensors unexpected: {UP}\.zeros"),
        ({f"{UP}.weight": torch.zeros(128, 64)}, rf"unexpected: {UP}\.weight"),
        ({f"{UP}.scales": torch.ones(4, 128)}, rf"{UP}\.scales is F32 \[4, 128\], not .* \[2, 128\]"),
        ({f"{UP}.qweight": torch.zeros(8, 128)}, rf"{UP}\.qweight is F32 \[8, 128\], not I32$|not I32"),
    ],
)
def test_tensors(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    twins.change(**changes)
    with pytest.raises(ModelError, match=message):
        load(twins.quantised)


def test_bits_that_the_tensors_contradict(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(bits=8), packing.gptq(bits=4))
    with pytest.raises(ModelError, match=r"qweight is I32 \[8, 64\], not I32 \[16, 64\]"):
        load(twins.quantised)


def test_damaged_values_name_the_checkpoint_and_the_tensor(tmp_path: Path) -> None:
    twins = make_twins(tmp_path, gptq(), packing.gptq())
    scales = load_file(twins.quantised / "model.safetensors")[f"{UP}.scales"]
    twins.change(**{f"{UP}.scales": only(NAN)(scales)})
    with pytest.raises(ModelError, match=rf"{twins.quantised}: {UP}\.scales holds NaN"):
        load(twins.quantised)


def test_a_module_that_no_group_targets(tmp_path: Path) -> None:
    section, packer = FORMATS["compressed-tensors int4"]
    group = {**section["config_groups"]["group_0"], "targets": ["re:.*attn.*"]}
    twins = make_twins(tmp_path, {**section, "config_groups": {"group_0": group}}, packer)
    with pytest.raises(ModelError, match=r"mlp.gate_proj is quantised, and no entry of config_groups"):
        load(twins.quantised)


SLOW = "(.|a)*[xy]"  # tried again and again, it would not end
FLOAT8 = {"_type": "Float8WeightOnlyConfig", "_version": 2}


@pytest.mark.parametrize(
    "section",
    [
        gptq(dynamic={f"+:{SLOW}": {"bits": 8}}),
        auto_round("auto_round", extra_config={SLOW: {"bits": 8}}),
        {**PACKED, "config_groups": {"a": {**PACKED["config_groups"]["group_0"], "targets": ["Linear", f"re:{SLOW}"]}}},
        torchao("FqnToConfig", fqn_to_config={f"re:{SLOW}": FLOAT8, "_default": FLOAT8}),
        {**quark("fp8_e4m3"), "layer_quant_config": {"*a" * 200: {"weight": {"dtype": "fp8_e4m3"}}}},
    ],
)
def test_hostile_patterns_are_matched_without_backtracking(section: dict[str, Any]) -> None:
    spec = parse(ConfigFields(section, "config.json"))
    assert spec.tensors(LinearShape("a" * 100, 64, 64))


def test_a_pattern_that_is_not_supported_is_named() -> None:
    with pytest.raises(ModelError, match=r"dynamic: \+:\(\?=a\)a is no pattern of module names: .*not supported"):
        parse(ConfigFields(gptq(dynamic={"+:(?=a)a": {"bits": 8}}), "config.json"))


def test_an_error_shows_the_beginning_of_what_is_long() -> None:
    long = "a" * 100_000
    with pytest.raises(ModelError) as raised:
        parse(ConfigFields(gptq(dynamic={long: {long: 1, "bits": long}}), "config.json"))
    assert len(str(raised.value)) < 2000


def test_more_patterns_than_are_read() -> None:
    dynamic = {f"+:{number:064}": {"bits": 8} for number in range(MAX_PATTERN_CHARACTERS // 64 + 1)}
    with pytest.raises(ModelError, match="dynamic: has patterns of module names of 65600 characters in all; at most"):
        parse(ConfigFields(gptq(dynamic=dynamic), "config.json"))


def test_a_zero_point_of_symmetric_inputs() -> None:
    section, packer = INTEGERS["w8a8 per tensor"]
    tensors, _ = packing.with_input_scale(packer, zero=5)(torch.Generator(), 32, 128)
    with pytest.raises(ModelError, match=r"\.input_zero_point is 5, though config.json says symmetric"):
        parse(ConfigFields(section, "config.json")).read(LinearShape("a", 32, 128), tensors)


def test_a_static_scale_that_is_missing(tmp_path: Path) -> None:
    section, _ = INTEGERS["w8a8 per tensor"]
    twins = make_twins(tmp_path, section, packing.ct_int8("tensor"))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.0\..*\.input_scale"):
        load(twins.quantised)


def test_more_inputs_than_a_sum_has_room_for() -> None:
    section, packer = INTEGERS["w8a8 per token"]
    tensors, _ = packer(torch.Generator(), 2, 65537)
    with pytest.raises(ModelError, match="a has 65537 input features; 32 bits hold the sums of 65536 products"):
        parse(ConfigFields(section, "config.json")).read(LinearShape("a", 2, 65537), tensors)


def test_zeros_of_minus_one_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    section, packer = FORMATS["gptq asymmetric, not GPTQModel's"]
    tensors, _ = packer(torch.Generator().manual_seed(5), 32, 128)
    spec = parse(ConfigFields(section, "config.json"))
    with caplog.at_level(logging.WARNING):
        spec.read(LinearShape("a.b", 32, 128), tensors)
    assert "a.b.qzeros holds zero points of 0, stored as -1" in caplog.text
