"""The formulas of the page on sizing are those of the engine, and its examples are what the formulas give."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.runtime.weights import load_adapter
from loraplex_engine.execution.loading import load_runner
from loraplex_engine.execution.size_report import size_report
from loraplex_engine.execution.sizing import adapter_bytes, needs_of, step_bytes
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.load_report import UNREPORTED
from tests.engine.models.loras import write_lora

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sizing.md"
CACHE_BYTES = 1 << 20
LENGTH = 64
ADAPTER_NUMBER_BYTES = 4  # of the reference, whatever the model computes in
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Case:
    """A model, how it is loaded, and what the page calls the facts of it."""

    make: Callable[[], Any]
    kv_heads: int
    head_dim: int
    turned: int
    fields: dict[str, Any]
    number_bytes: int = 4
    weight_bytes: float = 4
    cache_number_bytes: int = 4
    scale_bytes: int = 0


def llama(**changes: Any) -> Callable[[], Any]:
    return lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes))


def of_experts() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16, num_key_value_heads=2)
    )


def latent() -> Any:
    config = transformers.DeepseekV3Config(**SMALL, **LATENT, num_key_value_heads=4)
    return transformers.DeepseekV3ForCausalLM(config)


CASES = {
    "dense": Case(llama(), 4, 16, 16, {}),
    "few key-value heads, tied": Case(llama(num_key_value_heads=2, tie_word_embeddings=True), 2, 16, 16, {}),
    "16 bits": Case(llama(num_key_value_heads=2), 2, 16, 16, {"dtype": "bfloat16"}, 2, 2, 2),
    "experts": Case(of_experts, 2, 16, 16, {"dtype": "bfloat16"}, 2, 2, 2),
    "latent attention": Case(latent, 4, 24, 8, {}),
    "quantised": Case(llama(), 4, 16, 16, {"quantization": "int4"}, 4, 1 + 2 * 4 / 64, 4),
    "int8 cache": Case(llama(), 4, 16, 16, {"kv_cache_dtype": "int8"}, cache_number_bytes=1, scale_bytes=4),
    "fp8 cache": Case(llama(), 4, 16, 16, {"kv_cache_dtype": "fp8"}, cache_number_bytes=1, scale_bytes=4),
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The functions of the page, and what its examples compute."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(params=CASES.values(), ids=list(CASES), scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Any, Path]:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    case.make().save_pretrained(folder)
    settings: dict[str, Any] = {
        "device": "cpu",
        "kernels": "reference",
        "kv_cache_bytes": CACHE_BYTES,
        "dtype": "float32",
    }
    config = EngineConfig(model=str(folder), max_num_seqs=5, **settings | case.fields)
    return case, config, load_runner(config, folder, UNREPORTED), folder


def shapes(folder: Path) -> dict[str, list[int]]:
    """Of the tensors in the model's file, by its header alone."""
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return {name: each["shape"] for name, each in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}


def linears(folder: Path) -> list[tuple[int, int]]:
    """Inputs and outputs of each in the layers."""
    found = (shape for name, shape in shapes(folder).items() if ".layers." in name and len(shape) == 2)
    return [(inputs, outputs) for outputs, inputs in found]


def test_the_weights_are_what_the_page_says(page: dict[str, Any], loaded: tuple[Case, Any, Any, Path]) -> None:
    case, _, runner, folder = loaded
    flat = {name: shape[0] for name, shape in shapes(folder).items() if len(shape) == 1}
    biases = sum(size for name, size in flat.items() if name.endswith(".bias"))
    found = page["weights"](
        linears(folder),
        case.weight_bytes,
        case.number_bytes,
        SMALL["vocab_size"],
        SMALL["hidden_size"],
        biases,
        sum(flat.values()) - biases,
        LENGTH,
        case.turned,
    )
    assert found == runner.model.nbytes


def test_what_is_said_before_loading_is_what_comes_of_it(loaded: tuple[Case, Any, Any, Path]) -> None:
    _, config, runner, folder = loaded
    needs = needs_of(config, folder)
    assert needs.cache == CACHE_BYTES
    if config.quantization is None:
        assert needs.weights == runner.model.nbytes
    else:
        assert needs.weights < runner.model.nbytes  # the reference has a byte for each code


def test_the_cache_is_what_the_page_says(page: dict[str, Any], loaded: tuple[Case, Any, Any, Path]) -> None:
    case, config, runner, _ = loaded
    per_token = page["cache_bytes_per_token"](
        2, case.kv_heads, case.head_dim, case.cache_number_bytes, case.scale_bytes
    )
    tokens = page["tokens_of_cache"](CACHE_BYTES, per_token, 16, config.max_num_seqs, LENGTH)
    assert tokens == runner.num_blocks * 16
    assert per_token * tokens == sum(layer.nbytes for layer in runner.kv_cache)


def test_an_adapter_is_what_the_page_says(
    page: dict[str, Any], loaded: tuple[Case, Any, Any, Path], tmp_path: Path
) -> None:
    _, _, runner, folder = loaded
    found = {name: shape for name, shape in shapes(folder).items() if ".layers." in name and len(shape) == 2}
    found = {name: shape for name, shape in found.items() if "mlp.gate.weight" not in name}  # routers: no adapters here
    sizes = {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in found.items()}
    key, targets = write_lora(tmp_path / "lora", sizes, rank=4), runner.model.lora_targets()
    adapter = load_adapter(key, tmp_path / "lora", targets, runner.model.dtype, 8, runner.ops.pack_lora)
    projections = [(inputs, outputs) for outputs, inputs in sizes.values()]
    assert page["adapter_bytes"](projections, 4, ADAPTER_NUMBER_BYTES) == adapter.nbytes
    routers = [target for name, target in targets.items() if name.endswith("mlp.gate")]
    of_routers = sum(4 * (each.in_features + each.out_features) * ADAPTER_NUMBER_BYTES for each in routers)
    assert adapter_bytes(targets, 4, torch.float32) == adapter.nbytes + of_routers


def test_a_step_is_what_the_page_says(page: dict[str, Any], loaded: tuple[Case, Any, Any, Path]) -> None:
    case, config, runner, folder = loaded
    widest = max(max(each) for each in linears(folder))
    found = step_bytes(runner.model.config, runner.model.lora_targets(), config, runner.model.dtype)
    assert found == page["step_bytes"](2048, 64, widest, case.number_bytes, 5, SMALL["vocab_size"])


def test_the_log_has_what_fits(loaded: tuple[Case, Any, Any, Path]) -> None:
    _, config, runner, _ = loaded
    text = size_report([runner], config)
    assert f"{runner.num_blocks * 16} tokens: 5 requests of {LENGTH} (max_model_len) at once" in text
    assert re.findall(r"^  (\w[\w, ]*?)  ", text, re.MULTILINE) == [
        "weights",
        "cache",
        "adapters, device",
        "adapters, host",
        "one adapter",
        "a step",
    ]
