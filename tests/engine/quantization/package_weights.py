"""The weights of a quantised model as the package that made it dequantises them. A script for that package's Python:

    python -P package_weights.py MODEL WEIGHTS.safetensors

Writes float32 [N, C] by the path of each quantised linear. Scales are widened first, and those of GPTQModel taken from
the file: it rounds float16 ones to the model's bfloat16 when it loads them.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def of_bitsandbytes(model: Path) -> Iterator[tuple[str, Any]]:
    transformers, bitsandbytes = (importlib.import_module(name) for name in ("transformers", "bitsandbytes"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, device_map={"": "cpu"}, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            yield name, bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            yield name, bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


def of_gptqmodel(model: Path, method: str) -> Iterator[tuple[str, Any]]:
    gptqmodel = importlib.import_module("gptqmodel")
    packing = importlib.import_module("gptqmodel.quantization.awq.utils.packing_utils")
    loaded = gptqmodel.GPTQModel.load(str(model), device="cpu", backend=gptqmodel.BACKEND(f"{method}_torch"))
    stored = load_file(model / "model.safetensors")
    for name, module in loaded.model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        module.scales = stored[f"{name}.scales"].float()
        if method == "gptq":
            # Of the class: the instance's own would be compiled first.
            yield name, type(module).dequantize_weight(module).t()
        else:
            parts = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
            yield name, packing.dequantize_gemm(*parts).t()


def main(model: Path, weights: Path) -> None:
    method = json.loads((model / "config.json").read_text())["quantization_config"]["quant_method"]
    found = of_bitsandbytes(model) if method == "bitsandbytes" else of_gptqmodel(model, method)
    save_file({name: weight.float().contiguous() for name, weight in found}, weights)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
