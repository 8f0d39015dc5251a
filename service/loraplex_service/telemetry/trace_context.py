"""The caller's trace, from the metadata `traceparent`. Source: W3C Trace Context, level 1."""

import re
from collections.abc import Mapping

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}"  # version
    r"-(?P<trace_id>(?!0{32})[0-9a-f]{32})"
    r"-(?!0{16})[0-9a-f]{16}"  # the span that calls
    r"-[0-9a-f]{2}"  # flags
    r"(-.*)?"  # what later versions may add
)


def trace_id_of(metadata: Mapping[str, str]) -> str:
    """The trace id, 32 hexadecimal digits; "": there is no valid one."""
    found = _TRACEPARENT.fullmatch(metadata.get("traceparent", ""))
    return found["trace_id"] if found is not None else ""
