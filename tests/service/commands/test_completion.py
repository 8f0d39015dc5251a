"""Shell completion: the scripts, and what they complete."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraplex_service.cli import main

LORAPLEX = Path(sys.executable).with_name("loraplex")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_LORAPLEX_COMPLETE={shell}_complete" in result.output


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_command() -> None:
    script = (
        f'PATH="{LORAPLEX.parent}:$PATH"; source <(loraplex completion bash); '
        'COMP_WORDS=(loraplex ben); COMP_CWORD=1; _loraplex_completion loraplex; echo "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env={**os.environ})
    assert ended.stdout.strip() == "bench", ended.stderr
