"""Small models in transformers and in an engine, both of which search with beams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.beams import Beams, EarlyStopping
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, SetVocabulary, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.stepping import step

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCAB, EOS, BLOCK = 61, (2, 7), 4
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
}
LETTERS = tuple("abcdefghijklmnopqrst")
PAIRS = ("ab", "ba", "cd", "de", "ea", "fo", "od", "12", "34", "1,", ", ", "0,")
# Control tokens, EOS among them, and texts; the rest of the vocabulary has none.
TEXTS = ("", "", "", *"0123", "", *"456789", ",", " ", "é", *LETTERS, *PAIRS)
EARLY = {EarlyStopping.HEURISTIC: False, EarlyStopping.ALWAYS: True, EarlyStopping.NEVER: "never"}


class Family:
    """A small model with an adapter, in transformers and on disk."""

    def __init__(self, name: str, folder: Path) -> None:
        model, config, fields = FAMILIES[name]
        torch.manual_seed(5)
        base = getattr(transformers, model)(getattr(transformers, config)(**SHAPE, **fields)).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(3.0)  # else every next token is nearly a tie
        base.save_pretrained(folder / "base")
        targets = ["q_proj", "v_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, lora, adapter_name="tuned")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.model.peft_config["tuned"].base_model_name_or_path = "base"
        self.model.save_pretrained(folder / "adapters")
        self.folder = folder
        self.key = AdapterKey("shared/tuned", digest(folder / "adapters" / "tuned"))

    def searched(self, prompt: list[int], tuned: bool, **options: Any) -> tuple[list[list[int]], list[float]]:
        """The outputs and their scores, as transformers finds them."""
        found = self.generated(prompt, tuned, **options)
        return outputs_of(found, prompt), found.sequences_scores.tolist()

    def generated(self, prompt: list[int], tuned: bool, **options: Any) -> Any:
        """What transformers' `generate` returns."""
        ids = torch.tensor([prompt])
        call = {
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": list(EOS),
            "attention_mask": torch.ones_like(ids),
        }
        call |= {"return_dict_in_generate": True, "output_scores": True} | options
        with torch.inference_mode():
            if tuned:
                return self.model.generate(input_ids=ids, **call)
            with self.model.disable_adapter():
                return self.model.generate(input_ids=ids, **call)


def outputs_of(found: Any, prompt: list[int]) -> list[list[int]]:
    """The tokens of each output that transformers found, without what fills it up."""
    lengths = (found.beam_indices >= 0).sum(dim=1).tolist()
    return [row[len(prompt) :][:length].tolist() for row, length in zip(found.sequences, lengths, strict=True)]


class Bench:
    """An engine, and what comes out of it by request."""

    def __init__(self, family: Family, **fields: Any) -> None:
        settings: dict[str, Any] = {"kernels": "cpu", "device": "cpu", "dtype": "float32", "kv_cache_bytes": 4 << 20}
        settings |= {"threads": 1, "block_size": BLOCK, "max_model_len": 96, "max_num_seqs": 16} | fields
        self.core = EngineCore.load(EngineConfig(model=str(family.folder / "base"), **settings))
        self.key = family.key
        self.core.want_adapter(WantAdapter(family.key, 1, str(family.folder / "adapters" / "tuned")))
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.core.set_vocabulary(SetVocabulary([text.encode() for text in TEXTS]))
        self.finish()

    def search(
        self, number: int, prompt: list[int], tuned: bool, beams: Beams, grammar: str = "", **fields: Any
    ) -> None:
        ids = [number * 100 + place for place in range(len(beams.output_ids))]
        sampled: dict[str, Any] = {"seed": 0, "temperature": 0.0, "eos_token_ids": EOS} | fields
        sampling = SamplingParams(**sampled, num_candidates=beams.num_candidates(len(EOS)))
        key = self.key if tuned else None
        self.core.add(AddRequest(ids[0], prompt, sampling, key, grammar=grammar, beams=replace_ids(beams, ids)))

    def step(self) -> None:
        for message in step(self.core):
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)

    def finish(self) -> None:
        while self.core.has_work():
            self.step()

    def found(self, number: int, count: int) -> tuple[list[list[int]], list[float]]:
        last = [self.outputs[number * 100 + place][-1] for place in range(count)]
        assert not any(output.error for output in last), last
        return [output.token_ids for output in last], [output.score or 0.0 for output in last]


def replace_ids(beams: Beams, ids: list[int]) -> Beams:
    return Beams(beams.width, ids, beams.length_penalty, beams.early_stopping)


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCAB, (length,), generator=generator).tolist()
