"""The names by which a server is called, where it asks for no credentials.

Whoever owns a name can have it mean this machine, and a page of that site may then call the server as its own. What no
page can do is to call it by another name than that of its site.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from loraplex_service.http.failures import Refusal


class Hosts:
    """The names of one server. An address is nobody's name, and always taken."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """None: any, since callers show credentials that no page has."""
        self._names = None if names is None else {name.lower() for name in names}

    def check(self, headers: Mapping[str, str]) -> None:
        """Raise Refusal for a call by another name, and for a page of another site."""
        if self._names is None or "host" not in headers:
            return
        host = headers["host"].lower()
        name = _name(f"//{host}")
        if name not in self._names | {"localhost"} and not _is_address(name):
            problem = f"the server has no name {name[:100]!r}: call its address, or add the name to `http_hosts`"
            raise Refusal(403, problem, param="host", code="permission_denied")
        origin = headers.get("origin", "").lower()
        if origin and origin.partition("//")[2] != host and _name(origin) not in self._names:
            problem = "pages of other sites may not call a server without credentials, but those of its `http_hosts`"
            raise Refusal(403, problem, param="origin", code="permission_denied")


def _name(url: str) -> str:
    """The name of a host without its port; "": there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
