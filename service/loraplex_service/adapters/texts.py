"""Tokenizers and chat templates for the requests of adapters: the base model's, with what the adapter's files add."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex_adapters.errors import AdapterRejected
from loraplex_adapters.files.source import text_digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.versions import AdapterVersion
from loraplex_service.errors import Unavailable
from loraplex_service.names.target import Target
from loraplex_service.text import AdapterText, TextError, Tokenizer, adapter_text

MAX_HELD_CHARS = 64 << 20  # of the templates and tokens of all adapters whose texts are kept


@dataclass(frozen=True, slots=True)
class _Held:
    base: Tokenizer
    text: AdapterText


class AdapterTexts:
    """Reads the texts of adapters in threads, and keeps those that were used last. For one event loop."""

    def __init__(self, directory: Callable[[AdapterVersion], str]) -> None:
        """`directory`: returns the directory of a version's files."""
        self._directory = directory
        self._held: OrderedDict[AdapterKey, _Held] = OrderedDict()
        self._reading: dict[tuple[AdapterKey, int], asyncio.Task[AdapterText]] = {}

    async def dressed(self, target: Target) -> Target:
        """Return the target with the tokenizer that its requests use. A weighted sum uses its base model's.

        Raises Unavailable (ADAPTER_UNREADABLE) if the files are not what they were, or cannot be read.
        """
        if target.adapter is None or not target.adapter.text_digest:
            return target
        text = await self.text(target.adapter, target.model.tokenizer)
        return replace(target, model=replace(target.model, tokenizer=text.tokenizer))

    async def text(self, version: AdapterVersion, base: Tokenizer) -> AdapterText:
        """The text of a version that has files for it. Raises what `dressed` does."""
        held = self._held.get(version.key)
        if held is not None and held.base is base:
            self._held.move_to_end(version.key)
            return held.text
        reading = (version.key, id(base))
        if reading not in self._reading:
            self._reading[reading] = asyncio.create_task(self._read(version, base))
            self._reading[reading].add_done_callback(lambda task: self._forget(reading, task))
        return await asyncio.shield(self._reading[reading])

    def _forget(self, reading: tuple[AdapterKey, int], task: asyncio.Task[AdapterText]) -> None:
        del self._reading[reading]
        if not task.cancelled():
            task.exception()  # seen, even if its callers went away

    async def read(self, name: str, directory: Path, digest: str, base: Tokenizer) -> AdapterText:
        """The text in a directory whose text files have this digest. Raises what `dressed` does."""
        try:
            return await asyncio.to_thread(_read, directory, digest, base)
        except (AdapterRejected, OSError) as error:
            message = f"adapter {name}: the files of its text cannot be read: {error}"
            raise Unavailable("ADAPTER_UNREADABLE", message) from error

    async def _read(self, version: AdapterVersion, base: Tokenizer) -> AdapterText:
        directory = Path(self._directory(version))
        text = await self.read(version.version_name, directory, version.text_digest, base)
        self._held[version.key] = _Held(base, text)
        while len(self._held) > 1 and sum(held.text.num_chars for held in self._held.values()) > MAX_HELD_CHARS:
            self._held.popitem(last=False)
        return text


def _read(directory: Path, digest: str, base: Tokenizer) -> AdapterText:
    if text_digest(directory) != digest:
        raise AdapterRejected(["they were changed"])
    try:
        return adapter_text(directory, base)
    except TextError as error:
        reason = str(error).replace(f"{directory}/", "").replace(f"{directory}", "the adapter")
        return AdapterText(base, (f"its own text is not used: {reason}",))
