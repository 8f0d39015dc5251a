"""What a request asks for, as far as a router can tell: from its headers, or from the beginning of its body."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from loraplex_service.names.catalog import MAX_PARTS
from loraplex_service.names.grammar import ASKED_ADAPTER_NAME, ASKED_ID

ADAPTER: Final = "loraplex-adapter"
TENANT: Final = "loraplex-tenant"
ROUTING_KEY: Final = "loraplex-routing-key"
DESTINATION: Final = "x-gateway-destination-endpoint"
MODEL_OF_GATEWAYS: Final = "x-gateway-model-name"  # as the inference extension names it to its pickers
READ: Final = frozenset((ADAPTER, TENANT, ROUTING_KEY, MODEL_OF_GATEWAYS, "content-type"))
MAX_NAME: Final = 1024  # characters of a name, and of what else is read

_KEY: Final = b'"model"'
MAX_KEYS: Final = 64  # that are looked at
_VALUE = re.compile(rb'\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,1024}")')


class Wanted(NamedTuple):
    """An adapter, as a request names it."""

    tenant: str | None  # None: whichever has one of that id
    adapter: str


class Asked(NamedTuple):
    """A request, to a router."""

    adapters: tuple[Wanted, ...] = ()  # empty: none is known
    key: str = ""  # requests with the same one go to the same replica, where nothing else decides
    is_grpc: bool = False
    is_named: bool = False  # whether the headers say what `model` is
    tenant: str | None = None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> "Asked":
        tenant = headers.get(TENANT) or None
        name = headers.get(ADAPTER) or headers.get(MODEL_OF_GATEWAYS, "")
        is_grpc = headers.get("content-type", "").startswith("application/grpc")
        return cls(wanted(name, tenant), headers.get(ROUTING_KEY) or name, is_grpc, bool(name), tenant)

    def with_model(self, name: str) -> "Asked":
        """The same request, of which the body has said what `model` is."""
        return self._replace(adapters=wanted(name, self.tenant), key=self.key or name, is_named=True)


def headers_of(pairs: Any) -> dict[str, str]:
    """Those of a HeaderMap's headers that are read. The first of a name counts."""
    found: dict[str, str] = {}
    for pair in pairs:
        if pair.key in READ and pair.key not in found:
            value = pair.raw_value.decode("latin-1") or pair.value
            found[pair.key] = value if len(value) <= MAX_NAME else ""
    return found


def model_of(body: bytes) -> str:
    """The field `model` of a JSON object that may have been cut; "" where none is found."""
    at = -1
    for _ in range(MAX_KEYS):
        at = body.find(_KEY, at + 1)
        if at < 0:
            return ""
        found = _VALUE.match(body, at + len(_KEY))
        if found is not None and body[at - 1 : at] != b"\\":  # else it stands within a text
            return _text(found[1])
    return ""


def _text(value: bytes) -> str:
    try:
        return str(json.loads(value))
    except ValueError:
        return ""


def wanted(name: str, tenant: str | None) -> tuple[Wanted, ...]:
    """The adapters of a name: one, or those of a weighted sum. None of a base model's full name, or of no name."""
    terms = name[:MAX_NAME].split("+")[:MAX_PARTS]
    parts = (_adapter(term.partition("*")[0].strip(), tenant) for term in terms)
    return tuple(dict.fromkeys(part for part in parts if part is not None))


def _adapter(name: str, tenant: str | None) -> Wanted | None:
    bare = name.partition("@")[0]
    if match := ASKED_ADAPTER_NAME.fullmatch(name):
        return Wanted(match["tenant"], bare.rpartition("/")[2])
    return Wanted(tenant, bare) if ASKED_ID.fullmatch(name) else None
