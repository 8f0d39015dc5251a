"""PEFT as the oracle of what adapters do: a base model, adapters of all kinds on disk, and an engine that is compared.

Every logit that the engine samples from is compared with PEFT's for the same tokens, one adapter at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey, compose
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.stepping import step

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCAB = 151
TOLERANCE = 1e-5  # float32 on both sides: other orders of the same sums, relative to the largest logit
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [7, 11]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL, "use_rslora": True},
    "one-layer": {"target_modules": ALL, "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    "dora": {"target_modules": ALL, "use_dora": True, "rank_pattern": {"q_proj": 2}},
    "dora-some": {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "dora-vocabulary": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True},
    "lora-bias": {"target_modules": ALL, "lora_bias": True, "alpha_pattern": {"k_proj": 3}},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["k_proj", "o_proj"], "bias": "lora_only"},
    "dora-bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all", "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved-vocabulary": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-norms": {"target_modules": ["up_proj"], "modules_to_save": ["model.norm", "input_layernorm"]},
    "saved-more-norms": {"target_modules": ["up_proj"], "modules_to_save": ["post_attention_layernorm"]},
    "saved-linears": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "down_proj"]},
    "saved-linear-bias-all": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"], "bias": "all"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 90]},
    "tokens-of-both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 7, 12]},
    },
    "activated": {"target_modules": ALL, "alora_invocation_tokens": INVOCATION},
    "activated-head": {
        "target_modules": ["q_proj", "lm_head"],
        "alora_invocation_tokens": INVOCATION,
        "lora_bias": True,
    },
}

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)
    ),
    "qwen3-tied": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=6, attention_bias=True
        )
    ),
}


@dataclass
class Oracle:
    """A base model and adapters for it, as PEFT saved them and as it reads them."""

    folder: Path
    keys: dict[str | None, AdapterKey | None]
    models: dict[str | None, Any]

    def key(self, adapter: str) -> AdapterKey:
        """The key of an adapter, which is not the base model."""
        key = self.keys[adapter]
        assert key is not None
        return key

    def logits(self, adapter: str | None, tokens: list[int], num_prompt: int) -> Tensor:
        """Those that the tokens after the prompt were drawn from → [outputs, V]"""
        model, options = self.models[adapter], {}
        if adapter is not None and adapter.startswith("activated"):
            start = invocation(tokens[:num_prompt])
            options = {"alora_offsets": [None if start is None else len(tokens) - start]}
        with torch.inference_mode():
            logits: Tensor = model(input_ids=torch.tensor([tokens]), **options).logits[0, num_prompt - 1 : -1]
        return logits

    def add(self, name: str, fields: Mapping[str, Any], seed: int) -> None:
        """An adapter with random weights. Raises what PEFT says of a configuration that it does not allow.

        Activated LoRA has a name that begins with "activated".
        """
        self.write(name, fields, seed)
        self.read(name)

    def write(self, name: str, fields: Mapping[str, Any], seed: int, **options: Any) -> None:
        """Have PEFT save an adapter with random weights; `options`: of `save_pretrained`."""
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of the odd things that are done here on purpose
            config = peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6} | dict(fields)))
            trained = randomised(peft.get_peft_model(copy.deepcopy(self.models[None]), config), seed)
            trained.create_or_update_model_card = lambda folder: None  # takes longer than the adapter
            trained.save_pretrained(self.folder / name, **options)

    def read(self, name: str) -> None:
        """Have PEFT read the adapter of that name, as it is on disk now."""
        with warnings.catch_warnings(action="ignore"):
            base = copy.deepcopy(self.models[None])
            self.models[name] = peft.PeftModel.from_pretrained(base, self.folder / name).eval()
        self.keys[name] = AdapterKey(f"shared/{name}", digest(self.folder / name))

    def add_sum(self, name: str, weights: Mapping[str, float], merged: Mapping[str, Mapping[str, Tensor]]) -> None:
        """A composition: the base's parameters plus the weighted changes of adapters merged into them."""
        base = self.models[None].state_dict()
        model = copy.deepcopy(self.models[None])
        model.load_state_dict(
            {
                key: value + sum(weight * (merged[part][key] - value) for part, weight in weights.items())
                for key, value in base.items()
            }
        )
        self.models[name] = model
        self.keys[name] = compose((self.key(part), weight) for part, weight in weights.items())


def invocation(prompt: list[int]) -> int | None:
    """Where its last occurrence begins."""
    width = len(INVOCATION)
    starts = [i for i in range(len(prompt) - width + 1) if prompt[i : i + width] == INVOCATION]
    return starts[-1] if starts else None


def randomised(model: Any, seed: int) -> Any:
    """Weights far from the usual initial ones, so that each of them is felt in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise.abs())
            elif "lora_" in name:
                parameter.copy_(noise * (0.2 if "embedding" in name else 0.15))
            elif parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def add_all_kinds(folder: Path, base: Any) -> Oracle:
    """An adapter of each kind for a base model, saved by PEFT and read back by it."""
    oracle = Oracle(folder, {None: None}, {None: base.eval()})
    for seed, (name, fields) in enumerate(KINDS.items(), start=1):
        oracle.add(name, fields, seed)
    return oracle


def make_base(family: str, folder: Path) -> Any:
    """A small random model of a family, in `folder`/base."""
    randomised(FAMILIES[family](), 0).save_pretrained(folder / "base")
    return read_base(folder / "base")


def read_base(directory: Path) -> Any:
    """A model as transformers runs it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def oracle_of(family: str, folder: Path) -> Oracle:
    """A small random model of a family, and adapters of all kinds for it."""
    return add_all_kinds(folder, make_base(family, folder))


class RecordingSampler:
    """Notes the logits that each token is drawn from."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.logits: dict[int, list[Tensor]] = {}

    def sample(self, logits: Tensor, requests: Any, mask: Any) -> Any:
        for row, request in zip(logits, requests, strict=True):
            self.logits.setdefault(request.request_id, []).append(row.clone())
        return self._sampler.sample(logits, requests, mask)


class Engine:
    """An engine with the oracle's adapters, and the check that it computes what PEFT computes."""

    def __init__(self, oracle: Oracle, **fields: Any) -> None:
        options: dict[str, Any] = {"model": str(oracle.folder / "base"), "dtype": "float32", "kv_cache_bytes": 1 << 22}
        options |= {"block_size": 4, "threads": 1, "max_model_len": 96}
        self.oracle = oracle
        self.core = EngineCore.load(EngineConfig(**(options | fields)))
        self.sampler = RecordingSampler(self.core.runner.sampler)
        self.core.runner.sampler = self.sampler  # type: ignore[assignment]
        self.tokens: dict[int, list[int]] = {}
        self.asked: dict[int, tuple[str | None, list[int]]] = {}
        self.cached: dict[int, int] = {}
        for name, key in oracle.keys.items():
            if key is not None and name is not None and not key.parts:
                self.core.want_adapter(WantAdapter(key, 1, str(oracle.folder / name)))
        while self.core.has_work():
            for event in step(self.core):
                assert getattr(event, "problems", None) is None, event

    def add(self, prompt: list[int], adapter: str | None, max_tokens: int = 5) -> int:
        number = len(self.asked)
        self.asked[number] = adapter, prompt
        sampling = SamplingParams(seed=number, temperature=0.7, max_tokens=max_tokens)
        self.core.add(AddRequest(number, prompt, sampling, self.oracle.keys[adapter]))
        return number

    def step(self) -> None:
        for message in step(self.core):
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    assert not output.error
                    self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                    self.cached.setdefault(output.request_id, output.num_cached_tokens)

    def finish(self) -> None:
        while self.core.has_work():
            self.step()

    def check(self) -> None:
        for number, (adapter, prompt) in self.asked.items():
            expected = self.oracle.logits(adapter, prompt + self.tokens[number], len(prompt))
            error = (torch.stack(self.sampler.logits[number]) - expected).abs().max() / expected.abs().max()
            assert error < TOLERANCE, f"{adapter}: logits are off by {error:.2e} of the largest"


def random_prompt(length: int, seed: int, invoked_at: int | None = None) -> list[int]:
    prompt: list[int] = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    if invoked_at is not None:
        prompt[invoked_at : invoked_at + len(INVOCATION)] = INVOCATION
    return prompt
