"""The quantization_config of real checkpoints: accepted with the right meaning, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_engine.checkpoint.config_fields import ConfigFields
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.quantization import LinearShape, parse, read_spec
from loraplex_engine.quantization.bitsandbytes import FourBitSpec, Int8Spec
from loraplex_engine.quantization.compressed_tensors import CompressedTensorsSpec
from loraplex_engine.quantization.fp8 import Fp8Spec
from loraplex_engine.quantization.gptq import GptqSpec, Parameters
from loraplex_engine.quantization.modules import ByModule

CONFIGS = Path(__file__).parents[4] / "shared" / "data" / "quant-configs"


def gptq(bits: int, group_size: int) -> GptqSpec:
    return GptqSpec(Parameters(bits, group_size, sym=True), (), zero_offset=1, zeros_borrow=False)


MEANINGS = {
    "Barksdale27__1__config.json": gptq(8, 128),
    "CesarChaMal__Wizard-Vicuna-30B-Uncensored-GPTQ__config.json": gptq(4, 64),
    "CesarChaMal__Wizard-Vicuna-30B-Uncensored-GPTQ__quantize_config.json": gptq(8, -1),
    "Decentralised-AI__wizard-mega-13B-GPTQ__quantize_config.json": gptq(4, 128),
    "DocWobble__Orpheus_3B_Quantized__config.json": FourBitSpec("nf4", nested=True, storage="uint8"),
    "IrfanUruchi__Llama-3.2-1B-ComputerEngineeringLLM__config.json": Int8Spec(),
    "KeshavArvindh__Quantization-of-LLM-s__quantize_config.json": gptq(4, 128),
    "casys-kaist__LLMServingSim__configs-model-deepseek-ai-DeepSeek-V3.2-Exp-16L64E.json": Fp8Spec((128, 128), False),
    "itdevwu__Genz-70b-GPTQ__quantize_config.json": gptq(3, 128),
    "rohit1253__llama_2_13_B_chat_GPTQ__config.json": gptq(4, 128),
    "sehyun66__chatbot_kullm__quantize_config.json": gptq(8, 128),
    "tenstorrent__tt-metal__models-tt_transformers-model_params-Devstral-2-123B-Instruct-config.json": Fp8Spec(
        None, True
    ),
    "tenstorrent__tt-metal__models-tt_transformers-model_params-Devstral-Small-2-24B-Instruct-config.json": Fp8Spec(
        None, True
    ),
    "x1ngzai__Qwen-VL-Chat-Int4__config.json": gptq(4, 128),
    "x1ngzai__Qwen-VL-Chat-Int4__quantize_config.json": gptq(4, 128),
}
# name → (label, packed, activations quantised too); all of them per tensor
COMPRESSED = {
    "compressed-tensors__examples-bit_packing-int4_config.json": ("compressed-tensors-int4", True, False),
    "compressed-tensors__examples-llama_1.1b-example_quant_config.json": ("compressed-tensors-w8a8", False, True),
}
needs_data = pytest.mark.skipif(not CONFIGS.is_dir(), reason="the configurations are not here")


def read(name: str, directory: Path) -> object:
    raw = json.loads((CONFIGS / name).read_text())
    if name.endswith("quantize_config.json"):
        (directory / "quantize_config.json").write_text(json.dumps(raw))
        return read_spec(directory, {})
    return read_spec(directory, raw if "model_type" in raw else {"quantization_config": raw})


@needs_data
def test_every_configuration_is_accounted_for() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == MEANINGS.keys() | COMPRESSED.keys()


@needs_data
@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(tmp_path: Path, name: str) -> None:
    assert read(name, tmp_path) == MEANINGS[name]


@needs_data
@pytest.mark.parametrize("name", COMPRESSED)
def test_meaning_of_compressed_tensors(tmp_path: Path, name: str) -> None:
    spec = read(name, tmp_path)
    assert isinstance(spec, CompressedTensorsSpec)
    (scheme,) = spec.schemes
    assert (spec.label, scheme.packed, scheme.activations) == COMPRESSED[name]
    assert scheme.per_tensor


def test_files_from_before_the_method_was_written() -> None:
    assert parse(ConfigFields({"load_in_8bit": True}, "config.json")) == Int8Spec()


def test_the_section_of_a_multimodal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw = {"text_config": {"compression_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}}
    assert read_spec(tmp_path, raw) == gptq(4, 128)


@pytest.mark.parametrize("raw", [{}, {"quantization_config": None}, {"quantization_config": {}}], ids=str)
def test_unquantised_models_state_nothing(tmp_path: Path, raw: dict[str, object]) -> None:
    assert read_spec(tmp_path, raw) is None


def test_modules_of_one_name_may_have_a_scheme_of_their_own() -> None:
    fields = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}},
            "down": {
                "targets": ["re:.*down_proj"],
                "format": "float-quantized",
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            },
        },
    }
    spec = parse(ConfigFields(fields, "config.json"))
    assert ".weight_packed" in spec.tensors(LinearShape("model.layers.0.mlp.up_proj", 32, 64))
    assert ".weight" in spec.tensors(LinearShape("model.layers.0.mlp.down_proj", 64, 32))


def test_a_section_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantization_config is 'gptq'; it must be an object"):
        read_spec(tmp_path, {"quantization_config": "gptq"})


def test_a_file_of_modelopt_beside_a_config_that_says_nothing(tmp_path: Path) -> None:
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    spec = read_spec(tmp_path, {})
    assert spec is not None
    assert spec.label == "modelopt-fp8"


def test_an_algorithm_of_modelopt_that_is_not_read_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4_AWQ"}}))
    with pytest.raises(ModelError, match=r"hf_quant_config\.json: quantization: quant_algo is 'NVFP4_AWQ'; it must be"):
        read_spec(tmp_path, {})


def test_modules_of_modelopt_may_differ() -> None:
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16}, "lm_head": {"quant_algo": "FP8"}}
    fields = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    spec = parse(ConfigFields(fields, "config.json"))
    assert ".weight_scale_2" in spec.tensors(LinearShape("model.layers.0.mlp.up_proj", 32, 64))
    assert ".weight_scale_2" not in spec.tensors(LinearShape("lm_head", 32, 64))
    with pytest.raises(ModelError, match=r"down_proj is quantised, and config\.json does not say how"):
        spec.tensors(LinearShape("model.layers.0.mlp.down_proj", 64, 32))


def test_hqq_gives_modules_parameters_by_the_ends_of_their_paths() -> None:
    tags = {"self_attn.q_proj": {"weight_quant_params": {"nbits": 8, "axis": 1}}, "up_proj": {"nbits": 3, "axis": 1}}
    spec = parse(ConfigFields({"quant_method": "hqq", "quant_config": tags}, "config.json"))
    assert spec.tensors(LinearShape("model.layers.0.self_attn.q_proj", 30, 64))[".W_q"].dtypes == ("U8",)
    assert spec.tensors(LinearShape("model.layers.1.mlp.up_proj", 30, 64))[".W_q"].dtypes == ("I32",)


def test_quark_gives_modules_a_format_by_patterns_of_their_paths() -> None:
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    layers = {"*o_proj": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}}, "*k_proj": {"weight": None}}
    fields = {"quant_method": "quark", "global_quant_config": {"weight": weight}, "layer_quant_config": layers}
    spec = parse(ConfigFields(fields, "config.json"))
    assert spec.tensors(LinearShape("model.layers.0.self_attn.o_proj", 32, 64))[".weight"].dtypes == ("F8_E4M3",)
    assert spec.tensors(LinearShape("model.layers.0.self_attn.k_proj", 32, 64))[".weight"].dtypes == ("U8",)


def test_torchao_names_modules_patterns_of_them_and_a_default() -> None:
    float8, int8 = ({"_type": f"{kind}WeightOnlyConfig", "_version": 2} for kind in ("Float8", "Int8"))
    modules = {"re:.*q_proj": int8, "model.layers.0.mlp.up_proj": None, "lm_head": int8, "_default": float8}
    kind = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": modules}}
    spec = parse(ConfigFields({"quant_method": "torchao", "quant_type": {"default": kind}}, "config.json"))
    found = {
        path: spec.tensors(LinearShape(path, 32, 64))["._weight_qdata"].dtypes
        for path in ("model.layers.3.self_attn.q_proj", "lm_head", "model.layers.0.mlp.down_proj")
    }
    assert list(found.values()) == [("I8",), ("I8",), ("F8_E4M3",)]


def test_auto_round_names_modules_and_patterns_of_them() -> None:
    extra = {
        ".*layers\\.1.*": {"bits": 8},
        "model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 64},
        "model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"},
    }
    fields = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128}
    spec = parse(ConfigFields({**fields, "extra_config": extra}, "config.json"))
    assert isinstance(spec, ByModule)
    assert [parameters_of(spec, path) for path in ("1.mlp.up_proj", "1.mlp.gate_proj", "0.mlp.up_proj")] == [
        Parameters(2, 64, sym=True),
        Parameters(8, 128, sym=True),
        Parameters(4, 128, sym=True),
    ]


def parameters_of(spec: ByModule, path: str) -> Parameters:
    found = spec.of(LinearShape(f"model.layers.{path}", 64, 64))
    assert isinstance(found, GptqSpec)
    return found.parameters


@pytest.mark.parametrize(("packing", "offset"), [("auto_round:gptq:exllamav2", 1), ("auto_round:exllamav2", 0)])
def test_old_files_of_auto_round_name_kernels(packing: str, offset: int) -> None:
    fields = {"quant_method": "intel/auto-round", "backend": packing, "bits": 4, "group_size": 128}
    spec = parse(ConfigFields(fields, "config.json"))
    assert isinstance(spec, GptqSpec)
    assert spec.zero_offset == offset


def test_a_file_of_modelopt_that_quantised_nothing_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert read_spec(tmp_path, {}) is None
