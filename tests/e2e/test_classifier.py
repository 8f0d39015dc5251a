"""The true server with a base model that has a classification head: over gRPC, over HTTP and from the command line."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import AsyncAdminClient, AsyncClient, Unsupported
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_CLASSIFY, MODEL_CAPABILITY_CONSTRAINT
from tests.e2e.conftest import DEMO, END_SECONDS, LORAPLEX, START_SECONDS, Server, running_server
from tests.service.http.caller import caller_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TEXTS = ["The fox found the river.", "It rained.", "A"]
LABELS = ["bad", "good"]


def write_model(directory: Path) -> Any:
    """A small random classifier with the storyteller's tokenizer."""
    demo = DEMO / "models" / "storyteller"
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=None,
        id2label=dict(enumerate(LABELS)),
    )
    model = transformers.Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, directory)
    return model


def write_adapter(model: Any, directory: Path) -> Any:
    """One that was trained to classify; the model with it."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.score.modules_to_save["default"].weight.mul_(-2)
    adapted.create_or_update_model_card = lambda folder: None
    adapted.save_pretrained(directory)
    return adapted.eval()


def logits_of(model: Any, tokenizer: Any) -> list[list[float]]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].tolist() for text in TEXTS]


async def test_a_model_made_to_classify_is_served_with_its_adapter_by_every_door(tmp_path: Path) -> None:
    base = write_model(tmp_path / "judge")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "judge")
    expected = {"judge": logits_of(base, tokenizer)}
    expected["tuned"] = logits_of(write_adapter(base, tmp_path / "tuned"), tokenizer)
    hosted = {"name": "judge", "model": str(tmp_path / "judge"), "dtype": "float32", "threads": 1}
    settings: dict[str, Any] = {
        "models": [hosted | {"kv_cache_bytes": 16 << 20}],
        "adapter_roots": [str(tmp_path)],
        "adapters": [{"name": "tuned", "model": "judge", "source": str(tmp_path / "tuned")}],
    }
    with running_server(tmp_path, **settings) as server:
        async with AsyncClient(server.data, timeout=END_SECONDS) as client:
            await client.wait_until_serving("models/judge", timeout=START_SECONDS)
            await check_numbers(client, expected)
            with pytest.raises(Unsupported, match="models/judge has a classification head, and generates no text"):
                await client.generate("judge", "A fox")
        async with AsyncAdminClient(server.admin, timeout=END_SECONDS) as admin:
            model = await admin.get_model("judge")
            assert model.architecture == "Qwen3ForSequenceClassification"
            assert MODEL_CAPABILITY_CLASSIFY in model.capabilities
            assert MODEL_CAPABILITY_CONSTRAINT not in model.capabilities
        await check_http(server)
        command: list[str | Path] = [LORAPLEX, "classify", "--server", server.data, "judge", TEXTS[0]]
        shown = await asyncio.to_thread(subprocess.check_output, command, text=True)
        assert all(label in shown for label in LABELS)
        assert server.terminate() == 0
        assert "Traceback" not in server.log.read_text()


async def check_numbers(client: AsyncClient, expected: dict[str, list[list[float]]]) -> None:
    for target, logits in expected.items():
        answer = await client.classify(target, TEXTS)
        assert list(answer.labels) == LABELS
        for one, numbers in zip(answer.classifications, logits, strict=True):
            assert list(one.logits) == pytest.approx(numbers, rel=1e-4, abs=1e-4)
        ranked = await client.rerank(target, "fox", TEXTS)
        assert sorted(one.index for one in ranked.documents) == [0, 1, 2]


async def check_http(server: Server) -> None:
    async with caller_of(server.data, "judge") as caller:
        embedded = await caller.post("/v1/embeddings", {"model": "judge", "input": TEXTS})
        assert [len(one["embedding"]) for one in embedded.json["data"]] == [64, 64, 64]
        refused = await caller.post("/v1/completions", {"model": "judge", "prompt": "A fox"})
        assert "has a classification head, and generates no text" in refused.json["error"]["message"]
