"""Uploads that an engine reads while they come."""

from pathlib import Path

from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE
from loraplex_engine.link.adapters import EngineAdapters
from loraplex_engine.link.uploads import FollowedUpload


class ReadingAhead:
    """Has an engine follow an upload, from the first byte of the weights on, if the config is there by then."""

    def __init__(self, adapters: EngineAdapters | None, directory: Path) -> None:
        """`adapters`: of the engine; None: there is none, or none may read what is not whole. `directory`: of the
        files."""
        self.upload: FollowedUpload | None = None
        self._adapters = adapters
        self._directory = directory
        self._has_config = False

    def written(self, name: str, size_bytes: int, num_bytes: int) -> None:
        """Note how many bytes of a file are written."""
        if name == CONFIG_FILE:
            self._has_config = num_bytes == size_bytes
        if name != WEIGHTS_FILE or not self._has_config or self._adapters is None:
            return
        if self.upload is None:
            self.upload = self._adapters.follow_upload(str(self._directory), size_bytes)
        self.upload.grew(num_bytes)

    def end(self) -> None:
        """Have the engine forget what it has read, unless it was told of an adapter that the upload has brought."""
        if self.upload is not None:
            self.upload.end()
