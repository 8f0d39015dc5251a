"""The wheels of the client and of the server: built, installed in environments of their own, and used."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplex import Client
from tests.e2e.conftest import FREE_PORTS, MODELS, listening

ROOT = Path(__file__).resolve().parents[2]
MAX_CLIENT_BYTES = 60 << 20  # installed, with all that it needs
CALL = """
import sys
from loraplex import Client

with Client(sys.argv[1]) as client:
    client.wait_until_serving("models/storyteller", timeout=120)
    print(client.generate("pirate", "Once upon a time", max_tokens=5).outputs[0].text)
"""
SERVE = """
import asyncio, subprocess, sys
from importlib.metadata import version
from loraplex_service.app import engine_processes, running
from loraplex_service.config import load_config

async def main():
    config = load_config(None, {"LORAPLEX_STATE_DIRECTORY": ""}).with_free_ports()
    async with running(config, engine_processes(config)) as (_, addresses):
        call = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", sys.argv[1], addresses.data)
        return await call.wait()

sys.exit(asyncio.run(main()))
"""
PROGRAM = """
import loraplex

with loraplex.Client("127.0.0.1:50051") as client:
    result = client.generate("pirate", "Once upon a time", max_tokens=5)
    text: str = result.outputs[0].text
    print(text.upper())
    wrong: int = text
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip: that of the tests installs into it."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin/python"

    @property
    def site_packages(self) -> Path:
        return self.directory / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"

    def pip(self, command: str, *arguments: str | Path) -> str:
        return run([sys.executable, "-m", "pip", "-q", "--python", self.python, command, *arguments])

    def run(self, *arguments: str | Path) -> str:
        """`-P`: the folder that the tests run in is not on its path."""
        return run([self.python, "-P", *arguments])


def run(command: Sequence[str | Path], stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def has_index(directory: Path) -> bool:
    """Whether packages can be fetched here."""
    command = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "--dest", str(directory), "kernels"]
    return not subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def new_environment(directory: Path) -> Environment:
    run([sys.executable, "-m", "venv", "--without-pip", directory])
    return Environment(directory)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two, by the name of their distribution. They are built with what is installed: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run([*build, folder, ROOT / "client", ROOT])
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def server(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Both wheels, beside the packages that the tests' own environment has, which are not installed a second time."""
    made = new_environment(tmp_path_factory.mktemp("server"))
    others = [path for path in sys.path if path.endswith("-packages")]
    (made.site_packages / "others.pth").write_text("\n".join(others))
    made.pip("install", "--ignore-installed", "--no-deps", "--no-index", *wheels.values())
    return made


def project(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return found


def test_both_are_of_one_version_and_the_server_needs_just_that_client() -> None:
    client, server = project(ROOT / "client"), project(ROOT)
    assert client["version"] == server["version"]
    assert f"loraplex=={client['version']}" in server["dependencies"]
    assert (ROOT / "client/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_every_name_at_the_top_of_a_wheel_is_ours(wheels: dict[str, Path]) -> None:
    for name, path in wheels.items():
        with zipfile.ZipFile(path) as wheel:
            tops = {entry.partition("/")[0] for entry in wheel.namelist()}
        assert all(top.startswith("loraplex") for top in tops), name


def test_the_server_has_its_kernels_its_demo_and_its_types(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["loraplex_server"]) as wheel:
        entries = wheel.namelist()
    assert "loraplex_kernels/cpu/libloraplex_portable.so" in entries
    assert "loraplex_demo/loraplex.yaml" in entries
    assert "loraplex_demo/models/storyteller/model.safetensors" in entries
    packages = {entry.partition("/")[0] for entry in entries if entry.endswith(".py")}
    assert {f"{package}/py.typed" for package in packages} <= set(entries)
    assert not [entry for entry in entries if entry.endswith((".cpp", ".h"))]


@pytest.mark.slow
def test_the_client_comes_alone_and_small(wheels: dict[str, Path], tmp_path: Path) -> None:
    if not has_index(tmp_path):
        pytest.skip("no package index is at hand")
    made = new_environment(tmp_path / "client")
    made.pip("install", wheels["loraplex"])
    made.run("-c", "import loraplex")
    there = {path.name.partition("-")[0] for path in made.site_packages.glob("*.dist-info")}
    assert "loraplex" in there
    assert not {"torch", "numpy", "loraplex_server"} & there
    size = sum(path.stat().st_size for path in made.site_packages.rglob("*") if path.is_file())
    assert size <= MAX_CLIENT_BYTES
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", made.python, program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert "Incompatible types in assignment" in checked.stdout, checked.stdout  # it sees the types that are there
    assert "Found 1 error" in checked.stdout, checked.stdout


@pytest.mark.slow
def test_the_server_serves_from_its_wheel(server: Environment) -> None:
    assert server.run("-c", SERVE, CALL)


@pytest.mark.slow
def test_the_first_commands_work_from_the_wheel_in_an_empty_directory(
    server: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    loraplex = server.directory / "bin/loraplex"
    assert "streams at once" in run([loraplex, "demo"])
    with listening(tmp_path, [loraplex, "serve"], FREE_PORTS) as serving:
        monkeypatch.setenv("LORAPLEX_SERVER", serving.data)
        monkeypatch.setenv("LORAPLEX_ADMIN_SERVER", serving.admin)
        with Client(serving.data) as client:
            for model in MODELS:
                client.wait_until_serving(f"models/{model}", timeout=120)
        assert "storyteller: about" in run([loraplex, "doctor"])
        assert run([loraplex, "generate", "poet", "Tell me a story.", "--chat", "--max-tokens", "5"]).strip()
        assert run([loraplex, "chat", "pirate"], stdin="Hello!\n").strip()
        assert "4 requests, 0 failed" in run([loraplex, "bench", "pirate", "quizzer", "--requests", "4"])
        assert "pirate@" in run([loraplex, "top", "--count", "1"])
    assert list(empty.iterdir()) == []


def test_the_real_demo_is_in_the_wheel_without_its_model(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["loraplex_server"]) as wheel:
        entries = {entry.removeprefix("loraplex_demo/real/") for entry in wheel.namelist()}
    served = ROOT / "demo/loraplex_demo/real/served"
    assert {str(path.relative_to(served.parent)) for path in served.rglob("*.*")} <= entries
    assert not [entry for entry in entries if entry.endswith(".gguf")]


@pytest.mark.slow
def test_no_package_of_another_project_is_in_the_way(
    wheels: dict[str, Path], server: Environment, tmp_path: Path
) -> None:
    """`kernels` of Hugging Face and ours were once one folder; whichever came last broke the other."""
    if not has_index(tmp_path):
        pytest.skip("no package index is at hand")
    both = "from kernels import get_kernel; import loraplex_kernels.selection"
    server.pip("install", "--no-deps", "kernels")
    server.run("-c", both)
    server.pip("uninstall", "--yes", "loraplex-server")
    server.run("-c", "from kernels import get_kernel")
    server.pip("install", "--ignore-installed", "--no-deps", "--no-index", wheels["loraplex_server"])
    server.run("-c", both)
    assert server.run("-c", SERVE, CALL)
    server.pip("uninstall", "--yes", "kernels")
    server.run("-c", "import loraplex_kernels.selection")
