"""What the processes that compute get of the service's environment: all but its secrets.

A process that dies may be written to a core file, and libraries print the environment when they fail.
"""

import re
from collections.abc import Mapping

# The service's own settings, and those of PostgreSQL's client, which the service alone uses.
_OWN = re.compile(r"LORAPLEX_(?!CPU_KERNELS$)|PG[A-Z]")
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|APIKEY|KEYS?|DSN)(_|$)", re.I
)
_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
# Engines fetch models from the hub, perhaps through a proxy.
_NEEDED = re.compile(r"(HF|HUGGING_?FACE)_|(https?|all)_proxy$", re.I)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold no secret, by their names and values, and what models are fetched with."""
    return {name: value for name, value in environment.items() if _NEEDED.match(name) or not _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    return bool(_OWN.match(name) or _SECRET.search(name) or _WITH_PASSWORD.search(value))
