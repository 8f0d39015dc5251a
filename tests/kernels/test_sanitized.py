"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer: what `make sanitize` runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_no_sanitizer_finds_a_mistake_in_the_kernels() -> None:
    done = subprocess.run([sys.executable, ROOT / "kernels" / "sanitize.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
