"""Every model family, divided between ranks, against one rank: the same logits with and without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier

import pytest
import torch
from torch import Tensor

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.weights import load_adapter
from loraplex_engine.checkpoint.model_config import ModelConfig, ModelError
from loraplex_engine.checkpoint.shard import WHOLE, Shard
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.models import load_model, read_model_config
from loraplex_engine.models.layout import HEAD_MODULE, layer_linears
from loraplex_engine.ranks.exchange import ALONE
from loraplex_kernels.selection import select_ops
from tests.engine.models.loras import write_lora
from tests.engine.models.test_shards import RANKS, Together
from tests.gguf_files import write_gguf
from tests.reference.test_model_logits import LENGTHS, MODELS, Stepper, llama, of, prompts, randomised

UNDIVIDED = ("llama_head_dim",)  # five heads, for two ranks
# Of the largest logit, float32: sums are taken in another order, and these adapters are large. A head that is another
# rank's, or a bias that both add, is worth more than 1e-2.
TOLERANCE = 5e-5
# Each has something to divide that those before it have not.
FIRST = (
    "llama_biases",
    "phi3",  # tensors that are several projections
    "olmo2",  # norms of whole projections
    "minimax_m2",
    "cohere_norms",  # norms with weights for each head, together
    "stablelm_parallel",  # and apart
    "mixtral",
    "qwen2_moe",  # shared experts with a gate
    "gpt_oss",  # sinks, experts in one tensor with biases
    "granite4_moe",
    "llama4",
    "phimoe",  # biases of the head
    "deepseek_v3",
)


STAGES = tuple(Shard(0, 1, stage, 2) for stage in (0, 1))


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in FIRST else (pytest.mark.long,)


def modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear of the layers, and the head: [N, C]."""
    found = {} if config.tie_word_embeddings else {HEAD_MODULE: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for linear in layer_linears(config, layer):
            whole = ((linear.module, sum(size for _, size in linear.parts)),)
            for module, size in whole if linear.stored_fused else linear.parts:
                found[f"model.layers.{layer}.{module}"] = (size, linear.in_features)
    return found


class Divided:
    """A model that ranks compute together, each in a thread, with the adapters of some directories in its slots."""

    def __init__(self, path: Path, ranks: Sequence[Shard], adapters: Sequence[tuple[AdapterKey, Path]]) -> None:
        self._path, self._ranks, self._adapters = path, ranks, adapters
        stages, world = range(ranks[0].stages), ranks[0].world
        self._given: list[list[Tensor | None]] = [[None] * world for _ in stages]
        self._barriers = [Barrier(world, timeout=60) for _ in stages]
        self._passed: list[SimpleQueue[Tensor]] = [SimpleQueue() for _ in ranks]

    def logits(self) -> list[Tensor]:
        """Of three sequences in two steps, the first without an adapter."""
        with ThreadPoolExecutor(len(self._ranks)) as threads:
            found = list(threads.map(self._run, self._ranks))
        first, *others = found[: self._ranks[0].world]  # the first stage
        for other in others:
            assert all(map(torch.equal, other, first))
        return first

    def _run(self, shard: Shard) -> list[Tensor]:
        try:
            return self._computed(shard)
        except BaseException:
            for barrier in self._barriers:
                barrier.abort()
            raise

    def _computed(self, shard: Shard) -> list[Tensor]:
        ops = select_ops(torch.device("cpu"), "reference")
        config = EngineConfig(model=str(self._path), dtype="float32", max_resident_adapters=4, max_model_len=64)
        rank = Together(shard, self._given[shard.stage], self._barriers[shard.stage], self._passed)
        model = load_model(config, self._path, ops, ranks=rank if shard.processes > 1 else ALONE)
        sites = model.lora_sites()

        def total(name: str, part: Tensor) -> Tensor:
            return rank.add_up(part)

        for slot, (key, directory) in enumerate(self._adapters):
            loaded = load_adapter(key, directory, model.lora_targets(), model.dtype, 4, ops.pack_lora, total=total)
            for site, packed in loaded.packed.items():
                sites[site].table.put(slot, packed)
        stepper = Stepper(model, prompts(), ops, has_head=shard.is_first)
        lora = [(sequence, slot) for slot, sequence in enumerate((1, 2)) if slot < len(self._adapters)]
        stepper.step((0, 11), (1, 9), (2, 6), lora=lora)
        stepper.step((0, LENGTHS[0] - 11), (2, LENGTHS[2] - 6), lora=lora[1:])
        return stepper.results() if shard.is_first else []


def written(base: Path, folder: Path) -> list[tuple[AdapterKey, Path]]:
    """A LoRA and a DoRA adapter on all linears, and where they are."""
    linears = modules(read_model_config(base))
    return [(write_lora(folder / str(dora), linears, dora=dora), folder / str(dora)) for dora in (False, True)]


def assert_divisible(base: Path, folder: Path, ranks: Sequence[Shard] = RANKS) -> None:
    """These ranks compute what one computes."""
    adapters = written(base, folder)
    one, two = (Divided(base, each, adapters).logits() for each in ([WHOLE], ranks))
    for ours, expected in zip(two, one, strict=True):
        assert (ours - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks_of(name)) for name in sorted(MODELS) if name not in UNDIVIDED],
)
def test_two_ranks_give_the_logits_of_one(name: str, tmp_path: Path) -> None:
    randomised(MODELS[name]()).save_pretrained(tmp_path / "base")
    assert_divisible(tmp_path / "base", tmp_path)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in sorted(MODELS)])
def test_two_stages_give_the_bits_of_one(name: str, tmp_path: Path) -> None:
    randomised(MODELS[name]()).save_pretrained(tmp_path / "base")
    adapters = written(tmp_path / "base", tmp_path)
    one, two = (Divided(tmp_path / "base", ranks, adapters).logits() for ranks in ([WHOLE], STAGES))
    assert all(map(torch.equal, two, one))


@pytest.mark.parametrize("name", ["mixtral", "olmo2"])
def test_two_stages_of_two_ranks_give_the_logits_of_one(name: str, tmp_path: Path) -> None:
    randomised(MODELS[name]()).save_pretrained(tmp_path / "base")
    assert_divisible(tmp_path / "base", tmp_path, [Shard.of_process(process, 2, 2) for process in range(4)])


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    randomised(llama()).save_pretrained(tmp_path / "base")
    count = read_model_config(tmp_path / "base").num_layers
    with pytest.raises(ModelError, match=f"{count} layers cannot be divided into {count + 1} stages"):
        Divided(tmp_path / "base", [Shard(0, 1, 0, count + 1)], []).logits()


@pytest.mark.parametrize("stored", ["F32", "Q4_0", "Q8_0"])
def test_files_of_blocks_are_divided_between_them(stored: str, tmp_path: Path) -> None:
    model = randomised(of("Mixtral", hidden_size=64, intermediate_size=128, num_attention_heads=4, num_local_experts=3))
    write_gguf(tmp_path / "model.gguf", model, "llama", stored)
    assert_divisible(tmp_path / "model.gguf", tmp_path)


def test_a_part_that_would_begin_within_a_block_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", randomised(llama(hidden_size=96, intermediate_size=96)), "llama", "Q4_0")
    with pytest.raises(ModelError, match="0 to 48 of 96 features, cuts through a group or block of 32"):
        Divided(tmp_path / "model.gguf", RANKS, []).logits()
