"""The whole engine against transformers + PEFT: a mixed batch gives each request what it gets when it runs alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.reference.stepping import step

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCAB = 199
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 16, "lora_alpha": 16, "target_modules": ALL_LINEARS},
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"r": 8, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    "patterned": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["k_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.k_proj": 5},
        "alpha_pattern": {"up_proj": 7},
    },
    "one-layer": {"r": 1, "lora_alpha": 3, "target_modules": ALL_LINEARS, "layers_to_transform": [1]},
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Oracle:
    """transformers + PEFT, one request at a time."""

    model: Any
    folder: Path
    keys: dict[str, AdapterKey]

    def greedy(self, prompt: list[int], adapter: str | None, max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            if adapter is None:
                with self.model.disable_adapter():
                    out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            else:
                self.model.set_adapter(adapter)
                out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


def make_base(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, head_dim=16))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_base(request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # transformers' initial weights are so small that every next token is nearly a tie
    model.save_pretrained(folder / "base")
    for index, (name, fields) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(**fields, task_type="CAUSAL_LM")
        if index == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.peft_config[next(iter(ADAPTERS))].base_model_name_or_path = "base"
    for name in ADAPTERS:
        model.peft_config[name].base_model_name_or_path = "base"
        model.save_pretrained(folder / "adapters", selected_adapters=[name])
    keys = {name: AdapterKey(f"shared/{name}", digest(folder / "adapters" / name)) for name in ADAPTERS}
    return Oracle(model.eval(), folder, keys)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=ON_GPU)])
def make_core(oracle: Oracle, request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cpu":
        pytest.importorskip("loraplex_kernels.cpu.library")
    cores = []

    def make(**fields: Any) -> EngineCore:
        settings = {
            "kernels": request.param,
            "device": "cuda" if request.param == "triton" else "cpu",
            "dtype": "float32",
            "kv_cache_bytes": 4 << 20,
            "block_size": 4,
            "max_model_len": 128,
            "threads": 1,
        }
        core = EngineCore.load(EngineConfig(model=str(oracle.folder / "base"), **(settings | fields)))
        for name, key in oracle.keys.items():
            core.want_adapter(WantAdapter(key, 1, str(oracle.folder / "adapters" / name)))
        while core.has_work():
            step(core)
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.close()


class Client:
    """Feeds a core and collects what comes out."""

    def __init__(self, core: EngineCore, keys: dict[str, AdapterKey]) -> None:
        self.core = core
        self.keys = keys
        self.outputs: dict[int, list[RequestOutput]] = {}

    def add(self, request_id: int, prompt: list[int], adapter: str | None, **fields: Any) -> None:
        sampling = SamplingParams(**({"seed": 0, "temperature": 0.0, "max_tokens": 8} | fields))
        key = None if adapter is None else self.keys[adapter]
        self.core.add(AddRequest(request_id, prompt, sampling, key))

    def step(self) -> None:
        for message in step(self.core):
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)

    def finish(self) -> None:
        while self.core.has_work():
            self.step()

    def tokens(self, request_id: int) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},  # long prompts in chunks
        {"kv_cache_bytes": 40 * 4 * 3 * 2 * 2 * 16 * 4},  # 40 blocks: preemptions
        {"enable_prefix_caching": False},
    ],
    ids=["plain", "chunked", "preempted", "uncached"],
)
def test_mixed_batch_equals_each_request_alone(oracle, make_core, settings):
    names = [None, *ADAPTERS]
    lengths = [1, 3, 4, 5, 8, 13, 16, 17, 21, 30, 33, 40, 2, 9, 64, 27]
    requests = [
        (index, random_prompt(length, index), names[index % len(names)], 6 + index % 9)
        for index, length in enumerate(lengths)
    ]
    core = make_core(**settings)
    client = Client(core, oracle.keys)
    for index, prompt, adapter, max_tokens in requests:
        client.add(index, prompt, adapter, max_tokens=max_tokens)
        if index % 3:  # some arrive together, most while others run
            client.step()
    client.finish()
    for index, prompt, adapter, max_tokens in requests:
        expected = oracle.greedy(prompt, adapter, max_tokens)
        assert client.tokens(index) == expected, (index, adapter, client.outputs[index][-1].error)
        assert client.outputs[index][-1].finish_reason is FinishReason.MAX_TOKENS
    if "kv_cache_bytes" in settings:
        assert core.scheduler.num_preemptions > 0
    stats = core.stats()
    assert stats.free_blocks + stats.cached_blocks == stats.total_blocks


def test_adapters_change_the_output(oracle):
    prompt = random_prompt(12, 99)
    outputs = {tuple(oracle.greedy(prompt, name, 8)) for name in [None, *ADAPTERS]}
    assert len(outputs) == len(ADAPTERS) + 1


def test_a_prefix_of_another_adapter_is_not_reused(oracle, make_core):
    client = Client(make_core(), oracle.keys)
    prompt = random_prompt(40, 5)
    for index, adapter in enumerate([None, "wide", "attention", None, "wide"]):
        client.add(index, prompt, adapter)
        client.finish()
        assert client.tokens(index) == oracle.greedy(prompt, adapter, 8)
    cached = [client.outputs[index][0].num_cached_tokens for index in range(5)]
    assert cached == [0, 0, 0, 36, 36]


@pytest.mark.parametrize("neighbours", [1, 5, 11])
def test_base_rows_are_bit_identical_beside_adapters(oracle, make_core, neighbours):
    """The same batch twice: the other rows use adapters, or not. The base row's log-probabilities agree to the bit."""

    def run(adapters: list[str | None]) -> list[Any]:
        client = Client(make_core(enable_prefix_caching=False), oracle.keys)
        client.add(0, random_prompt(11, 0), None, num_logprobs=5)
        for index, adapter in enumerate(adapters, start=1):
            client.add(index, random_prompt(7 + index, index), adapter)
        client.finish()
        return [output.logprobs for output in client.outputs[0]]

    names = list(ADAPTERS)
    assert run([None] * neighbours) == run([names[i % len(names)] for i in range(neighbours)])


def test_prompt_logprobs_equal_transformers(oracle, make_core):
    prompt = random_prompt(30, 3)
    client = Client(make_core(max_num_batched_tokens=8), oracle.keys)
    client.add(0, prompt, "wide", num_prompt_logprobs=2)
    client.finish()
    found = client.outputs[0][0].prompt_logprobs
    oracle.model.set_adapter("wide")
    with torch.inference_mode():
        expected = torch.log_softmax(oracle.model(input_ids=torch.tensor([prompt])).logits[0], -1)
    assert found is not None
    assert found[0] is None
    assert len(found) == len(prompt)
    for position in range(1, len(prompt)):
        details = found[position]
        assert details is not None
        assert details.token_id == prompt[position]
        # float32 through three layers with weights three times the usual: 1e-4 of the value, as for logits
        assert details.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), rel=1e-4)
        assert details.top_ids == expected[position - 1].topk(2).indices.tolist()


def test_a_score_computes_its_prefix_once_and_equals_transformers(oracle, make_core):
    prefix, ends = random_prompt(21, 3), [random_prompt(5, 8), random_prompt(9, 9)]
    client = Client(make_core(), oracle.keys)
    client.add(9, random_prompt(6, 2), "attention", max_tokens=12)
    for number, end in enumerate(ends):
        client.add(
            number,
            prefix + end,
            "wide",
            max_tokens=0,
            num_prompt_logprobs=0,
            prompt_logprobs_from=21,
            logprob_token_ids=(7, 8),
        )
    client.finish()
    assert client.tokens(9) == oracle.greedy(random_prompt(6, 2), "attention", 12)
    assert [client.outputs[number][0].num_cached_tokens for number in (0, 1)] == [0, 20]
    oracle.model.set_adapter("wide")
    for number, end in enumerate(ends):
        with torch.inference_mode():
            logits = oracle.model(input_ids=torch.tensor([prefix + end])).logits[0, 20:-1]
        expected = torch.log_softmax(logits, -1)
        [output] = client.outputs[number]
        assert output.finish_reason is FinishReason.MAX_TOKENS
        assert output.prompt_logprobs is not None
        assert [each.token_id for each in output.prompt_logprobs if each is not None] == end
        found = torch.tensor([[each.logprob, *each.named_logprobs] for each in output.prompt_logprobs if each])
        wanted = torch.tensor([[token, 7, 8] for token in end])
        assert torch.allclose(found, expected.gather(-1, wanted), rtol=1e-5, atol=1e-5)


def test_seeded_sampling_does_not_depend_on_the_batch(oracle, make_core):
    prompt = random_prompt(9, 1)

    def run(num_neighbours: int) -> list[int]:
        client = Client(make_core(), oracle.keys)
        for index in range(1, num_neighbours + 1):
            client.add(index, random_prompt(5, index), "wide", temperature=1.0, seed=index)
        client.add(0, prompt, None, temperature=1.2, top_p=0.9, seed=7, max_tokens=12)
        client.finish()
        return client.tokens(0)

    assert run(0) == run(6)
