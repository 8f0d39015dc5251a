"""The real Envoy, which is installed beside Python."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.service.authority import Authority

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent))


def envoy() -> str:
    """Where it is."""
    assert ENVOY is not None, "envoy is not installed beside Python: pip install -e .[dev]"
    return ENVOY


def assert_envoy_takes(config: str, directory: Path) -> None:
    """Have Envoy read a configuration as if it were to run with it, with certificates where it looks for them."""
    file = directory / "envoy.yaml"
    file.write_text(config.replace("/etc/envoy/", f"{directory}/"))
    authority = Authority("test")
    for folder, name in (("tls", "tls"), ("upstream", "ca")):
        (directory / folder).mkdir()
        authority.issue("test").write(directory / folder, name)
    command = [envoy(), "--mode", "validate", "--log-level", "critical", "--config-path", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
