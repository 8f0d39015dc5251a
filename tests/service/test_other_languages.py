"""The recipes of proto/README.md, as they stand there, and what is made with them calls a server.

What they need is fetched from npm's registry, or is here already; where it is not, they are skipped.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.service.data_plane import DataPlane

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / ".venv-stubs"  # of proto/stubs.sh: it has protoc, and what the contract imports
SECONDS = 300.0
JARS = [
    *Path.home().glob(".m2/repository/com/google/protobuf/protobuf-java/*/*.jar"),
    *Path("/usr/share/java").glob("protobuf.jar"),
]

TYPESCRIPT_CALLER = """
const grpc = require("@grpc/grpc-js");
const { GenerateRequest, InferenceServiceClient } = require("./js/loraplex/v1/inference.js");
const client = new InferenceServiceClient(process.argv[2], grpc.credentials.createInsecure());
const spec = { model: "demo", prompt: { text: "abc" }, stopping: { maxTokens: 5 } };
client.generate(GenerateRequest.fromPartial({ spec }), (error, answer) => {
  if (error) throw error;
  console.log(answer.outputs[0].text, Number.isSafeInteger(answer.seed));
  client.close();
});
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (STUBS / "made").exists(), reason="protoc comes with proto/stubs.sh"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what the recipes name: proto, googleapis, gen, and protoc on its path."""
    [packages] = STUBS.glob("lib/python3*/site-packages")
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    (tmp_path / "googleapis").symlink_to(packages)
    (tmp_path / "gen").mkdir()
    protoc = tmp_path / "protoc"
    includes = packages / "grpc_tools/_proto"
    protoc.write_text(f'#!/bin/sh\nexec {STUBS}/bin/python -W ignore -m grpc_tools.protoc -I{includes} "$@"\n')
    protoc.chmod(0o755)
    return tmp_path


def recipe(language: str) -> str:
    text = (ROOT / "proto/README.md").read_text()
    found = re.search(rf"\*\*{language}\*\*.*?```sh\n(.*?)```", text, re.S)
    assert found is not None
    return found[1]


def environment(place: Path) -> Mapping[str, str]:
    return os.environ | {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}


def run(place: Path, script: str) -> str:
    shell = ["bash", "-euc", script]
    done = subprocess.run(shell, cwd=place, env=environment(place), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
async def test_typescript_by_its_recipe_reads_the_answer_to_a_default_request(place: Path, plane: DataPlane) -> None:
    install, generate = recipe("TypeScript").split("protoc", 1)
    try:
        await asyncio.to_thread(run, place, f"{install.strip()} typescript @types/node")
    except AssertionError as error:
        pytest.skip(f"npm has no registry here: {error}"[:300])
    await asyncio.to_thread(run, place, f"protoc{generate}")
    options = "--outDir js --target es2022 --module commonjs --esModuleInterop --skipLibCheck --strict"
    await asyncio.to_thread(run, place, f"node_modules/.bin/tsc {options} gen/loraplex/v1/*.ts")
    (place / "call.js").write_text(TYPESCRIPT_CALLER)
    for _ in range(4):  # a seed of 64 bits is a number of JavaScript once in two thousand times
        assert await asyncio.to_thread(run, place, f"node call.js {plane.address}") == "abcab true\n"


@pytest.mark.skipif(
    shutil.which("javac") is None or shutil.which("protoc") is None or not JARS,
    reason="needs javac, protobuf-java and a protoc that knows Java, as that of proto/stubs.sh does not",
)
def test_java_compiles_what_protoc_makes_of_the_contract(place: Path) -> None:
    """With its own compiler: that is where two accessors of one name show."""
    imports = "googleapis/google/rpc/status.proto googleapis/google/api/field_behavior.proto"
    includes = "-I proto -I googleapis -I googleapis/grpc_tools/_proto"
    run(place, f"{shutil.which('protoc')} {includes} --java_out=gen proto/loraplex/v1/*.proto {imports}")
    run(place, f"javac -proc:none -nowarn -cp {JARS[0]} -d classes $(find gen -name '*.java')")
    assert (place / "classes/loraplex/v1/Model.class").exists()


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("go", "protoc-gen-go", "protoc-gen-go-grpc")),
    reason="needs go, protoc-gen-go and protoc-gen-go-grpc",
)
def test_go_makes_one_package_of_the_contract(place: Path) -> None:
    _, generate = recipe("Go").split("protoc -I", 1)
    run(place, f"protoc -I{generate}")
    assert "package loraplexv1" in (place / "gen/loraplex/v1/inference.pb.go").read_text()
