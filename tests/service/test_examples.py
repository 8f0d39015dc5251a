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

GO_TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
GO_SOURCES = Path("/usr/share/gocode/src")
# The last has this folder from 1.4 on, and the stubs need that.
GO_LIBRARIES = ("google.golang.org/grpc", "google.golang.org/protobuf", "github.com/golang/protobuf/internal/gengogrpc")


async def run(*command: str | Path, cwd: Path) -> str:
    def waited() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)

    ended = await asyncio.to_thread(waited)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def check(printed: str, cancelled: str, deadline: str = "DEADLINE_EXCEEDED", error: str = "INVALID_ARGUMENT") -> None:
    """The names of codes are those that the language has."""
    assert re.search(r"^stream:\n.*Once", printed, re.MULTILINE)
    assert f"deadline: {deadline}" in printed
    assert f"cancel: {cancelled}" in printed
    assert f"error: {error}" in printed
    assert "spec.sampling.temperature" in printed


def copied(example: str, place: Path) -> Path:
    """The example's folder in a copy of what it needs: nothing is built in the repository."""
    (place / "proto").symlink_to(ROOT / "proto")
    for folder in (example, "googleapis"):
        shutil.copytree(EXAMPLES / folder, place / "examples" / folder)
    return place / "examples" / example


async def by_its_recipe(example: str, address: str, place: Path) -> str:
    """What the example prints when it is built and called as the README says, for this address."""
    found = re.search(rf"```sh\ncd examples/{example}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    recipe = found[1].replace("127.0.0.1:50051 storyteller", f"{address} tiny")
    return await run("bash", "-euc", recipe, cwd=copied(example, place))


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
    printed = await by_its_recipe("java", control.addresses.data, tmp_path)
    check(printed, "CANCELLED")
    assert "ErrorInfo INVALID_PARAMETER" in printed


@pytest.mark.long
@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in GO_TOOLS)
    or any(not (GO_SOURCES / name).exists() for name in GO_LIBRARIES),
    reason="needs the packages that examples/README.md names for Go",
)
async def test_the_go_example_runs_by_its_recipe(control: ControlPlane, tmp_path: Path) -> None:
    printed = await by_its_recipe("go", control.addresses.data, tmp_path)
    check(printed, "Canceled", "DeadlineExceeded", "InvalidArgument")
    assert "ErrorInfo INVALID_PARAMETER" in printed
