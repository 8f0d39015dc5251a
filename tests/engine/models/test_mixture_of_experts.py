"""Mixtures of experts: what equal experts compute is what one does, dense or quantised, in each form of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.models import load_model
from loraplex_engine.ranks.exchange import Alone
from loraplex_kernels.selection import select_ops
from tests.engine.models.loras import write_lora
from tests.engine.quantization import packing
from tests.engine.quantization.checkpoints import MODEL, load, logits, make_twins, reference_ops
from tests.engine.quantization.formats import FORMATS, gptq
from tests.reference.stepping import step

NUM_EXPERTS = 3
DENSE: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
MIXED: dict[str, Any] = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": MODEL["intermediate_size"],
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
TOKENS = torch.arange(3, 20)


def generate(
    folder: Path, modules: Sequence[str], backend: str, shape: tuple[int, int] = (128, 64), **kind: bool
) -> list[list[int]]:
    """What a model continues a prompt with: alone, and with the same LoRA at each of `modules`."""
    key = write_lora(folder / "adapter", {f"model.layers.1.mlp.{module}": shape for module in modules}, **kind)
    config = EngineConfig(
        model=str(folder), kv_cache_bytes=1 << 20, max_num_batched_tokens=9, threads=1, kernels=backend
    )
    core, sampling = EngineCore.load(config), SamplingParams(seed=0, temperature=0.0, max_tokens=12)
    core.want_adapter(WantAdapter(key, 1, str(folder / "adapter")))
    for number, adapter in enumerate((None, key)):
        core.add(AddRequest(number, list(range(3, 20)), sampling, adapter))
    tokens: list[list[int]] = [[], []]
    while core.has_work():
        for event in step(core):
            for output in event.outputs if isinstance(event, StepOutput) else ():
                tokens[output.request_id] += output.token_ids
    core.close()
    return tokens


def write(folder: Path, tensors: dict[str, Tensor], raw: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MODEL, **raw}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> dict[str, Tensor]:
    return load_file(make_twins(tmp_path, {}, packing.gptq(), **DENSE).dense / "model.safetensors")


@pytest.fixture
def mixed(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with equal experts in its last layer."""
    mlp = {name: tensor for name, tensor in dense.items() if ".1.mlp." in name}
    tensors = {name: tensor for name, tensor in dense.items() if name not in mlp}
    tensors["model.layers.1.mlp.gate.weight"] = torch.randn(NUM_EXPERTS, 64, generator=Generator().manual_seed(1))
    for index, (name, tensor) in product(range(NUM_EXPERTS), mlp.items()):
        tensors[name.replace("mlp", f"mlp.experts.{index}")] = tensor.clone()
    return tensors


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts' matrices as transformers has them in memory."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    experts = [
        {kind: tensors[f"model.layers.1.mlp.experts.{index}.{kind}_proj.weight"] for kind in ("gate", "up", "down")}
        for index in range(NUM_EXPERTS)
    ]
    kept["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in experts])
    kept["model.layers.1.mlp.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    return kept


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"bias": True}])
def test_equal_experts_generate_what_one_does_and_so_do_equal_adapters_on_them(
    tmp_path: Path, dense: dict[str, Tensor], mixed: dict[str, Tensor], backend: str, kind: dict[str, Any]
) -> None:
    wanted = generate(write(tmp_path / "one", dense, DENSE), ["up_proj"], backend, **kind)
    assert wanted[0] != wanted[1]
    each = [f"experts.{index}.up_proj" for index in range(NUM_EXPERTS)]
    assert generate(write(tmp_path / "mixed", mixed, MIXED), each, backend, **kind) == wanted


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_stacked_experts_are_the_same_as_those_with_tensors_of_their_own(
    tmp_path: Path, mixed: dict[str, Tensor], quantization: str | None
) -> None:
    each = load(write(tmp_path / "each", mixed, MIXED), quantization=quantization)
    together = load(write(tmp_path / "together", stacked(mixed), MIXED), quantization=quantization)
    torch.testing.assert_close(logits(together, TOKENS), logits(each, TOKENS))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "int4"])
def test_quantising_while_loading_leaves_the_router_as_it_is(
    tmp_path: Path, mixed: dict[str, Tensor], quantization: str
) -> None:
    model = load(write(tmp_path / "mixed", mixed, MIXED), quantization=quantization)
    router, expert = (f"model.layers.1.mlp.{module}" for module in ("gate", "experts.0.down_proj"))
    bases = {path: target.base for path, target in model.lora_targets().items() if path in (router, expert)}
    found = {path: base.dequantize(0, len(mixed[f"{path}.weight"])) for path, base in bases.items() if base is not None}
    assert torch.equal(found[router], mixed[f"{router}.weight"].float())
    assert not torch.equal(found[expert], mixed[f"{expert}.weight"].float())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part_of_stacked_experts(tmp_path: Path, mixed: dict[str, Tensor], rank: int) -> None:
    def parts(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        folder = write(tmp_path / name, tensors, MIXED)
        config = EngineConfig(model=str(folder), max_resident_adapters=2)
        model = load_model(config, folder, reference_ops(), ranks=Alone(Shard(rank, 2)))
        bases = {path: target.base for path, target in model.lora_targets().items() if ".experts." in path}
        return {
            path: base.dequantize(0, target.columns.stop)
            for path, target in model.lora_targets().items()
            if (base := bases.get(path)) is not None
        }

    each, together = parts("each", mixed), parts("together", stacked(mixed))
    assert each
    assert each.keys() == together.keys()
    assert all(torch.equal(each[path], together[path]) for path in each)


@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        "gptq act-order",
        "awq gemm",
        "bitsandbytes nf4",
        "compressed-tensors int4, asymmetric",
        "compressed-tensors int8",
        "fp8 blocks",
        "compressed-tensors nvfp4",
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_are_read_quantised_where_the_checkpoint_has_them_so(tmp_path: Path, name: str, backend: str) -> None:
    section, packer = FORMATS[name]
    twins = make_twins(tmp_path, section, packer, ("gate",), **MIXED)
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    found, wanted = (logits(load(path, ops), TOKENS, ops) for path in (twins.quantised, twins.dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_may_be_quantised_in_different_ways(tmp_path: Path, backend: str) -> None:
    section = gptq(desc_act=True, dynamic={r"+:.*experts\.1\.up_proj": {"bits": 8}})
    orders = packing.gptq(act_order=True)
    twins = make_twins(tmp_path, section, orders, ("gate",), **MIXED)
    dense = load_file(twins.dense / "model.safetensors")
    # Of one expert gate and up differ in their bits; of another they have an order in common, and are one matrix.
    for module, packer in (("1.up_proj", packing.gptq(bits=8)), ("2.up_proj", orders), ("2.gate_proj", orders)):
        name = f"model.layers.1.mlp.experts.{module}"
        tensors, dense[f"{name}.weight"] = packer(Generator().manual_seed(1), *dense[f"{name}.weight"].shape)
        twins.change(**{name + suffix: tensor for suffix, tensor in tensors.items()})
    save_file(dense, twins.dense / "model.safetensors")
    ops = select_ops(torch.device("cpu"), backend, threads=1)
    found, wanted = (logits(load(path, ops), TOKENS, ops) for path in (twins.quantised, twins.dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 1 << 20, "num_experts"),
        ("num_experts", 1 << 15 | 1, "num_experts"),
        ("num_experts_per_tok", 4, "num_experts_per_tok"),
        ("moe_intermediate_size", "many", "moe_intermediate_size"),
    ],
)
def test_a_file_with_impossible_experts_is_refused_by_the_field(
    tmp_path: Path, mixed: dict[str, Tensor], field: str, value: object, message: str
) -> None:
    folder = write(tmp_path / "mixed", mixed, {**MIXED, field: value})
    with pytest.raises(ModelError, match=rf"config\.json: {message}"):
        load(folder)


def test_a_checkpoint_that_lacks_an_expert_is_refused_by_name(tmp_path: Path, mixed: dict[str, Tensor]) -> None:
    del mixed["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        load(write(tmp_path / "mixed", mixed, MIXED))


def test_steps_of_experts_are_not_captured(tmp_path: Path, dense: dict[str, Tensor], mixed: dict[str, Tensor]) -> None:
    assert load(write(tmp_path / "one", dense, DENSE)).capturable
    assert not load(write(tmp_path / "mixed", mixed, MIXED)).capturable


GROUPED: dict[str, Any] = {
    **DENSE,
    "architectures": ["Glm4MoeForCausalLM"],
    "torch_dtype": "bfloat16",
    "use_qk_norm": True,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": MODEL["intermediate_size"],
}
ROUTER = "model.layers.1.mlp.gate"


@pytest.fixture
def grouped(mixed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts that differ, and that a router tells apart by less than bfloat16 does."""
    generator = Generator().manual_seed(2)
    for name in sorted(name for name in mixed if ".experts." in name):
        mixed[name] = torch.randn(mixed[name].shape, generator=generator)
    nearly = 1 + 1e-4 * torch.arange(NUM_EXPERTS).unsqueeze(1)
    mixed[f"{ROUTER}.weight"] = torch.randn(1, 64, generator=generator) * nearly
    mixed[f"{ROUTER}.e_score_correction_bias"] = torch.zeros(NUM_EXPERTS)
    return mixed


def test_a_router_in_float32_chooses_the_same_experts_in_any_order(tmp_path: Path, grouped: dict[str, Tensor]) -> None:
    wanted = logits(load(write(tmp_path / "one", grouped, GROUPED)), TOKENS)
    reversed_ = {
        name.replace(f"experts.{index}.", f"experts.{NUM_EXPERTS - 1 - index}."): tensor
        for index in range(NUM_EXPERTS)
        for name, tensor in grouped.items()
        if f"experts.{index}." in name or ".experts." not in name
    }
    reversed_[f"{ROUTER}.weight"] = grouped[f"{ROUTER}.weight"].flip(0).contiguous()
    assert torch.equal(logits(load(write(tmp_path / "other", reversed_, GROUPED)), TOKENS), wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_adapter_on_a_router_in_float32_generates_what_it_does_when_merged(
    tmp_path: Path, grouped: dict[str, Tensor], backend: str
) -> None:
    plain = generate(write(tmp_path / "plain", grouped, GROUPED), ["gate"], backend, (NUM_EXPERTS, 64))
    lora = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{ROUTER}.lora_{part}.weight"] for part in "AB")
    grouped[f"{ROUTER}.weight"] += 4.0 * b @ a
    merged = generate(write(tmp_path / "merged", grouped, GROUPED), ["gate"], backend, (NUM_EXPERTS, 64))
    assert plain[1] == merged[0] != plain[0]
