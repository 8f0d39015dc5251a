"""Every command of README.md and docs/ runs as it stands there, page by page, or is listed with the reason why not.

The commands of a page run in one shell, against a server of the demo's models. What stands there for a reader's own
(`DIRECTORY`, `llama-8b`) is replaced by what is here. `loraplex serve` itself is the server of its page, on free ports.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import Client
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.e2e.conftest import DEMO, FREE_PORTS, LORAPLEX, START_SECONDS, Server, listening, running_server
from tests.service.authority import Authority

SECONDS = 300.0
READ = [page for page in PAGES if page.parent == ROOT / "docs" or page == ROOT / "README.md"]
LANGUAGES = ("sh", "console")
SERVE = "loraplex serve"
# How commands begin that do not run here, and why.
NOT_RUN = {
    "make demo": "makes an environment, for which it fetches torch; test_demo.py runs the program that it starts",
    "make test": "is what runs this test",
    "pip install": "fetches packages; tests/packaging builds and installs the wheels",
    "pip wheel": "compiles the kernels for minutes; tests/packaging builds the wheels",
    "loraplex serve meta-llama/": "fetches 16 GB from the hub",
    "python -m benchmarks.": "measures for minutes to hours, some of it beside other systems",
    "loraplex quantize": "needs the extra quantize, in an environment of its own",
    "lm_eval": "fetches lm-eval, and its task from the hub",
    "guidellm": "needs an environment of its own; test_http_clients.py runs it as it stands there",
    "openssl rand -hex 32 > machines.secret": "is for several machines; test_machines.py writes such a file",
    "loraplex follow": "waits for another machine; test_machines.py runs it beside a server",
    "source <(loraplex completion zsh)": "is for another shell than the one that runs this",
}


@dataclass(frozen=True)
class Walk:
    """How the commands of a page run."""

    settings: Callable[[Path], Mapping[str, Any]] | None = lambda _: {}  # of the server; None: the page starts it
    words: Callable[[Server], Mapping[str, str]] = lambda _: {}  # what stands for a reader's own, and what is here
    begin: str = ""  # what the reader has, or has done
    end: str = ""  # what must hold then
    program: str | None = None  # the name under which the page has its Python program saved


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def _guarded(place: Path, **settings: object) -> dict[str, Any]:
    """The configuration that docs/security.md shows, with a certificate and the file of keys in the reader's folder."""
    authority = Authority("tests")
    authority.issue("localhost").write(place, "tls")
    (place / "tls.crt").write_bytes((place / "tls.crt").read_bytes() + authority.certificate)
    keys: list[str | Path] = [LORAPLEX, "keys", "create", "--tenant", "acme"]
    (place / "acme.token").write_text(
        subprocess.run(keys, cwd=place, capture_output=True, text=True, check=True).stdout
    )
    tls = {"certificate": str(place / "tls.crt"), "key": str(place / "tls.key")}
    return {"tls": tls, "auth": {"keys": str(place / "keys.yaml")}, **settings}


def _at_localhost(server: Server) -> dict[str, str]:
    return {
        "localhost:50251": f"localhost:{_port(server.data)}",
        "localhost:50252": f"localhost:{_port(server.admin)}",
    }


VERSIONS = """
for voice in poet pirate; do loraplex adapters upload bard {adapters}/$voice --base-model storyteller; done
first=$(loraplex adapters list --versions | grep -o 'bard@[0-9a-f]*' | sort -u | head -n 1)
second=$(loraplex adapters list --versions | grep -o 'bard@[0-9a-f]*' | sort -u | tail -n 1)
""".format(adapters=DEMO / "adapters")

ONE_MODEL: dict[str, Any] = {
    "models": [{"name": "storyteller", "model": str(DEMO / "models" / "storyteller")}],
    "adapters": [],
}
WALKS = {
    "README.md": Walk(
        settings=None,
        words=lambda _: {
            "chat legal": "chat pirate < /dev/null",
            "/srv/adapters/legal-v3": str(DEMO / "adapters" / "poet"),
            "llama-8b": "storyteller",
        },
    ),
    "docs/tutorial.md": Walk(
        settings=None, program="train.py", end='test "$first" != "$second" -a "$second" != "$third"'
    ),
    "docs/adapter-life.md": Walk(
        words=lambda _: {
            "DIRECTORY": "own",
            "bard@3f2a81c09d4e": '"$first"',
            "bard@6f5e4d3c2b1a": '"$second"',
            "delete bard": f"delete bard\n{VERSIONS}",  # what follows is about one that is there
        },
        begin=f"cp -r {DEMO / 'adapters' / 'pirate'} own",
    ),
    "docs/commands.md": Walk(
        settings=lambda _: {"http_listen": "127.0.0.1:0"},
        words=lambda server: {
            "loraplex bench": "loraplex bench --requests 4",
            "127.0.0.1:8000": str(server.http),
        },
        begin="mkdir -p ~/.config/fish/completions",
        end="grep -q loraplex ~/.config/fish/completions/loraplex.fish",
    ),
    "docs/forms.md": Walk(
        words=lambda server: {"llama-8b": "storyteller", "invoices-lora": f"{server.roots}/invoices-lora"},
        begin=f"cp -r {DEMO / 'adapters' / 'pirate'} ../adapters/invoices-lora\n"
        """echo '{"type": "object", "properties": {"total": {"type": "integer"}}}' > invoice.json""",
    ),
    "docs/http.md": Walk(
        settings=lambda _: {"http_listen": "127.0.0.1:0", "http_admin": True, **ONE_MODEL},
        words=lambda server: {
            "curl": "curl --fail-with-body",
            "127.0.0.1:8000": str(server.http),
            "/var/lib/adapters": str(DEMO / "adapters"),
        },
        begin="TOKEN=none",
    ),
    "docs/outputs.md": Walk(),
    "docs/security.md": Walk(settings=_guarded, words=_at_localhost),
    "docs/tenants.md": Walk(
        settings=lambda place: _guarded(place, tenants={"acme": {"requests_per_second": 0.02, "burst_seconds": 100}}),
        words=_at_localhost,
        begin="export LORAPLEX_TOKEN=$(cat acme.token)",
    ),
    "docs/upgrades.md": Walk(words=lambda server: {"FILE": str(server.roots.parent / "loraplex.yaml")}),
}


def commands(block: Block) -> list[str]:
    """The commands of a block, each on one line; of a session those behind its prompts."""
    lines = re.sub(r"\\\n\s*", "", block.text).replace(".venv/bin/", "").splitlines()
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line and not line.startswith("#")]


def shown(block: Block) -> list[str]:
    """What a session shows of the output of each of its commands."""
    return [said.partition("\n")[2] for said in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]]


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def of_page(page: str) -> list[Block]:
    return [block for block in blocks(*LANGUAGES) if block.page == ROOT / page]


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_a_block_says_what_it_is(page: Path) -> None:
    assert [str(block) for block in blocks("") if block.page == page] == [], "of commands: sh; of output: text"


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_a_command_runs_or_it_is_said_why_not(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    run = [command for block in of_page(name) for command in commands(block) if is_run(command)]
    assert (name in WALKS) == bool(run), f"WALKS must say how these run: {run}"


def test_the_list_of_those_that_do_not_run_has_no_other() -> None:
    given = [command for page in READ for block in of_page(str(page.relative_to(ROOT))) for command in commands(block)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in given)] == []


@pytest.mark.long
@pytest.mark.parametrize("page", WALKS)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    walk, place = WALKS[page], tmp_path / "here"
    place.mkdir()
    if walk.program is not None:
        [program] = [block for block in blocks("python") if block.page == ROOT / page]
        (place / walk.program).write_text(program.text)
    with serving(walk, tmp_path) as server:
        run(page, walk, server, place)


@contextmanager
def serving(walk: Walk, directory: Path) -> Iterator[Server]:
    """The server of a page, with its models loaded."""
    if walk.settings is None:
        command: list[str | Path] = [LORAPLEX, *SERVE.split()[1:]]
        serves = listening(directory, command, FREE_PORTS)
    else:
        serves = running_server(directory, **walk.settings(directory / "here"))
    with serves as server:
        authority = directory / "here" / "tls.crt"
        tls = grpc.ssl_channel_credentials(authority.read_bytes()) if authority.exists() else None
        with Client(f"localhost:{_port(server.data)}", credentials=tls) as client:
            client.wait_until_serving("models/storyteller", timeout=START_SECONDS)
        yield server
        assert server.terminate() == 0


def run(page: str, walk: Walk, server: Server, place: Path) -> None:
    """Run the page's commands in one shell, and compare what its sessions show of errors. Raises AssertionError."""
    sessions: list[str] = []
    lines = [walk.begin]
    for block in of_page(page):
        told = iter(shown(block))
        for command in commands(block):
            if not is_run(command) or command == SERVE:
                continue
            for word, here in walk.words(server).items():
                command = command.replace(word, here)
            if block.language == "console":
                command = f"{{ {command}; }} > session-{len(sessions)} 2>&1 || true"
                sessions.append(next(told))
            lines.append(command)
    path = f"{LORAPLEX.parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-xeuo", "pipefail", "-c", "\n".join([*lines, walk.end])],
        cwd=place,
        env={**os.environ, "PATH": path, "HOME": str(place), "LORAPLEX_SERVER": server.data},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for number, expected in enumerate(sessions):
        printed = (place / f"session-{number}").read_text()
        for line in expected.splitlines():
            if line.startswith("Error"):
                assert re.search(varying(line), printed), printed
        assert ("Error" in printed) == ("Error" in expected), printed


def varying(line: str) -> str:
    """A pattern for a line whose numbers and ids are others each time."""
    return re.sub(r"(?:\\\.|[0-9a-f])*[0-9](?:\\\.|[0-9a-f])*", r"[0-9a-f.]+", re.escape(line))
