"""What type checkers say of a program that uses the clients."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loraplex

CLIENT = Path(loraplex.__file__).parents[1]
PROGRAM = Path(__file__).with_name("typed_program.py")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Pyright would ask the network whether there is a newer one.
    environment = {**os.environ, "MYPYPATH": str(CLIENT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.slow
def test_a_program_that_uses_both_clients_passes_mypy_strict(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "mypy", "--strict", "--config-file=", PROGRAM, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_program_that_uses_both_clients_passes_pyright_strict(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    if shutil.which("node") is None:
        pytest.skip("pyright runs with node, and there is none")
    shutil.copy(PROGRAM, tmp_path)
    settings = {"extraPaths": [str(CLIENT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    result = run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
