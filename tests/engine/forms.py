"""A tiny model whose tokens are bytes, and an engine that knows their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, RequestOutput, SetVocabulary, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from tests.reference.stepping import step

EOS = 256
WORDS = (b'{"', b'": ', b"true", b"null", b"aa", b"12", b"\xc3", "é".encode())
TOKENS = [*(bytes([byte]) for byte in range(256)), b"", b"", *WORDS]  # two control tokens: EOS, and one more
VOCAB = len(TOKENS) + 3  # a head that is padded


def save_tiny_model(folder: Path) -> None:
    """A model with random weights: whatever it writes has no form of its own."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1} | heads
    config = transformers.LlamaConfig(**shape, vocab_size=VOCAB, max_position_embeddings=512)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


class Engine:
    """An engine core in the test's own process, and the text that came out of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        fields: dict[str, Any] = {
            "kernels": "reference",
            "kv_cache_bytes": 4 << 20,
            "block_size": 4,
            "threads": 1,
        } | settings
        self.core = EngineCore.load(EngineConfig(model=str(folder), **fields))
        self.core.set_vocabulary(SetVocabulary(TOKENS))
        self.outputs: dict[int, list[RequestOutput]] = {}

    def add(self, request_id: int, grammar: str, output: list[int] | None = None, **fields: Any) -> None:
        defaults: dict[str, Any] = {"seed": request_id, "max_tokens": 200, "eos_token_ids": (EOS,)}
        sampling = SamplingParams(**(defaults | fields))
        prompt = [65 + request_id % 8, 66, 67]
        self.core.add(AddRequest(request_id, prompt, sampling, output_token_ids=output or [], grammar=grammar))

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

    def text(self, request_id: int) -> bytes:
        return b"".join(TOKENS[token] for token in self.tokens(request_id))

    def end(self, request_id: int) -> RequestOutput:
        return self.outputs[request_id][-1]
