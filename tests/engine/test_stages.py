"""An engine whose layers are divided into stages, each a process or two, draws the tokens of one process.

Between stages nothing is summed up: what one process computes is computed to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.drafts import DraftConfig, DraftKind
from loraplex_engine.link.messages import AddRequest, WantAdapter
from loraplex_engine.link.pooling import PoolingMethod, PoolingParams
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.models import read_model_config
from tests.engine.forms import VOCAB, Engine
from tests.engine.models.loras import write_lora
from tests.engine.quantization.checkpoints import make_twins
from tests.engine.quantization.formats import FORMATS
from tests.engine.test_ranks import BLOCK_BYTES, HIDDEN, INNER, Bench, group_of
from tests.gguf_files import write_gguf
from tests.reference.test_divided_logits import modules
from tests.reference.test_model_logits import of, randomised

LAYERS = 3  # the first stage has one of them
SHAPE: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TWO_STAGES: Mapping[str, int] = {"pipeline_parallel": 2}
Adapters = Sequence[tuple[AdapterKey, Path]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def benches(folder: Path) -> Iterator[list[Bench]]:
    """Of one process and of two stages; with drafts, and too few blocks for all requests."""
    drafts = DraftConfig(kind=DraftKind.NGRAM, tokens=3)
    largest: Sequence[tuple[int, Mapping[str, int]]] = (
        (LAYERS, {}),
        (2, TWO_STAGES),
    )  # the layers of the stage that has most
    found = [
        Bench(folder, 1, drafts=drafts, kv_cache_bytes=40 * BLOCK_BYTES * layers // 2, **stages)
        for layers, stages in largest
    ]
    yield found
    for bench in found:
        bench.core.close()


def test_two_stages_draw_what_one_process_draws(benches: list[Bench]) -> None:
    one, two = (bench.ask() for bench in benches)
    assert two == one
    for bench in benches:
        stats = bench.core.stats()
        assert stats.num_preemptions
        assert stats.prefix_cache_hits
        assert stats.draft_tokens
        bench.core.blocks.check()


def test_hidden_states_have_the_bits_of_one_process(benches: list[Bench]) -> None:
    found = []
    for bench in benches:
        bench.add(50, pooling=PoolingParams(method=PoolingMethod.LAST), max_tokens=0)
        bench.engine.finish()
        found.append(bench.engine.end(50).pooled)
    assert found[1] == found[0]


def test_a_step_passes_its_rows_on_once_and_gets_back_those_that_are_drawn_from(benches: list[Bench]) -> None:
    bench = benches[1]
    before = bench.core.beat().ranks
    bench.core.add(AddRequest(70, list(range(12)), SamplingParams(seed=0, max_tokens=1), bench.adapters[2]))
    bench.engine.finish()
    after = bench.core.beat().ranks
    passed = [
        (new.passes - old.passes, new.nbytes - old.nbytes, new.sums - old.sums, new.gatherings - old.gatherings)
        for new, old in zip(after, before, strict=True)
    ]
    assert passed == [(1, 4 * 12 * HIDDEN, 0, 0), (1, 4 * HIDDEN, 0, 0)]
    assert group_of(bench).traffic.passes == after[0].passes


def test_a_prompt_in_the_middle_is_not_passed_back(benches: list[Bench]) -> None:
    bench = benches[1]
    before = bench.core.beat().ranks
    prompt = [(5 * place) % 190 for place in range(40)]  # 24 tokens in the first step
    bench.core.add(AddRequest(71, prompt, SamplingParams(seed=0, max_tokens=1)))
    bench.engine.finish()
    after = bench.core.beat().ranks
    assert [new.passes - old.passes for new, old in zip(after, before, strict=True)] == [2, 1]


def test_an_adapter_is_where_its_layers_are_and_counts_there(benches: list[Bench], tmp_path: Path) -> None:
    used = []
    key = write_lora(tmp_path / "last", {f"model.layers.{LAYERS - 1}.mlp.down_proj": (HIDDEN, INNER)})
    for bench in benches:
        before = bench.core.pool.used_bytes
        bench.core.want_adapter(WantAdapter(key, 1, str(tmp_path / "last"), least=Residency.DEVICE))
        bench.engine.finish()
        used.append(bench.core.pool.used_bytes - before)
        loaded = bench.core.store.get(key)
        assert loaded is not None
        assert bool(loaded.packed) == (bench is benches[0])
        assert not loaded.warnings
    assert used[1] == used[0] > 0


def replacing(folder: Path) -> AdapterKey:
    """An adapter with norms of both stages, the embedding's LoRA, and LoRA in each layer."""
    key = write_lora(folder, {f"model.layers.{layer}.self_attn.v_proj": (16, HIDDEN) for layer in range(LAYERS)})
    tensors, prefix = load_file(folder / "adapter_model.safetensors"), "base_model.model.model"
    random = torch.Generator().manual_seed(3)
    for norm in ("norm", *(f"layers.{layer}.input_layernorm" for layer in range(LAYERS))):
        tensors[f"{prefix}.{norm}.weight"] = torch.rand(HIDDEN, generator=random) + 0.5
    tensors[f"{prefix}.embed_tokens.lora_embedding_A"] = torch.randn(2, VOCAB, generator=random)
    tensors[f"{prefix}.embed_tokens.lora_embedding_B"] = torch.randn(HIDDEN, 2, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["modules_to_save"] = ["norm", "input_layernorm"]
    fields["target_modules"].append("embed_tokens")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return AdapterKey(key.name, digest(folder))


def whole(folder: Path) -> AdapterKey:
    """An adapter with an embedding and a head of its own."""
    write_lora(folder, {"model.layers.1.self_attn.q_proj": (HIDDEN, HIDDEN)})
    tensors = load_file(folder / "adapter_model.safetensors")
    random = torch.Generator().manual_seed(4)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(VOCAB, HIDDEN, generator=random)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["modules_to_save"] = ["embed_tokens", "lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return AdapterKey("shared/whole", digest(folder))


@pytest.mark.parametrize("make", [replacing, whole])
def test_what_adapters_replace_is_replaced_in_its_stage(
    benches: list[Bench], tmp_path: Path, make: Callable[[Path], AdapterKey]
) -> None:
    key = make(tmp_path / "adapter")
    found = []
    for bench in benches:
        bench.core.want_adapter(WantAdapter(key, 1, str(tmp_path / "adapter"), least=Residency.DEVICE))
        number = 90 if make is replacing else 91
        bench.core.add(AddRequest(number, [5, 6, 7], SamplingParams(seed=1, max_tokens=12), key))
        bench.engine.finish()
        found.append(bench.told(number))
    assert found[1] == found[0]
    assert not found[0][2]
    assert len(found[0][0]) > 1


def test_an_adapter_that_does_not_fit_a_later_stage_is_refused(benches: list[Bench], tmp_path: Path) -> None:
    bench = benches[1]
    key = write_lora(tmp_path / "damaged", {f"model.layers.{LAYERS - 1}.mlp.down_proj": (HIDDEN, INNER - 1)})
    bench.core.want_adapter(WantAdapter(key, 1, str(tmp_path / "damaged"), least=Residency.DEVICE))
    bench.core.add(AddRequest(80, [1, 2, 3], SamplingParams(seed=0, max_tokens=2), key))
    bench.engine.finish()
    assert "layers.2.mlp.down_proj" in bench.engine.end(80).error
    bench.core.add(AddRequest(81, [1, 2, 3], SamplingParams(seed=0, max_tokens=2), bench.adapters[2]))
    bench.engine.finish()
    assert len(bench.engine.tokens(81)) == 2


# ---- however the model is stored -------------------------------------------------------------------------------------


def dense(folder: Path) -> Path:
    randomised(of("Llama", **(dict(SHAPE) | {"num_hidden_layers": 2}))).save_pretrained(folder / "base")
    return folder / "base"


def experts(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_local_experts": 3}
    randomised(of("Mixtral", **sizes)).save_pretrained(folder / "base")
    return folder / "base"


def gguf(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_local_experts": 3}
    write_gguf(folder / "base.gguf", randomised(of("Mixtral", **sizes)), "llama", "Q4_0")
    return folder / "base.gguf"


def packed(name: str) -> Callable[[Path], Path]:
    """A checkpoint that is quantised in this format."""

    def make(folder: Path) -> Path:
        section, packer = FORMATS[name]
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return make_twins(folder, section, packer, architectures=["LlamaForCausalLM"], **sizes).quantised

    return make


def drawn(base: Path, adapters: Adapters, **fields: Any) -> list[list[int]]:
    """The tokens of six requests, two of them of the base and two of each adapter, greedy and seeded."""
    settings: dict[str, Any] = {"kernels": "cpu", "dtype": "float32", "max_model_len": 64, "kv_cache_bytes": 2 << 20}
    engine = Engine(base, **(settings | fields))
    try:
        for key, path in adapters:
            engine.core.want_adapter(WantAdapter(key, 1, str(path), least=Residency.DEVICE))
        keys: list[AdapterKey | None] = [None, *(key for key, _ in adapters)]
        for number in range(6):
            sampling = SamplingParams(seed=number, max_tokens=12, temperature=float(number % 2))
            prompt = [(3 * place) % 60 for place in range(4 + number)]
            engine.core.add(AddRequest(number, prompt, sampling, keys[number % 3]))
            engine.step()
        engine.finish()
        assert not any(engine.end(number).error for number in range(6))
        return [engine.tokens(number) for number in range(6)]
    finally:
        engine.core.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "fields"),
    [
        pytest.param(dense, {}, id="dense"),
        pytest.param(dense, {"run_ahead": True}, id="run-ahead"),
        pytest.param(dense, {"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param(dense, {"quantization": "nf4"}, id="nf4"),
        pytest.param(dense, {"quantization": "int4"}, id="int4"),
        pytest.param(experts, {}, id="experts"),
        pytest.param(gguf, {}, id="gguf"),
        pytest.param(packed("awq gemm"), {}, id="awq"),
        pytest.param(packed("gptq"), {}, id="gptq"),
    ],
)
def test_all_divisions_draw_the_same_however_the_model_is_stored(
    make: Callable[[Path], Path], fields: Mapping[str, Any], tmp_path: Path
) -> None:
    base = make(tmp_path)
    linears = modules(read_model_config(base))
    adapters = [(write_lora(tmp_path / str(dora), linears, dora=dora), tmp_path / str(dora)) for dora in (False, True)]
    one = drawn(base, adapters, **fields)
    assert drawn(base, adapters, **{**TWO_STAGES, **fields}) == one
    if fields.get("dtype") != "bfloat16":  # sums over ranks are rounded otherwise there
        assert drawn(base, adapters, tensor_parallel=2, **fields) == one


@pytest.mark.slow
def test_two_stages_of_two_ranks_draw_the_same(tmp_path: Path) -> None:
    base = experts(tmp_path)
    linears = modules(read_model_config(base))
    adapters = [(write_lora(tmp_path / str(dora), linears, dora=dora), tmp_path / str(dora)) for dora in (False, True)]
    assert drawn(base, adapters, tensor_parallel=2, pipeline_parallel=2) == drawn(base, adapters)
