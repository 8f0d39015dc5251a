"""The programs of examples/ run against a service: each says that it streamed, waited, cancelled and read an error."""

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.control_plane import ControlPlane

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SECONDS = 240.0


async def run(*command: str | Path, cwd: Path) -> str:
    def waited() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)

    ended = await asyncio.to_thread(waited)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def check(printed: str, cancelled: str) -> None:
    assert re.search(r"^stream:\n.*Once", printed, re.MULTILINE)
    assert "deadline: DEADLINE_EXCEEDED" in printed
    assert f"cancel: {cancelled}" in printed
    assert "error: INVALID_ARGUMENT" in printed
    assert "spec.sampling.temperature" in printed


async def test_the_python_example_runs(control: ControlPlane) -> None:
    program = EXAMPLES / "python" / "example.py"
    check(await run(sys.executable, program, control.addresses.data, "tiny", cwd=EXAMPLES), "done")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
async def test_the_node_example_runs(control: ControlPlane, tmp_path: Path) -> None:
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    for folder in ("node", "googleapis"):
        shutil.copytree(EXAMPLES / folder, tmp_path / "examples" / folder)
    here = tmp_path / "examples" / "node"
    try:
        await run("npm", "install", "--silent", "--no-audit", "--no-fund", cwd=here)
    except AssertionError as error:
        pytest.skip(f"npm has no registry here: {error}"[:300])
    printed = await run("node", "example.mjs", control.addresses.data, "tiny", cwd=here)
    check(printed, "CANCELLED")
    assert "ErrorInfo" in printed
    assert "INVALID_PARAMETER" in printed
