"""The image's recipe: its steps work in a clean directory, and what it starts can be reached or says why not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.test_wheels import ROOT, run

RECIPE = ROOT / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what stands behind it, continued lines joined."""
    lines = [line for line in RECIPE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(found[0], found[2]) for line in joined.splitlines() if (found := line.strip().partition(" "))[0]]


def copied() -> list[str]:
    """What comes from the repository into the image."""
    found = [shlex.split(text) for name, text in instructions() if name == "COPY" and "--from" not in text]
    return [source for words in found for source in words[:-1]]


def test_all_that_is_copied_is_there() -> None:
    assert {"pyproject.toml", "client", "service", "engine"} <= set(copied())
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_the_default_command_listens_where_a_published_port_leads() -> None:
    (command,) = [json.loads(text) for name, text in instructions() if name == "CMD"]
    (exposed,) = [text.split() for name, text in instructions() if name == "EXPOSE"]
    assert command == ["serve", "--listen", f"0.0.0.0:{exposed[0]}"]


def test_a_server_that_others_reach_asks_for_credentials_in_one_sentence() -> None:
    (command,) = [json.loads(text) for name, text in instructions() if name == "CMD"]
    done = subprocess.run(
        [sys.executable, "-c", "from loraplex_service.cli import main; main()", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    (said,) = done.stderr.strip().splitlines()
    assert "listen '0.0.0.0:50051' can be reached from other machines: set tls" in said
    assert "or insecure: true where the network is trusted" in said


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_recipe_passes_its_linter() -> None:
    run(["hadolint", RECIPE])


@pytest.mark.long
def test_what_is_copied_is_enough_to_build_both_wheels(tmp_path: Path) -> None:
    """The kernels are compiled: nothing that was built before is there."""
    source = tmp_path / "src"
    source.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "dist")
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)
    wheel = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run([*wheel, tmp_path / "wheels", source / "client", source])
    names = {path.name.partition("-")[0] for path in (tmp_path / "wheels").glob("*.whl")}
    assert names == {"loraplex", "loraplex_server"}
