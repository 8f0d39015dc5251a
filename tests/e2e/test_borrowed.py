"""The true server with a model that transformers' own class computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_ADAPTERS, MODEL_CAPABILITY_CONSTRAINT, Model
from tests.e2e.conftest import DEMO, END_SECONDS, START_SECONDS, running_server

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROMPT = "The fox found the"


def write_model(directory: Path) -> Any:
    """A small random GPT-2 with the storyteller's tokenizer."""
    demo = DEMO / "models" / "storyteller"
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.5}
    config = transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, directory)
    return model


def write_adapter(model: Any, directory: Path) -> Any:
    """An adapter on all of its linears; the model with it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.create_or_update_model_card = lambda folder: None
    adapted.save_pretrained(directory)
    return adapted.eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


async def test_a_model_that_no_native_family_reads_is_served_with_its_adapter(tmp_path: Path) -> None:
    base = write_model(tmp_path / "gpt2")
    prompt = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")(PROMPT)["input_ids"]
    expected = {"gpt2": greedy(base, prompt, 12)}
    expected["tuned"] = greedy(write_adapter(base, tmp_path / "tuned"), prompt, 12)
    hosted = {"name": "gpt2", "model": str(tmp_path / "gpt2"), "dtype": "float32", "threads": 1}
    settings: dict[str, Any] = {
        "models": [hosted | {"kv_cache_bytes": 16 << 20}],
        "adapter_roots": [str(tmp_path)],
        "adapters": [{"name": "tuned", "model": "gpt2", "source": str(tmp_path / "tuned")}],
    }
    with running_server(tmp_path, **settings) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            await client.wait_until_serving("models/gpt2", timeout=START_SECONDS)
            for target, tokens in expected.items():
                options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "token_ids": True}
                response = await client.generate(target, PROMPT, **options)
                assert list(response.outputs[0].token_ids) == tokens
        async with AsyncAdminClient(server.admin, timeout=END_SECONDS) as admin:
            model = await admin.get_model("gpt2")
            assert model.architecture == "GPT2LMHeadModel"
            assert model.implementation == Model.IMPLEMENTATION_TRANSFORMERS
            assert {MODEL_CAPABILITY_ADAPTERS, MODEL_CAPABILITY_CONSTRAINT} <= set(model.capabilities)
        assert server.terminate() == 0
