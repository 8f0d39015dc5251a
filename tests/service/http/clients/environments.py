"""Environments of their own for the packages that are clients of HTTP, and a server for them."""

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loraplex_service.adapters.config import AdapterConfig
from loraplex_service.http.dialects import TABLES
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import Draft, Table
from tests.service.control_plane import ControlPlane, control_plane, write_adapter
from tests.waits import MOST_SECONDS

INSTALL_SECONDS = 300.0
USE_SECONDS = 120.0
FIELDS = Path(__file__).with_name("fields.py")  # runs in the environments
needs_uvicorn = pytest.mark.skipif(
    importlib.util.find_spec("uvicorn") is None, reason="the extra `http` is not installed"
)


def environment(directory: Path, *requirements: str, beside: ModuleType | None = None) -> Path:
    """The Python of a new environment that has these packages. Skips the test where no package index is at hand.

    `beside`: an installed package; it and those installed with it are there, too, so that large ones are not fetched.
    """
    made = [sys.executable, "-m", "venv", "--without-pip", str(directory)]
    subprocess.run(made, check=True, timeout=INSTALL_SECONDS)
    python = directory / "bin/python"
    if beside is not None:
        [packages] = directory.glob("lib/python*/site-packages")
        (packages / "beside.pth").write_text(f"{Path(str(beside.__file__)).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    options = ["--quiet", "--no-compile", "--retries", "0", "--timeout", "5"]
    install = [*pip, "install", *options, *requirements]
    done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip("no package index is at hand")
    return python


@asynccontextmanager
async def served(tokenizer: Path, roots: Path, **settings: Any) -> AsyncIterator[ControlPlane]:
    """A server with an HTTP port, the model "tiny" and its adapter "pirate"; both give each prompt back."""
    write_adapter(roots / "pirate")
    pirate = AdapterConfig(name="pirate", model="tiny", source=str(roots / "pirate"))
    async with control_plane(tokenizer, roots, http_listen="127.0.0.1:0", adapters=(pirate,), **settings) as control:
        yield control


async def used(python: Path, script: str, *arguments: str) -> str:
    """What the script prints. Fails where it does."""
    process = await asyncio.create_subprocess_exec(
        python, "-c", script, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, problem = await asyncio.wait_for(process.communicate(), USE_SECONDS)
    assert process.returncode == 0, problem.decode()[-4000:]
    return out.decode()


async def until_idle(control: ControlPlane) -> None:
    """Wait until the engine has forgotten all requests."""
    async with asyncio.timeout(MOST_SECONDS):
        while control.core().requests:  # noqa: ASYNC110 - the engine is a thread, and tells nobody
            await asyncio.sleep(0.01)


# What must come before a field's item for it to be read: a result of a tool needs a call.
CALLED: Mapping[str, tuple[str, Any]] = {
    "[tool_result]": (
        "messages",
        {"role": "assistant", "content": [{"type": "tool_use", "id": "tool_use_id", "name": "f", "input": {}}]},
    ),
    "[function_call_output]": (
        "input",
        {"type": "function_call", "call_id": "call_id", "name": "f", "arguments": "{}"},
    ),
}


async def unheeded(python: Path, kinds: Sequence[tuple[str, str]], needless: Mapping[str, str]) -> list[str]:
    """The fields that a package's types have, and that an endpoint neither honours nor refuses by name.

    `kinds`: endpoints, and where the type of their bodies is: "module:name". `needless`: patterns of fields that ask
    for nothing that is not done without them, and why.
    """
    tables = {table.path: table for table in TABLES}
    patterns = [re.compile(pattern) for pattern in needless]
    found = []
    for path, name, without, given in json.loads(await used(python, FIELDS.read_text(), json.dumps(kinds))):
        plain, asked = (_read(tables[path], name, body) for body in (without, given))
        if isinstance(asked, Refusal):
            heeded = asked.code != "unknown_parameter" and _first(str(asked.param)) == _first(name)
        else:
            heeded = plain != asked or any(pattern.fullmatch(name) for pattern in patterns)
        if not heeded:
            found.append(f"{path} {name}: {asked}")
    return found


def _first(name: str) -> str:
    """The parameter that a field is part of."""
    return re.split(r"\W", name)[0]


def _read(table: Table, name: str, body: Any) -> Draft | Refusal:
    for item, (parameter, call) in CALLED.items():
        if item in name and parameter in body:
            body = {**body, parameter: [call, *body[parameter]]}
    try:
        return table.read(body)
    except Refusal as refusal:
        return refusal
