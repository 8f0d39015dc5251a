"""The metrics page of a replica, read by strict limits: whatever answers there, the picker stays as it is."""

import asyncio
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from urllib.parse import quote

from loraplex_service.picker.asked import Wanted
from loraplex_service.picker.policy import Place

LOADED: Final = "vllm:lora_adapter_loaded"
IN_USE: Final = "vllm:lora_requests_info"
SLOTS: Final = "vllm:max_gpu_lora_adapters"
IN_FLIGHT: Final = "loraplex_in_flight_sequences"  # of now; what an engine says of itself is of its last step
DRAINING: Final = "loraplex_draining"
NAMES: Final = (LOADED, IN_USE, SLOTS, IN_FLIGHT, DRAINING)
PATH: Final = "/metrics?" + "&".join(f"name[]={quote(name)}" for name in NAMES)

MAX_BYTES: Final = 4 << 20  # of a page
MAX_SAMPLES: Final = 20_000
MAX_VALUE: Final = 256  # characters of a label
MAX_REQUESTS: Final = 1_000_000  # that a replica may say it has

_LINE = re.compile(rf"^({'|'.join(NAMES)})(?:\{{(.*)\}})? (\S{{1,64}})$", re.MULTILINE)
_LABEL = re.compile(r'([a-z_]{1,64}+)="((?:[^"\\]++|\\.)*+)"(?:,|$)')  # gives nothing back: a page may be one long line
_LEVELS: Final = {"gpu": Place.DEVICE, "cpu": Place.HOST}


@dataclass(slots=True)
class Page:
    """What a replica said of itself. It is not changed once it is read."""

    loaded: dict[str, dict[str, Place]] = field(default_factory=lambda: defaultdict(dict))  # by id, by tenant
    in_use: set[str] = field(default_factory=set)  # ids of adapters on the device that have requests
    awaited: set[str] = field(default_factory=set)  # ids of adapters with requests that wait for them
    models: set[str] = field(default_factory=set)
    num_slots: int = 0
    num_requests: int = 0  # that it has let in, whatever has become of them
    is_draining: bool = False

    def place(self, adapter: Wanted) -> Place:
        """Where an adapter is, as far as the page says."""
        placed = self._level(adapter)
        if placed is Place.DEVICE:
            return Place.ACTIVE if adapter.adapter in self.in_use else Place.DEVICE
        if placed is None and adapter.adapter in self.models:
            return Place.ACTIVE  # it is no adapter
        if adapter.adapter in self.awaited:
            return Place.DEVICE
        if len(self.in_use) + len(self.awaited) >= self.num_slots:
            return Place.FULL
        return placed or Place.ROOM

    def _level(self, adapter: Wanted) -> Place | None:
        tenants = self.loaded.get(adapter.adapter, {})
        if adapter.tenant is None:
            return max(tenants.values(), default=None)
        return tenants.get(adapter.tenant) or tenants.get("shared") or tenants.get("")


async def fetch_page(host: str, port: int) -> str:
    """Fetch what of the page is read. Raises OSError, ValueError for what is no such page."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 16)
    try:
        # HTTP/1.0: the page ends with the connection, in one piece.
        writer.write(f"GET {PATH} HTTP/1.0\r\nHost: {host}\r\nAccept: text/plain\r\n\r\n".encode())
        await writer.drain()
        answer = bytearray()
        while chunk := await reader.read(1 << 16):
            answer += chunk
            if len(answer) > MAX_BYTES:
                raise ValueError(f"its metrics page is larger than {MAX_BYTES >> 20} MiB")
    finally:
        writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if not re.match(rb"HTTP/1\.\d 200 ", head):
        raise ValueError(f"its metrics page is {head[:40]!r}")
    return body.decode(errors="replace")


def read_page(text: str) -> Page:
    """Read a page. What is not understood of it is left out."""
    page, in_use = Page(), list[tuple[float, Mapping[str, str]]]()
    for name, labels, value in islice(_samples(text), MAX_SAMPLES):
        if name == LOADED and value > 0:
            _put_loaded(page, labels)
        elif name == IN_USE:
            in_use.append((value, labels))
        elif name == SLOTS:
            page.models.add(labels.get("model_name", ""))
            page.num_slots += _count(value)
        elif name == IN_FLIGHT:
            page.num_requests += _count(value)
        elif name == DRAINING:
            page.is_draining = value > 0
    newest = max((value for value, _ in in_use), default=0)
    rows = [labels for value, labels in in_use if value == newest]  # others are of before
    page.in_use = _split(rows, "running_lora_adapters")
    page.awaited = _split(rows, "waiting_lora_adapters")
    return page


def _put_loaded(page: Page, labels: Mapping[str, str]) -> None:
    place = _LEVELS.get(labels.get("level", ""))
    if place is not None:
        tenants = page.loaded[labels.get("adapter_name", "")[:MAX_VALUE]]
        tenant = labels.get("tenant", "")
        tenants[tenant] = max(place, tenants.get(tenant, place))


def _samples(text: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for name, labels, number in (found.groups() for found in _LINE.finditer(text)):
        try:
            value = float(number)
        except ValueError:
            continue
        yield name, _labels(labels or ""), value


def _labels(text: str) -> Mapping[str, str]:
    """Those up to what is none."""
    labels, end = dict[str, str](), 0
    while label := _LABEL.match(text, end):
        labels[label[1]], end = label[2], label.end()
    return labels


def _split(rows: Iterable[Mapping[str, str]], label: str) -> set[str]:
    """The names in a label of all rows."""
    names = (name.strip() for row in rows for name in row.get(label, "").split(","))
    return {name[:MAX_VALUE] for name in islice(filter(None, names), MAX_SAMPLES)}


def _count(value: float) -> int:
    return int(min(max(value, 0), MAX_REQUESTS)) if math.isfinite(value) else MAX_REQUESTS
