"""The embedded default: what somebody sees who has typed one command."""

import subprocess
from pathlib import Path

from loraplex_service.config import load_config
from tests.e2e.conftest import LORAPLEX, MODELS, START_SECONDS


def test_the_embedded_configuration_is_valid_and_complete() -> None:
    config = load_config(None, {})
    assert {model.name for model in config.models} == set(MODELS)
    assert {adapter.name for adapter in config.adapters} == {name for names in MODELS.values() for name in names}
    assert all(Path(model.model).is_dir() for model in config.models)


def test_the_demo_lets_everybody_speak_and_ends() -> None:
    command: list[str | Path] = [LORAPLEX, "demo", "--max-tokens", "24"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    headings = [line for line in result.stdout.splitlines() if line.startswith("--- ")]
    names = [*MODELS, *(name for names in MODELS.values() for name in names)]
    assert len(headings) == len(names)
    assert all(any(name in heading for heading in headings) for name in names)
    assert f"{len(names)} streams at once" in result.stdout
    assert "17 + 25 = 42." in result.stdout
    assert "loraplex chat pirate" in result.stdout
