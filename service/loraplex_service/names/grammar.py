"""The names in requests, held against the grammar of names."""

import re

from loraplex_adapters.grammar import ADAPTER_NAME, MODEL_NAME, ROUTE_NAME, TENANT_NAME
from loraplex_service.errors import InvalidRequest

# Names that requests may ask for. This is wider than the grammar: a caller who misspells a name is told that nothing
# has it, whatever the misspelling.
_ASKED = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
ASKED_ID = re.compile(rf"{_ASKED}(?P<version>@[0-9a-f]+)?")
ASKED_MODEL_NAME = re.compile(rf"models/({_ASKED})")
ASKED_ADAPTER_NAME = re.compile(rf"tenants/(?P<tenant>{_ASKED})/adapters/{_ASKED}(@[0-9a-f]+)?")
ASKED_ROUTE_NAME = re.compile(rf"tenants/(?P<tenant>{_ASKED})/routes/{_ASKED}")


def model_id(name: str, field: str) -> str:
    """The bare id in models/{model}. Raises InvalidRequest."""
    match = MODEL_NAME.fullmatch(name)
    if match is None:
        raise InvalidRequest.at(field, f"{name[:200]!r} is not a name of a model; models/{{model}} is expected")
    return match["model"]


def tenant_id(name: str, field: str, all_allowed: bool = False) -> str | None:
    """The bare id in tenants/{tenant}; None for tenants/-, which means all. Raises InvalidRequest."""
    if all_allowed and name == "tenants/-":
        return None
    match = TENANT_NAME.fullmatch(name)
    if match is None:
        expected = "tenants/{tenant}" + (", or tenants/- for all," if all_allowed else "")
        raise InvalidRequest.at(field, f"{name[:200]!r} is not a name of a tenant; {expected} is expected")
    return match["tenant"]


def adapter_name(name: str, field: str, version_allowed: bool = True) -> str:
    """Return the name, after checking its form. Raises InvalidRequest."""
    match = ADAPTER_NAME.fullmatch(name)
    if match is None or (match["version"] and not version_allowed):
        expected = "tenants/{tenant}/adapters/{adapter}" + (", with @{version} or without," if version_allowed else "")
        raise InvalidRequest.at(field, f"{name[:200]!r} does not name an adapter here; {expected} is expected")
    return name


def route_name(name: str, field: str) -> str:
    """Return the name, after checking its form. Raises InvalidRequest."""
    if not ROUTE_NAME.fullmatch(name):
        expected = "tenants/{tenant}/routes/{route} is expected"
        raise InvalidRequest.at(field, f"{name[:200]!r} is not a name of a route; {expected}")
    return name
