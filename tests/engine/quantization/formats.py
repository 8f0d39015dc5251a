"""Every format that loads: what its config.json states, and a packer of its tensors."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.quantization import packing
from tests.engine.quantization.packing import Packer

GPTQMODEL = {"quantizer": ["gptqmodel:7.6.0"]}


def gptq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **fields}


def awq(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **fields}


def bitsandbytes(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **fields}


def compressed(name: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def auto_round(packing: str, **fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        **fields,
    }


def modelopt(algorithm: str, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **fields}


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


def per_group(size: int) -> dict[str, Any]:
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


def hqq(scales: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    weights = {"nbits": 4, "group_size": 32, "axis": 1, "view_as_float": False, **weights}
    return {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": weights, "scale_quant_params": scales, "zero_quant_params": None},
        "skip_modules": ["lm_head"],
    }


def quark(dtype: str, scheme: str = "per_tensor", **weight: Any) -> dict[str, Any]:
    weights = {"dtype": dtype, "qscheme": scheme, "is_dynamic": False, "ch_axis": -1, **weight}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weights, "input_tensors": {"dtype": dtype, "is_dynamic": True}},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
    }


FOUR_BITS: dict[str, Any] = {"num_bits": 4, "type": "float"}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq": (gptq(), packing.gptq()),
    "gptq 2 bit": (gptq(bits=2), packing.gptq(bits=2)),
    "gptq 3 bit": (gptq(bits=3, sym=False, meta=GPTQMODEL), packing.gptq(bits=3, sym=False)),
    "gptq 8 bit": (gptq(bits=8, meta=GPTQMODEL), packing.gptq(bits=8, borrowing=True)),
    "gptq whole columns": (gptq(group_size=-1), packing.gptq(group=-1)),
    "gptq act-order": (gptq(desc_act=True), packing.gptq(act_order=True)),
    "gptq asymmetric": (gptq(sym=False, meta=GPTQMODEL), packing.gptq(sym=False, borrowing=True)),
    "gptq asymmetric, not GPTQModel's": (gptq(sym=False), packing.gptq(sym=False)),
    "gptq v2": (gptq(sym=False, checkpoint_format="gptq_v2"), packing.gptq(sym=False, version=2)),
    "gptq with zero biases": (gptq(), packing.gptq(old_bias=True)),
    "awq gemm": (awq(), packing.awq_gemm()),
    "awq gemv": (awq(version="gemv", group_size=64), packing.awq_gemv()),
    "awq gemv_fast": (awq(version="gemv_fast", group_size=64), packing.awq_gemv_fast()),
    "awq as GPTQModel states it": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemm"},
        packing.awq_gemm(),
    ),
    "bitsandbytes nf4": (bitsandbytes(), packing.bnb_4bit()),
    "bitsandbytes fp4": (bitsandbytes(bnb_4bit_quant_type="fp4"), packing.bnb_4bit("fp4")),
    "bitsandbytes nf4, nested": (bitsandbytes(bnb_4bit_use_double_quant=True), packing.bnb_4bit(nested=True)),
    "bitsandbytes nf4, blocks of 128": (bitsandbytes(), packing.bnb_4bit(block=128)),
    "bitsandbytes nf4, stored as bfloat16": (
        bitsandbytes(bnb_4bit_quant_storage="bfloat16"),
        packing.bnb_4bit(storage=torch.bfloat16),
    ),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, packing.bnb_int8),
    "compressed-tensors int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        packing.ct_packed(),
    ),
    "compressed-tensors int4, asymmetric": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        packing.ct_packed(symmetric=False),
    ),
    "compressed-tensors packed int8 per channel": (
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        packing.ct_packed(8, None),
    ),
    "compressed-tensors int8": (
        compressed("int-quantized", {"num_bits": 8, "dynamic": True}, num_bits=8, type="int", strategy="channel"),
        packing.ct_int8(),
    ),
    "compressed-tensors int8 per tensor": (
        compressed("naive-quantized", num_bits=8, type="int", strategy="tensor"),
        packing.ct_int8("tensor"),
    ),
    "compressed-tensors int8 groups, asymmetric": (
        compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=False),
        packing.ct_int8("group", symmetric=False),
    ),
    "compressed-tensors fp8": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        packing.float8(".weight_scale", per_row=True),
    ),
    "compressed-tensors fp8 blocks": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
        packing.float8(".weight_scale", block=(16, 32)),
    ),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, packing.float8(block=(16, 32))),
    "fp8 blocks cut at the edges": (
        {"quant_method": "fp8", "weight_block_size": [48, 48]},
        packing.float8(block=(48, 48)),
    ),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, packing.float8()),
    "fp8 per tensor, vLLM's names": ({"quant_method": "fp8"}, packing.float8(".weight_scale")),
    "fp8 by rows, Meta's": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        packing.float8(".weight_scale", per_row=True),
    ),
    "fp8 with exponents as scales": (
        {"quant_method": "mxfp8", "activation_scheme": "dynamic"},
        packing.mxfp8(".weight_scale_inv"),
    ),
    "compressed-tensors nvfp4": (
        compressed(
            "nvfp4-pack-quantized",
            {**FOUR_BITS, "dynamic": "local"},
            **FOUR_BITS,
            strategy="tensor_group",
            group_size=16,
        ),
        packing.nvfp4(),
    ),
    "compressed-tensors mxfp4": (
        compressed("mxfp4-pack-quantized", **FOUR_BITS, strategy="group", group_size=32, scale_dtype="torch.uint8"),
        packing.mxfp4(),
    ),
    "compressed-tensors mxfp8": (
        compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
        packing.mxfp8(),
    ),
    "compressed-tensors int4 in bytes": (
        compressed("int-quantized", {"num_bits": 8}, num_bits=4, type="int", strategy="group", group_size=32),
        packing.ct_int4_in_bytes,
    ),
    "auto-round as GPTQ": (auto_round("auto_round:auto_gptq"), packing.without(packing.gptq(), ".g_idx")),
    "auto-round as GPTQ with whole zero points": (
        auto_round("auto_round", sym=False),
        packing.without(packing.gptq(sym=False, version=2), ".g_idx"),
    ),
    "auto-round as AWQ": (auto_round("auto_round:auto_awq", sym=False), packing.awq_gemm()),
    "auto-round nvfp4": (auto_round("auto_round:llm_compressor", data_type="nv_fp", group_size=16), packing.nvfp4()),
    "auto-round mxfp4": (auto_round("auto_round:llm_compressor", data_type="mx_fp"), packing.mxfp4()),
    "auto-round mxfp8": (auto_round("auto_round:llm_compressor", data_type="mx_fp", bits=8), packing.mxfp8()),
    "auto-round fp8": (
        auto_round("auto_round:fp8_static", data_type="fp", bits=8),
        packing.float8(".weight_scale", per_row=True),
    ),
    "modelopt fp8": (modelopt("FP8"), packing.float8(".weight_scale")),
    "modelopt nvfp4": (
        modelopt("NVFP4", kv_cache_quant_algo="FP8", group_size=16),
        packing.nvfp4(".weight", ".weight_scale_2", divides=False),
    ),
    "modelopt mxfp4": (modelopt("W4A8_MXFP4_FP8"), packing.mxfp4(".weight")),
    "modelopt mxfp8": (modelopt("MXFP8"), packing.mxfp8()),
    "torchao int8": (torchao("Int8WeightOnlyConfig", group_size=None), packing.torchao_bytes()),
    "torchao int8 without zeros": (
        torchao("Int8DynamicActivationInt8WeightConfig"),
        packing.torchao_bytes(zeros=False),
    ),
    "torchao int4 in bytes": (
        torchao(
            "IntxWeightOnlyConfig",
            weight_dtype={"_type": "torch.dtype", "_data": "int4"},
            granularity=per_group(32),
            intx_packing_format={"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        ),
        packing.torchao_bytes(4, 32),
    ),
    "torchao int4 in pairs": (
        torchao("Int4WeightOnlyConfig", group_size=32, int4_packing_format="plain"),
        packing.torchao_pairs(),
    ),
    "torchao int4 in tiles": (
        torchao("Int4WeightOnlyConfig", group_size=32, int4_packing_format="tile_packed_to_4d"),
        packing.torchao_tiles(),
    ),
    "torchao fp8": (torchao("Float8DynamicActivationFloat8WeightConfig"), packing.torchao_float8),
    "hqq": (hqq(), packing.hqq()),
    "hqq 8 bit": (hqq(nbits=8, group_size=64), packing.hqq(8, 64)),
    "hqq 3 bit": (hqq(nbits=3), packing.hqq(3)),
    "hqq 2 bit": (hqq(nbits=2), packing.hqq(2)),
    "quark fp8": (quark("fp8_e4m3"), packing.float8(".weight_scale")),
    "quark mxfp4": (
        quark("fp4", "per_group", group_size=32, scale_format="e8m0"),
        packing.mxfp4(".weight"),
    ),
}

PER_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
PER_TENSOR = {**PER_CHANNEL, "strategy": "tensor"}
PER_TOKEN = {**PER_TENSOR, "strategy": "token", "dynamic": True}

# Their inputs are rounded, too: they give other logits than a dense model with the same weights.
INTEGERS: dict[str, tuple[dict[str, Any], Packer]] = {
    "w8a8 per token": (compressed("int-quantized", PER_TOKEN, **PER_CHANNEL), packing.ct_int8()),
    "w8a8 per token, asymmetric": (
        compressed("int-quantized", {**PER_TOKEN, "symmetric": False}, **PER_CHANNEL),
        packing.ct_int8(),
    ),
    "w8a8 per tensor": (
        compressed("naive-quantized", PER_TENSOR, **PER_TENSOR),
        packing.with_input_scale(packing.ct_int8("tensor")),
    ),
    "w8a8 per tensor, asymmetric": (
        compressed("int-quantized", {**PER_TENSOR, "symmetric": False}, **PER_CHANNEL),
        packing.with_input_scale(packing.ct_int8(), zero=-7),
    ),
    "SmoothQuant of LMDeploy": ({"quant_method": "smooth_quant", "quant_dtype": "int8"}, packing.smooth_quant),
    "w8a8_int8 of SGLang": ({"quant_method": "w8a8_int8", "ignore": ["lm_head"]}, packing.ct_int8()),
}
