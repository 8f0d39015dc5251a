"""The trainers that people have, as they are, in front of real engines. Skipped where no package index is at hand."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest

from tests.docs.pages import ROOT, blocks
from tests.e2e.conftest import DEMO, MODELS, Server, running_server
from tests.service.http.clients.environments import environment, needs_uvicorn

pytestmark = [pytest.mark.long, needs_uvicorn]
USE_SECONDS = 240.0
MODEL = DEMO / "models" / "storyteller"
# Compares the log-probabilities of each rollout with those of the trainer's own model.
CHECKED = r"""
def checked(prompts, trainer, sample=rollout):
    import torch

    found = sample(prompts, trainer)
    assert found["prompt_ids"][0] == trainer.processing_class(prompts[0])["input_ids"]
    for prompt, completion, logprobs in zip(*found.values()):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + completion])).logits[0].float() / trainer.temperature
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-3), (logprobs, expected)
    return found

"""
TOLD = r"""
import json
student = admin.list_adapters(include_versions=True)
print(json.dumps([each.version for each in student if each.name.endswith("/student")]))
"""
VLLM_CLIENT = r"""
import sys
import trl.generation.vllm_client as module

module.is_vllm_available = lambda *args, **kwargs: True  # it asks for vLLM, and needs none of it to generate
client = module.VLLMClient(base_url=f"http://{sys.argv[1]}")
client.model = "pirate"
asked = {"n": 2, "max_tokens": 5, "logprobs": 2}
chats = [[{"role": "user", "content": "hi"}]]
for said in (client.generate(["Once upon", "A fox"], **asked), client.chat(chats, **asked)):
    assert len(said["completion_ids"]) == 2 * len(said["prompt_ids"])
    for ids, logprobs, named in zip(said["completion_ids"], said["logprobs"], said["logprob_token_ids"]):
        assert 1 <= len(ids) == len(logprobs) == len(named) <= 5
        assert all(token in likely for token, likely in zip(ids, named))
sequence = said["prompt_ids"][0] + said["completion_ids"][0]
scored = client.get_sequence_logprobs([sequence], [len(said["prompt_ids"][0])], top_logprobs=3)
assert len(scored["actual_logprobs"][0]) == len(said["completion_ids"][0])
assert client.get_world_size() == 1
client.reset_prefix_cache()
for push in (lambda: client.init_communicator("cpu"), client._start_weight_update):
    try:
        push()
    except Exception as error:
        assert "publish an adapter" in str(error), error
    else:
        raise AssertionError("nothing was refused")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server"), http_listen="127.0.0.1:0") as server:
        server.wait_until_serving(*MODELS)
        yield server


@pytest.fixture(scope="module")
def with_trl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("trl"), "trl>=1.16", "requests", beside=peft)


def use(python: Path, script: str, directory: Path, *arguments: str) -> str:
    """What the script prints. Fails where it does."""
    settings = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONPATH": str(ROOT / "client")}
    command = [str(python), "-c", script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=USE_SECONDS, env=os.environ | settings, cwd=directory
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_trl_trains_by_the_adapters_that_it_publishes(server: Server, with_trl: Path, tmp_path: Path) -> None:
    [shown] = [block.text for block in blocks("python") if "GRPOTrainer(" in block.text]
    places = {"127.0.0.1:50051": server.data, "127.0.0.1:50052": server.admin, "/models/storyteller": str(MODEL)}
    # Quick, without a GPU, and by steps that show: as PEFT begins, a first step would change little.
    places |= {
        "max_steps=3": 'max_steps=3, use_cpu=True, bf16=False, report_to=[], learning_rate=1e-2, save_strategy="no"'
    }
    places |= {"rollout_func=rollout": "rollout_func=checked", "def reward(": f"{CHECKED}\ndef reward("}
    for ours, there in places.items():
        assert ours in shown
        shown = shown.replace(ours, there)
    versions = json.loads(use(with_trl, shown + TOLD, tmp_path).splitlines()[-1])
    assert len(set(versions)) == 3


def test_trls_client_of_vllm_generates_and_scores(server: Server, with_trl: Path, tmp_path: Path) -> None:
    use(with_trl, VLLM_CLIENT, tmp_path, str(server.http))
