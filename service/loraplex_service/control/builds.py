"""What this server is built of, as the metrics page says it."""

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

COMMIT = "LORAPLEX_COMMIT"  # of the source that an image was built from: its Containerfile sets it


@cache
def build_labels() -> Mapping[str, str]:
    """Versions by the label of each. An empty one is not known."""
    return {
        "version": _version("loraplex-server"),
        "commit": os.environ.get(COMMIT, ""),
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def _version(distribution: str) -> str:
    """Of an installed distribution, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
