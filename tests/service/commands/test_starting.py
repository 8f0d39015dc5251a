"""How the command line starts and ends: what it imports for a command, and what keeps it from its work."""

import importlib.abc
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from loraplex_service.cli import MODULES, main

LORAPLEX = Path(sys.executable).with_name("loraplex")
FULL = Path("/dev/full")
OF_A_SERVER = ("loraplex_engine", "loraplex_service.app", "loraplex_service.config", "prometheus_client", "uvloop")
CLIENTS = ("adapters", "bench", "chat", "embed", "generate", "health", "models", "routes", "score", "top", "usage")


def test_a_client_imports_nothing_that_a_server_is_made_of() -> None:
    code = (
        "import sys; from loraplex_service.cli import main; "
        "[main(words.split(), standalone_mode=False) for words in sys.argv[1:]]; "
        f"sys.exit(', '.join(name for name in {OF_A_SERVER} if name in sys.modules))"
    )
    commands = ["--version", *(f"{name} --help" for name in CLIENTS)]
    ended = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, timeout=60)
    assert ended.stderr == "\n"


@pytest.mark.parametrize("name", MODULES)
def test_a_command_is_found_by_its_name(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name


class Interrupted(importlib.abc.MetaPathFinder):
    """Ctrl-C while this module is imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self._name:
            raise KeyboardInterrupt
        return None


def test_who_interrupts_an_import_sees_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "loraplex_service.commands.generating"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(name), *sys.meta_path])
    result = CliRunner().invoke(main, ["generate", "m", "hi"])
    assert (result.exit_code, result.output.strip()) == (1, "Aborted!")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--version", "completion bash"])
def test_standard_output_that_is_full_is_said_in_a_line(command: str, unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with FULL.open("w") as full:
        ended = subprocess.run(
            [LORAPLEX, *command.split()], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert ended.returncode == 1
    assert ended.stderr == "Error: [Errno 28] No space left on device (standard output, or a file that was written)\n"
