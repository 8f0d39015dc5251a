"""Two ranks in one process, each with its share of a model, compute what one computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapters.runtime.weights import load_adapter
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.shard import WHOLE, Shard
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import LanguageModel, load_model
from loraplex_engine.models.step_batch import StepBatch
from loraplex_engine.ranks.exchange import ALONE, Alone, Ranks
from loraplex_kernels.ops import AttentionMetadata, LoraSegments, Ops
from loraplex_kernels.selection import select_ops
from tests.engine.models.loras import write_lora
from tests.engine.quantization.checkpoints import make_twins
from tests.engine.quantization.formats import FORMATS

RANKS = (Shard(0, 2), Shard(1, 2))
LENGTH, SPLIT = 23, 9  # tokens, of which those from SPLIT on have the adapter
# Of the largest logit, float32: sums are taken in another order.
TOLERANCE = 1e-5
HIDDEN, INNER = 128, 256
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_up_proj": (2 * INNER, HIDDEN),  # both parts by one LoRA
    "mlp.down_proj": (HIDDEN, INNER),
}


class Together:
    """One rank in a thread, which meets those of its stage at a barrier."""

    def __init__(
        self,
        shard: Shard,
        given: list[Tensor | None],
        barrier: Barrier,
        passed: Sequence[SimpleQueue[Tensor]] = (),  # to each of all ranks
    ) -> None:
        self.shard, self._given, self._barrier, self._passed = shard, given, barrier, passed

    def add_up(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def side_by_side(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x), dim=1)

    def pass_on(self, x: Tensor) -> None:
        self._passed[self.shard.after].put(x.clone())

    def take_over(self, x: Tensor) -> Tensor:
        found = self._passed[self.shard.process].get(timeout=60)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        return x.copy_(found)

    def _all(self, x: Tensor) -> list[Tensor]:
        self._given[self.shard.rank] = x
        self._barrier.wait()
        found = [each.clone() for each in self._given if each is not None]
        self._barrier.wait()
        return found


def load(directory: Path, ops: Ops, ranks: Ranks, **fields: Any) -> LanguageModel:
    config = EngineConfig(model=str(directory), dtype="float32", max_resident_adapters=1, **fields)
    return load_model(config, directory, ops, ranks=ranks)


def logits(
    directory: Path,
    lora: Path,
    ranks: Sequence[Shard],
    kernels: str,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    **fields: Any,
) -> Tensor:
    """The logits of a prompt whose end has an adapter, as computed by these ranks together → [T, V]"""
    key = write_lora(lora, {f"model.layers.{i}.{m}": s for i in (0, 1) for m, s in modules.items()}, bias=True)
    shared: list[Tensor | None] = [None] * len(ranks)
    barrier = Barrier(len(ranks), timeout=60)

    @torch.inference_mode()
    def run(shard: Shard) -> Tensor:
        ops = select_ops(torch.device("cpu"), kernels)
        model = load(directory, ops, Together(shard, shared, barrier) if len(ranks) > 1 else ALONE, **fields)
        adapter, sites = (
            load_adapter(key, lora, model.lora_targets(), model.dtype, 4, ops.pack_lora),
            model.lora_sites(),
        )
        for site, packed in adapter.packed.items():
            sites[site].table.put(0, packed)
        rows = torch.arange(LENGTH)
        starts, lengths = (torch.tensor(each, dtype=torch.int32) for each in ([0, LENGTH], [LENGTH]))
        blocks = torch.arange(2, dtype=torch.int32).unsqueeze(0)
        attention = AttentionMetadata(starts, lengths, blocks, rows, LENGTH, LENGTH)
        slot, first, end = (torch.tensor([each], dtype=torch.int32) for each in (0, SPLIT, LENGTH))
        segments = LoraSegments(((0, SPLIT, LENGTH),), slot, first, end)
        cache = [ops.allocate_kv(2, 16, model.head_shape, model.dtype) for _ in model.config.layers]
        return model.logits(model.forward(StepBatch(rows, rows, attention, segments, rows), cache))

    with ThreadPoolExecutor(len(ranks)) as threads:
        first, *others = threads.map(run, ranks)
    assert all(torch.equal(each, first) for each in others)
    return first


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("kv_heads", [1, 2])  # one: both ranks hold it
@pytest.mark.parametrize("stored", ["dense", "gptq", "nf4 while loaded"])
def test_two_ranks_give_the_logits_of_one(tmp_path: Path, kernels: str, kv_heads: int, stored: str) -> None:
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4}
    biases: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    section, packer = FORMATS["gptq"]
    twins = make_twins(tmp_path, section, packer, num_key_value_heads=kv_heads, **shape, **biases)
    fields: dict[str, Any] = {"quantization": "nf4"} if stored.startswith("nf4") else {}
    directory = twins.quantised if stored == "gptq" else twins.dense
    one = logits(directory, tmp_path / "one", [WHOLE], kernels, **fields)
    two = logits(directory, tmp_path / "two", RANKS, kernels, **fields)
    assert (two - one).abs().max() < TOLERANCE * one.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("awq gemm", "bitsandbytes int8") else pytest.mark.long)
        for name in FORMATS
        if name not in ("gptq act-order", "fp8 blocks cut at the edges")  # which cannot be divided
    ],
)
def test_of_every_quantised_form_two_ranks_give_the_logits_of_one(tmp_path: Path, name: str) -> None:
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4}
    twins = make_twins(tmp_path, *FORMATS[name], architectures=["LlamaForCausalLM"], num_key_value_heads=2, **shape)
    one = logits(twins.quantised, tmp_path / "one", [WHOLE], "cpu")
    two = logits(twins.quantised, tmp_path / "two", RANKS, "cpu")
    assert (two - one).abs().max() < TOLERANCE * one.abs().max()


def test_a_share_that_no_rank_can_have_is_refused(tmp_path: Path) -> None:
    directory, ops = make_twins(tmp_path, *FORMATS["gptq"]).dense, select_ops(torch.device("cpu"), "reference")
    with pytest.raises(ModelError, match="in 2 units cannot be divided equally among 4 ranks"):
        load(directory, ops, Alone(Shard(0, 4)))
