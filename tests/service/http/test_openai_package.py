"""The real `openai` package as a client, in an environment of its own. Skipped where no package index is at hand."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex_service.adapters.config import AdapterConfig
from tests.service.control_plane import control_plane, write_adapter

INSTALL_SECONDS = 300.0
USE = r"""
import sys
import openai

client = openai.OpenAI(base_url=f"http://{sys.argv[1]}/v1", api_key="any", max_retries=0)
names = [model.id for model in client.models.list()]
assert names == ["models/tiny", "tenants/shared/adapters/pirate"], names
assert client.models.retrieve("pirate").id == "pirate"

said = [{"role": "user", "content": "hello"}]
answer = client.chat.completions.create(model="pirate", messages=said, max_completion_tokens=6, n=2, seed=1, user="me")
assert [choice.message.content for choice in answer.choices] == ["[user]"] * 2
assert answer._request_id in answer.id
again = [*said, answer.choices[0].message, {"role": "user", "content": "and?"}]
assert client.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices[0].finish_reason == "length"

streaming = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(client.chat.completions.create(model="tiny", messages=said, max_tokens=6, **streaming))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "[user]"
assert chunks[-1].usage.completion_tokens == 6

several = client.completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=4)
assert [choice.text for choice in several.choices] == ["abab", "cdcd"]
assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2

for kind, parameters in [
    (openai.BadRequestError, {"temperature": 11}),
    (openai.BadRequestError, {"store": True}),
    (openai.NotFoundError, {"model": "nobody"}),
]:
    try:
        client.chat.completions.create(**{"model": "tiny", "messages": said, **parameters})
    except kind as error:
        assert error.param == next(iter(parameters)), error.param
    else:
        raise AssertionError(parameters)

with client.chat.completions.create(model="tiny", messages=said, max_tokens=1_000_000, stream=True) as stream:
    next(iter(stream))
"""


@pytest.fixture(scope="module")
def with_openai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the package."""
    directory = tmp_path_factory.mktemp("openai")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=INSTALL_SECONDS)
    install: list[str | Path] = [
        directory / "bin/pip",
        "install",
        "--quiet",
        "--retries",
        "0",
        "--timeout",
        "5",
        "openai>=1.50",
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip("no package index is at hand")
    return directory / "bin/python"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="the extra `http` is not installed")
async def test_the_openai_package_is_served(with_openai: Path, byte_tokenizer_directory: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "pirate")
    pirate = AdapterConfig(name="pirate", model="tiny", source=str(tmp_path / "pirate"))
    async with control_plane(
        byte_tokenizer_directory, tmp_path, http_listen="127.0.0.1:0", adapters=(pirate,)
    ) as control:
        process = await asyncio.create_subprocess_exec(with_openai, "-c", USE, str(control.addresses.http))
        assert await process.wait() == 0
        async with asyncio.timeout(20):
            while control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
                await asyncio.sleep(0.01)
