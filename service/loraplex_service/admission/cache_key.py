"""The secret from which the salts of cached prefixes are made, so that no caller can make another tenant's."""

import os
import secrets
from pathlib import Path

FILE = "cache.key"
NUM_BYTES = 32


def cache_key(directory: Path | None) -> bytes:
    """The key that a state directory keeps, so that blocks on disk are found after a restart; None: a new one.

    Raises OSError if the directory has one that cannot be used, or takes none.
    """
    if directory is None:
        return secrets.token_bytes(NUM_BYTES)
    path = directory / FILE
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            key = file.read(NUM_BYTES + 1)
    except FileNotFoundError:
        return _new(path)
    if len(key) != NUM_BYTES:
        raise OSError(f"state_directory: {path} is no key of {NUM_BYTES} bytes: delete it, and another is made")
    return key


def _new(path: Path) -> bytes:
    key = secrets.token_bytes(NUM_BYTES)
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    unfinished.rename(path)
    return key
