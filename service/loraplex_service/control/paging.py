"""Pages of long lists."""

import base64
import binascii
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from loraplex_service.errors import InvalidRequest

T = TypeVar("T")
M = TypeVar("M", bound=Message)

DEFAULT_PAGE_SIZE = 100
PAGE_BYTES = 1 << 20  # of messages; the last one may go beyond: to build and to send them holds up others


class PageRequest(Protocol):
    @property
    def page_size(self) -> int: ...

    @property
    def page_token(self) -> str: ...


def page(
    items: Sequence[T], name: Callable[[T], str], message: Callable[[T], M], request: PageRequest
) -> tuple[list[M], str]:
    """Return one page of items in order of names, as messages, and the token of the next. Raises InvalidRequest.

    A page of large messages ends early. The token holds the last name of the page, so pages stay right while items come
    and go.
    """
    size = request.page_size or DEFAULT_PAGE_SIZE
    try:
        after = base64.b64decode(request.page_token.encode(), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest.at("page_token", "is not a token of an earlier response; leave it out to begin") from None
    start = bisect_right(items, after, key=name)
    shown: list[M] = []
    num_bytes = 0
    for item in islice(items, start, start + size):
        shown.append(message(item))
        num_bytes += shown[-1].ByteSize()
        if num_bytes > PAGE_BYTES:
            break
    end = start + len(shown)
    return shown, "" if end == len(items) else base64.urlsafe_b64encode(name(items[end - 1]).encode()).decode()
