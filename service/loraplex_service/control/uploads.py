"""The stream of an upload: a header, then each file as its start and its chunks."""

from collections.abc import AsyncIterator, Callable

from loraplex.v1.adapters_pb2 import CreateAdapterRequest, UploadAdapterRequest, UploadFile
from loraplex_adapters.files.config import MAX_CONFIG_BYTES
from loraplex_adapters.files.source import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE
from loraplex_adapters.files.trust import MAX_SIGNATURE_BYTES, SIGNATURE_FILE
from loraplex_service.adapters.library import Gathering
from loraplex_service.errors import InvalidRequest

# Is told the name and the size of a file of which more is written, and how many of its bytes are there.
Written = Callable[[str, int, int], None]


async def upload_header(messages: AsyncIterator[UploadAdapterRequest]) -> CreateAdapterRequest:
    """Return the header, the first message. Raises InvalidRequest if that is something else."""
    async for message in messages:
        if message.HasField("header"):
            return message.header
        break
    raise InvalidRequest.at("payload", "the first message of an upload must be its header")


async def receive_files(
    messages: AsyncIterator[UploadAdapterRequest],
    gathering: Gathering,
    max_bytes: int,
    announce: Callable[[int], None],
    written: Written = lambda name, size, num_bytes: None,
) -> None:
    """Write the files of the stream until it ends. `announce` is called with each file's size before it is written.

    Raises InvalidRequest, before anything beyond a limit is written, and what `announce` raises.
    """
    files = _Files(max_bytes)
    async for message in messages:
        match message.WhichOneof("payload"):
            case "file":
                files.begin(message.file)
                announce(message.file.size_bytes)
                await gathering.append(files.name, b"")
            case "chunk":
                chunk = message.chunk  # each look at it is a copy
                files.take(len(chunk))
                await gathering.append(files.name, chunk)
                written(files.name, files.size_bytes, files.num_bytes)
            case _:
                raise InvalidRequest.at("payload", "after the header come files and their chunks alone")
    files.end()


class _Files:
    """The file that is being received, and how many of its bytes are missing."""

    def __init__(self, max_bytes: int) -> None:
        self.name = ""
        self.size_bytes = 0
        self._missing_bytes = 0
        self._left_bytes = max_bytes
        self._limits = {
            CONFIG_FILE: MAX_CONFIG_BYTES,
            WEIGHTS_FILE: max_bytes,
            SIGNATURE_FILE: MAX_SIGNATURE_BYTES,
            **TEXT_FILES,
        }

    @property
    def num_bytes(self) -> int:
        """Of the file, received so far."""
        return self.size_bytes - self._missing_bytes

    def begin(self, file: UploadFile) -> None:
        self._check_whole()
        limit = self._limits.pop(file.name, None)
        if limit is None:
            raise InvalidRequest.at("file.name", f"{file.name[:80]!r}: one of {', '.join(self._limits)} is expected")
        limit = min(limit, self._left_bytes)
        if not 0 < file.size_bytes <= limit:
            raise InvalidRequest.at("file.size_bytes", f"{file.name}: must be from 1 to {limit}, is {file.size_bytes}")
        self.name = file.name
        self.size_bytes = self._missing_bytes = file.size_bytes
        self._left_bytes -= file.size_bytes

    def take(self, num_bytes: int) -> None:
        if num_bytes > self._missing_bytes:
            where = f"of {self.name} " if self.name else ""
            raise InvalidRequest.at("chunk", f"has {num_bytes} bytes; {self._missing_bytes} {where}are missing")
        self._missing_bytes -= num_bytes

    def end(self) -> None:
        self._check_whole()
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name in self._limits]
        if missing:
            raise InvalidRequest.at("file.name", f"missing: {', '.join(missing)}")

    def _check_whole(self) -> None:
        if self._missing_bytes:
            raise InvalidRequest.at("chunk", f"{self._missing_bytes} bytes of {self.name} are missing")
