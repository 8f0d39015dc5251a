"""An upload that an engine reads while it comes."""

from loraplex_engine.link.connection import Connection
from loraplex_engine.link.messages import UploadEnded, UploadGrew

NEWS_BYTES = 1 << 20  # that come between two messages to the engine


class FollowedUpload:
    """Tells one life of an engine how far an upload is. Once that engine is gone, it tells nobody."""

    def __init__(self, connection: Connection, number: int, path: str, size_bytes: int) -> None:
        self.connection = connection
        self.number = number
        self._path = path
        self._size_bytes = size_bytes
        self._told_bytes = -NEWS_BYTES

    def grew(self, num_bytes: int) -> None:
        """Note that so many bytes of the weights are written."""
        if num_bytes - self._told_bytes >= NEWS_BYTES or num_bytes == self._size_bytes:
            self._told_bytes = num_bytes
            self._tell(UploadGrew(self.number, self._path, self._size_bytes, num_bytes))

    def end(self) -> None:
        """Note that nobody needs what was read, unless an adapter has been wanted by it."""
        self._tell(UploadEnded(self.number))

    def _tell(self, news: UploadGrew | UploadEnded) -> None:
        if self.connection.error is None:
            self.connection.send(news)
