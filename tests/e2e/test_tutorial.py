"""docs/tutorial.md, run as it stands against the server that it tells to start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.e2e.conftest import Server

PAGE = ROOT / "docs" / "tutorial.md"
SECONDS = 300.0

pytestmark = pytest.mark.long


@pytest.mark.usefixtures("client")  # its models are loaded
def test_the_tutorial_runs_from_training_to_the_rollback(server: Server, tmp_path: Path) -> None:
    [program] = [block.text for block in blocks("python") if block.page == PAGE]
    (tmp_path / "train.py").write_text(program)
    steps = [block.text for block in blocks("sh") if block.page == PAGE]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([*steps, 'test "$first" != "$second" -a "$second" != "$third"'])],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "LORAPLEX_SERVER": server.data},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(steps) == 6
