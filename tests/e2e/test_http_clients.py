"""The clients and tools that people have, as they are, in front of real engines. Skipped where no index is at hand."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.docs.pages import blocks
from tests.e2e.conftest import DEMO, MODELS, Server, running_server
from tests.service.http.clients.environments import environment, needs_uvicorn

pytestmark = [pytest.mark.long, needs_uvicorn]
USE_SECONDS = 240.0
MODEL = DEMO / "models" / "storyteller"
CHOICES = [
    ("Once upon a time there was", [" a little fox", " a big red owl", " the the the"]),
    ("The fox said", [" hello to the owl.", " zzz"]),
]
LANGCHAIN = r"""
import sys
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

base = {"base_url": f"http://{sys.argv[1]}/v1", "api_key": "any", "max_retries": 0}
chat = ChatOpenAI(model="storyteller", max_completion_tokens=8, temperature=0, **base)
whole = chat.invoke("A fox")
assert whole.content and 1 <= whole.usage_metadata["output_tokens"] <= 8, whole
assert "".join(part.content for part in chat.stream("A fox")) == whole.content
assert len(chat.batch(["A fox", "An owl"])) == 2
responding = ChatOpenAI(model="storyteller", max_completion_tokens=8, temperature=0, use_responses_api=True, **base)
assert responding.invoke("A fox").text == whole.content
text = OpenAI(model="pirate", max_tokens=8, temperature=0, **base)
assert text.invoke("Once upon a time")
properties = {"animal": {"enum": ["fox", "owl"]}}
schema = {"title": "animal", "type": "object", "properties": properties, "required": ["animal"]}
schema["additionalProperties"] = False
formed = ChatOpenAI(model="storyteller", max_completion_tokens=200, temperature=0, **base)
found = formed.with_structured_output(schema, method="json_schema").invoke("A fox")
assert found["animal"] in ("fox", "owl"), found
embeddings = OpenAIEmbeddings(model="storyteller", check_embedding_ctx_length=False, **base)
assert len(embeddings.embed_documents(["A fox", "An owl"])) == 2
"""
INSTRUCTOR = r"""
import sys
from typing import Literal
import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    animal: Literal["fox", "owl"]
    age: int = Field(ge=1, le=99)

client = instructor.from_openai(
    openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="any", max_retries=0), mode=instructor.Mode.JSON_SCHEMA
)
said = [{"role": "user", "content": "A fox of three years"}]
found = client.chat.completions.create(
    model="storyteller", messages=said, response_model=Animal, max_retries=0, max_tokens=200, temperature=0
)
assert found.animal in ("fox", "owl")
assert isinstance(found.age, int)
"""
LM_EVAL = r"""
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

address, tokenizer, tasks = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={"base_url": f"http://{address}/v1/completions", "model": "pirate", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "num_concurrent": 2, "max_retries": 1, "batch_size": 1, "max_length": 256},
    tasks=["animals"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
samples = sorted(found["samples"]["animals"], key=lambda sample: sample["doc_id"])
print(json.dumps([[float(each[0][0]) for each in sample["resps"]] for sample in samples]))
"""
TASK = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server"), http_listen="127.0.0.1:0") as server:
        server.wait_until_serving(*MODELS)
        yield server


@pytest.fixture(scope="module")
def with_guidellm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("guidellm"), "guidellm>=0.8", beside=peft)


def use(python: Path, script: str, server: Server, *arguments: str) -> str:
    """What the script prints. Fails where it does."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "any"}
    command = [str(python), "-c", script, str(server.http), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=USE_SECONDS, env=offline)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_langchain_is_served(served: Server, tmp_path: Path) -> None:
    use(environment(tmp_path / "env", "langchain-openai>=1"), LANGCHAIN, served)


def test_instructor_is_served(served: Server, tmp_path: Path) -> None:
    use(environment(tmp_path / "env", "instructor>=1.10"), INSTRUCTOR, served)


def test_lm_eval_finds_the_likelihoods_of_transformers_and_peft(served: Server, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "lm-eval[api]>=0.4.9", "transformers>=5")
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"prompt": prompt, "choices": ends}) + "\n" for prompt, ends in CHOICES))
    (tmp_path / "animals.yaml").write_text(TASK.replace("FILE", str(docs)))
    printed = use(python, LM_EVAL, served, str(MODEL), str(tmp_path))
    for found, (prompt, ends) in zip(json.loads(printed.splitlines()[-1]), CHOICES, strict=True):
        assert found == pytest.approx([likelihood(prompt, end) for end in ends], abs=1e-3)


@pytest.mark.parametrize("form", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_guidellm_measures_as_the_page_says(served: Server, with_guidellm: Path, tmp_path: Path, form: str) -> None:
    [shown] = [block.text for block in blocks("sh") if block.text.startswith("guidellm run")]
    places = {
        "127.0.0.1:8000": str(served.http),
        "/models/storyteller": str(MODEL),
        "figures.json": str(tmp_path / "figures.json"),
    }
    places |= {
        "model=pirate": f"model=pirate,request_format={form}",
        "guidellm run": f"{with_guidellm} -m guidellm run",
    }
    for ours, there in places.items():
        assert ours in shown
        shown = shown.replace(ours, there)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(shown, shell=True, capture_output=True, text=True, timeout=USE_SECONDS, env=offline)
    assert done.returncode == 0, done.stderr[-4000:]
    [run] = json.loads((tmp_path / "figures.json").read_text())["benchmarks"]
    assert not run["requests"]["errored"], run["requests"]["errored"][0]["info"]["error"]
    assert [each["output_tokens"] for each in run["requests"]["successful"]] == [16] * 16
    assert all(each["prompt_tokens"] >= 32 for each in run["requests"]["successful"])


def likelihood(prompt: str, end: str) -> float:
    """By transformers and PEFT: how likely the end is, after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(DEMO / "adapters" / "pirate"))
    tokens = tokenizer(prompt + end, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return float(sum(logprobs[place - 1, tokens[place]] for place in range(start, len(tokens))))
