"""Faults are injected by tests alone: nothing that production has, or is told, leads to them."""

import ast
import asyncio
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_service.app import engine_processes
from loraplex_service.config import ServiceConfig, load_config
from loraplex_service.config_file import ConfigError
from loraplex_service.models.config import HostedModelConfig
from tests.faults.engine import FAULTS, LOSSES

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("service", "engine", "adapters", "kernels", "client", "demo")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_file_of_the_product_imports_a_test() -> None:
    assert len(FILES) > 100
    assert [path for path in FILES if any(name.split(".")[0] == "tests" for name in imported(path))] == []


def test_tests_are_not_shipped() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert [name for name in wheel["packages"] if "test" in name or "fault" in name] == []
    copied = [line for line in (ROOT / "Containerfile").read_text().splitlines() if line.startswith(("COPY", "ADD"))]
    assert [line for line in copied if "tests" in line] == []


async def test_the_service_starts_the_engine_itself_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []

    async def start(*command: Any, env: dict[str, str], **_: Any) -> None:
        started.append((*command, env))
        raise OSError("enough")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    model = HostedModelConfig(name="tests.faults.engine", model="tests/faults/engine.py")
    with pytest.raises(OSError, match="enough"):
        await engine_processes(ServiceConfig(models=(model,)))(model)("ipc:///nowhere")
    [(*command, environment)] = started
    assert command[:4] == [sys.executable, "-P", "-m", "loraplex_engine"]
    assert command[4::2] == ["--name", "--log-level", "--log-format", "--bus"]
    assert environment.keys() - os.environ.keys() <= {"PYTHONPATH"}


@pytest.mark.parametrize("key", ["fuse", "fault", "inject", "launch_for", "engine_command"])
@pytest.mark.parametrize("section", ["", "supervision", "limits", "models"])
def test_no_key_of_the_configuration_wants_a_fault(tmp_path: Path, key: str, section: str) -> None:
    model = "{name: tiny, model: owner/name" + (f", {key}: raise}}" if section == "models" else "}")
    lines = [f"models: [{model}]"]
    if section in ("supervision", "limits"):
        lines.append(f"{section}: {{{key}: raise}}")
    if not section:
        lines.append(f"{key}: raise")
    file = tmp_path / "loraplex.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=key):
        load_config(file, {})


def test_the_engine_takes_no_fuse(tmp_path: Path) -> None:
    """Neither as the tests' engine does, nor by the environment: it ends before it reads its configuration."""
    fuse = tmp_path / "fuse"
    fuse.write_text(FAULTS[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | {"FUSE": str(fuse), "LORAPLEX_FAULT": LOSSES[0]}
    command = [sys.executable, "-P", "-m", "loraplex_engine", str(fuse), "--bus", "ipc:///nowhere"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "unrecognized arguments" in ended.stderr
    assert fuse.read_text() == FAULTS[0]
