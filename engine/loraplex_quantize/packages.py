"""Runs GPTQModel or bitsandbytes on a model. A script of its own, which imports nothing of Loraplex:

    python -P packages.py < JOB      {"source": …, "out": …, "method": …, "group_size": …, "calibration": …}

calibration: lists of token ids. Both packages show how far they are on stderr.
"""

import importlib
import json
import os
import sys
from typing import Any


def with_gptqmodel(source: str, out: str, method: str, group_size: int, calibration: list[list[int]]) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))  # its own default of 1 fails
    torch, gptqmodel = (importlib.import_module(name) for name in ("torch", "gptqmodel"))
    file_format = {"gptq": "gptq", "awq": "gemm"}[method]
    config = gptqmodel.QuantizeConfig(bits=4, group_size=group_size, method=method, format=file_format)
    model = gptqmodel.GPTQModel.load(source, config)
    # Left to itself it packs AWQ for a CUDA kernel, and fails where there is no GPU.
    backend = "auto" if torch.cuda.is_available() or method == "gptq" else "awq_torch"
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
    model.quantize(samples, backend=gptqmodel.BACKEND(backend))
    model.save(out)


def with_bitsandbytes(source: str, out: str, method: str) -> None:
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**(four_bit if method == "nf4" else {"load_in_8bit": True}))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": device}
    )
    model.save_pretrained(out)  # before any forward pass: on some CPUs that repacks the weights


def main(job: dict[str, Any]) -> None:
    if job["method"] in ("nf4", "int8"):
        with_bitsandbytes(job["source"], job["out"], job["method"])
    else:
        with_gptqmodel(job["source"], job["out"], job["method"], job["group_size"], job["calibration"])


if __name__ == "__main__":
    main(json.load(sys.stdin))
