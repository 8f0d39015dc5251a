"""Adapters as PEFT saves them, against PEFT's own forward: module by module, and the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.config import parse_config
from loraplex_adapters.files.source import describe, digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.layer import LoRALinear
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_adapters.runtime.weights import LoadedAdapter, load_adapter
from loraplex_engine.execution.kv_cache import create_kv_cache
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_kernels.ops import AttentionMetadata, LoraSegments
from loraplex_kernels.selection import select_ops
from tests.adapters.dense import Dense

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

REAL_ADAPTERS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "adapters"
# float32 on both sides: the same products summed in another order, relative to the largest output.
TOLERANCE = 1e-5

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "every linear": {"target_modules": ALL},
    "all-linear": {"target_modules": "all-linear"},
    "query and value": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 32},
    "key alone": {"target_modules": ["k_proj"], "r": 3, "lora_alpha": 1},
    "up without gate": {"target_modules": ["up_proj"]},
    "rank 1, alpha 100": {"target_modules": ALL, "r": 1, "lora_alpha": 100},
    "rank above the width": {"target_modules": ["o_proj"], "r": 64, "lora_alpha": 16},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "rank_pattern": {
        "target_modules": ALL,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 7, r".*layers\.1\..*": 2, "self_attn.v_proj": 5},
    },
    "alpha_pattern": {"target_modules": ALL, "alpha_pattern": {r"layers\.[12]\.mlp\.(up|gate)_proj": 3, "q_proj": 40}},
    "both patterns and rsLoRA": {
        "target_modules": ALL,
        "use_rslora": True,
        "rank_pattern": {"k_proj|v_proj": 6, r"layers.2.*": 3},
        "alpha_pattern": {r"layers.2.*": 9, "k_proj": 1},
    },
    "a pattern is no prefix": {"target_modules": ALL, "rank_pattern": {"q_pro": 2, "proj": 2, "layers.0": 2}},
    "regex targets": {"target_modules": r".*layers\.(0|2)\.self_attn\.(q|o)_proj"},
    "layers_to_transform": {"target_modules": ALL, "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ALL, "exclude_modules": ["o_proj", "layers.1.mlp.down_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.2\..*"},
    "gaussian": {"target_modules": ALL, "init_lora_weights": "gaussian", "lora_dropout": 0.5},
    "orthogonal": {"target_modules": ALL, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ALL, "init_lora_weights": "mica"},
}


@dataclass(frozen=True)
class Oracle:
    """A model with PEFT's layers in it, the directory that its adapter was saved to, and the base by itself."""

    model: Any
    directory: Path
    base: Path

    def modules(self) -> Iterator[tuple[str, Any]]:
        """The linears of the decoder by their names in the base model, adapted or not."""
        for name, module in self.model.base_model.model.named_modules():
            adapted = isinstance(module, peft.tuners.lora.Linear)
            plain = isinstance(module, torch.nn.Linear) and "lora_" not in name and not name.endswith("base_layer")
            if name.startswith("model.layers.") and (adapted or plain):
                yield name, module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)
    return path


def llama(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)


def save(make: Callable[[], Any], directory: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Save an adapter with random weights, and read it back as PEFT does."""
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of the odd things that are done here on purpose
        return save_loudly(make, directory, dtype, **fields)


def save_loudly(make: Callable[[], Any], directory: Path, dtype: torch.dtype, **fields: Any) -> Any:
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(make(), directory).eval()


@pytest.fixture(params=KINDS)
def oracle(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Oracle:
    return Oracle(save(lambda: llama(base), tmp_path, **KINDS[request.param]), tmp_path, base)


# ---- our side --------------------------------------------------------------------------------------------------------


FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "o": ("self_attn.o_proj",),
    "down": ("mlp.down_proj",),
    "fused_qkv": ("self_attn.qkv_proj",),
    "fused_gate_up": ("mlp.gate_up_proj",),
}


def fuse(oracle: Oracle) -> tuple[dict[str, LoraTarget], dict[str, LoRALinear]]:
    """The targets and sites of a model that fuses what shares an input, with the oracle's base weights."""
    modules = dict(oracle.modules())
    ops = select_ops(torch.device("cpu"), "reference")
    targets, sites = {}, {}
    layers = sorted({".".join(name.split(".")[:3]) for name in modules})
    for layer in layers:
        for site, parts in FUSED.items():
            members = [
                (f"{layer}.{part}", modules[f"{layer}.{part}"]) for part in parts if f"{layer}.{part}" in modules
            ]
            start, weights = 0, []
            for name, module in members:
                weights.append(getattr(module, "base_layer", module).weight.detach())
                targets[name] = LoraTarget(f"{layer}.{site}", weights[-1].shape[1], start, weights[-1].shape[0])
                start += weights[-1].shape[0]
            if members:
                sites[f"{layer}.{site}"] = LoRALinear(ops, Dense(torch.cat(weights)), num_slots=1)
    return targets, sites


def load(directory: Path, targets: dict[str, LoraTarget]) -> LoadedAdapter:
    key, ops = AdapterKey("shared/x", digest(directory)), select_ops(torch.device("cpu"), "reference")
    return load_adapter(key, directory, targets, torch.float32, max_rank=64, pack=ops.pack_lora)


def rows(start: int, end: int) -> LoraSegments:
    columns = [torch.tensor([value], dtype=torch.int32) for value in (0, start, end)]
    return LoraSegments(((0, start, end),), *columns)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < TOLERANCE, f"off by {error:.2e} of the largest output"


def check_module_by_module(oracle: Oracle) -> None:
    targets, sites = fuse(oracle)
    loaded = load(oracle.directory, targets)
    for site, packed in loaded.packed.items():
        sites[site].table.put(0, packed)
    generator = torch.Generator().manual_seed(2)
    adapted = set()
    for name, module in oracle.modules():
        target = targets[name]
        x = torch.randn(5, target.in_features, generator=generator)
        y = sites[target.site](x, rows(1, 5))[:, target.out_start : target.out_start + target.out_features]
        with torch.no_grad():
            assert_same(y[1:], module(x[1:]))
            assert_same(y[:1], getattr(module, "base_layer", module)(x[:1]))
        if hasattr(module, "base_layer"):
            adapted.add(name)
    assert set(loaded.ranks) == adapted
    assert adapted


# ---- equality --------------------------------------------------------------------------------------------------------


def test_every_module_computes_what_peft_computes(oracle: Oracle) -> None:
    check_module_by_module(oracle)


def test_rank_and_scale_of_every_module_are_those_of_peft(oracle: Oracle) -> None:
    config = parse_config((oracle.directory / "adapter_config.json").read_bytes())
    described = describe(oracle.directory)
    num_adapted = 0
    for name, module in oracle.modules():
        if hasattr(module, "base_layer"):
            num_adapted += 1
            assert described.module_ranks[name] == config.rank_of(name) == module.r["default"]
            assert config.scale_of(name) == pytest.approx(module.scaling["default"], rel=1e-12)
    assert len(described.module_ranks) == num_adapted


def test_the_whole_model_computes_what_peft_computes(oracle: Oracle) -> None:
    tokens = torch.randint(1, SHAPE["vocab_size"], (19,), generator=torch.Generator().manual_seed(3))
    ops = select_ops(torch.device("cpu"), "reference")
    settings = EngineConfig(model=str(oracle.base), dtype="float32", max_resident_adapters=1)
    model = load_model(settings, oracle.base, ops)
    loaded, sites = load(oracle.directory, model.lora_targets()), model.lora_sites()
    for site, packed in loaded.packed.items():
        sites[site].table.put(0, packed)
    attention = AttentionMetadata(
        query_starts=torch.tensor([0, 19], dtype=torch.int32),
        seq_lens=torch.tensor([19], dtype=torch.int32),
        block_tables=torch.tensor([[1, 0]], dtype=torch.int32),
        slot_mapping=torch.tensor([*range(16, 32), 0, 1, 2]),
        max_query_len=19,
        max_seq_len=19,
    )
    batch = StepBatch(tokens, torch.arange(19), attention, rows(0, 19), torch.arange(19))
    cache = create_kv_cache(model.config, ops, 2, 16, torch.float32)
    with torch.inference_mode():
        assert_same(model.logits(model.forward(batch, cache)), oracle.model(input_ids=tokens[None]).logits[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_saved_in_16_bits_is_the_same_adapter(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = save(lambda: llama(base), tmp_path, dtype, target_modules=ALL)
    check_module_by_module(Oracle(model, tmp_path, base))


def test_an_adapter_trained_on_fused_projections_is_applied_to_them(base: Path, tmp_path: Path) -> None:
    def phi3() -> Any:
        torch.manual_seed(0)
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHAPE))

    model = save(phi3, tmp_path, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])
    check_module_by_module(Oracle(model, tmp_path, base))


# ---- refusal: what PEFT would compute differently from A and B alone -------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused_by_name(base: Path, tmp_path: Path, init: str) -> None:
    save(lambda: llama(base), tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json: init_lora_weights="):
        load(tmp_path, {})


# ---- adapters that others trained ------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_ADAPTERS.is_dir(), reason="real adapters are not here")
@pytest.mark.parametrize("name", ["gemma3-270m-it__ao-wei_adapter", "gemma3-270m-it__fanyihan_r8_qv"])
def test_a_real_adapter_of_gemma_3_computes_what_peft_computes(name: str) -> None:
    shape = {
        "vocab_size": 64,  # no adapter changes it
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
    }
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape))
    directory = REAL_ADAPTERS / name
    check_module_by_module(Oracle(peft.PeftModel.from_pretrained(model, directory).eval(), directory, directory))
