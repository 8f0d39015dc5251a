"""Logging of both processes: text lines for people, or one JSON object a line for machines. Torch-free."""

import logging
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

LOG_FORMATS: Final = ("text", "json")


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; `exception` where there is one; and what a record has in `fields`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line | getattr(record, "fields", {})).decode()


def log_options() -> tuple[str, ...]:
    """The options of a command line by which another process logs as this one does."""
    root = logging.getLogger()
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    return "--log-level", logging.getLevelName(root.level), "--log-format", "json" if is_json else "text"


def set_up_logging(level: str, log_format: str, process: str, *filters: logging.Filter) -> None:
    """Log to stderr. `process`: a name that tells the lines of several processes apart; `filters` may add `fields`."""
    handler = logging.StreamHandler()
    for one in filters:
        handler.addFilter(one)
    text = logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
