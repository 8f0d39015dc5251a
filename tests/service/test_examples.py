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
README = (EXAMPLES / "README.md").read_text()
SECONDS = 240.0
JAVA_TOOLS = ("javac", "protoc", "grpc_java_plugin")
JARS = Path("/usr/share/java")  # where Debian has them
JAVA_LIBRARIES = ("grpc-netty", "grpc-protobuf", "grpc-stub", "netty-codec-http2", "perfmark-api", "protobuf")


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


def copied(example: str, place: Path) -> Path:
    """The example's folder in a copy of what it needs: nothing is built in the repository."""
    (place / "proto").symlink_to(ROOT / "proto")
    for folder in (example, "googleapis"):
        shutil.copytree(EXAMPLES / folder, place / "examples" / folder)
    return place / "examples" / example


async def test_the_python_example_runs(control: ControlPlane) -> None:
    program = EXAMPLES / "python" / "example.py"
    check(await run(sys.executable, program, control.addresses.data, "tiny", cwd=EXAMPLES), "done")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
async def test_the_node_example_runs(control: ControlPlane, tmp_path: Path) -> None:
    here = copied("node", tmp_path)
    try:
        await run("npm", "install", "--silent", "--no-audit", "--no-fund", cwd=here)
    except AssertionError as error:
        pytest.skip(f"npm has no registry here: {error}"[:300])
    printed = await run("node", "example.mjs", control.addresses.data, "tiny", cwd=here)
    check(printed, "CANCELLED")
    assert "ErrorInfo" in printed
    assert "INVALID_PARAMETER" in printed


@pytest.mark.long
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in JAVA_TOOLS)
    or any(not (JARS / f"{name}.jar").exists() for name in JAVA_LIBRARIES),
    reason="needs the packages that examples/README.md names for Java",
)
async def test_the_java_example_runs_by_its_recipe(control: ControlPlane, tmp_path: Path) -> None:
    found = re.search(r"```sh\ncd examples/java\n(.*?)^java (.*?)```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    here = copied("java", tmp_path)
    await run("bash", "-euc", found[1], cwd=here)
    call = found[2].replace("127.0.0.1:50051 storyteller", f"{control.addresses.data} tiny")
    printed = await run("bash", "-euc", f"java {call}", cwd=here)
    check(printed, "CANCELLED")
    assert "ErrorInfo INVALID_PARAMETER" in printed
