"""How log lines look, for the entry points of both processes; libraries only call `getLogger`.

Knows no message: whatever a record carries in `extra` is printed behind it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final, Literal

LogFormat = Literal["console", "json"]

_PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's own
}


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class ConsoleFormatter(logging.Formatter):
    """One line for people: time, level, name, message, then `key=value` for each extra."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line, with the traceback behind it where there is one."""
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {record.getMessage()}"
        line += "".join(f" {key}={value}" for key, value in _extra(record).items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for collectors."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the object; what JSON can't hold becomes its `str`."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _extra(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure(style: LogFormat, level: int = logging.INFO) -> None:
    """Send everything from `level` on to stderr. Replaces the root logger's handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else ConsoleFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
