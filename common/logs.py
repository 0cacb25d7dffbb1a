"""Structured logs without data: one JSON object per line, made of fixed words, names and numbers only.

A line holds the time, level, logger and `event`: the message's template as it stands in the source. Values
that were passed to it, and `extra` fields, are kept only where they cannot be free text: numbers, hashes,
names of errors, words of the protocol, and the named fields below; everything else is replaced by `null`.
An exception becomes the names of its types. Guarantees: what is not in the source code or in one of these
forms does not reach the file, so a report, a patient or a path in an error's text stays out of it.
It is not the place to look for an error's text: that is on stderr, at the machine.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from common.errors import FedRadError

MAX_FILE_BYTES = 16 << 20
_FILES_KEPT = 3
_TEMPLATE_CHARACTERS = 300
_WORDS = re.compile(
    r"hello|keys|shares|contribute|unmask|finish|witness|request|reply|refusal|align|tune|consortium|local|plain"
)
_HASH = re.compile(r"(?=[0-9]*[a-f])(?:[0-9a-f]{12}|[0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{64})")
_SITE = re.compile(r"[a-z](?:[a-z0-9-]{0,62}[a-z0-9])?")
_FIELDS: dict[str, re.Pattern[str]] = {
    "site": _SITE,
    "study": re.compile(r"[0-9a-f]{12,64}|[a-z](?:[a-z0-9-]{0,62}[a-z0-9])?"),
    "stage": _WORDS,
    "reason": re.compile(r"[A-Z][A-Za-z]{2,50}|[a-z]+(?:-[a-z]+){0,5}"),
    "version": re.compile(r"[0-9]+(?:\.[0-9]+){0,3}"),
}
_NUMBERS = ("round", "attempt", "seconds", "bytes", "count", "port", "pid", "status")


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON line; see the module for what may be in it."""

    def format(self, record: logging.LogRecord) -> str:
        value: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _template(record),
        }
        arguments = record.args if isinstance(record.args, tuple) else ()
        if arguments:
            value["values"] = [safe_value(argument) for argument in arguments]
        for name in (*_FIELDS, *_NUMBERS):
            if name in record.__dict__:
                value[name] = safe_field(name, record.__dict__[name])
        if record.exc_info and record.exc_info[0] is not None:
            value["error"] = _chain(record.exc_info[1])
        return json.dumps(value, ensure_ascii=True)


def safe_value(value: Any) -> Any:
    """Return a log message's value where it can only be a number, a hash, or a word of ours; else None."""
    if isinstance(value, bool | int) or (isinstance(value, float) and value == value):
        return value
    if isinstance(value, FedRadError):
        return value.code
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, str) and (_WORDS.fullmatch(value) or _HASH.fullmatch(value) or is_error_name(value)):
        return str(value)
    return None


def is_error_name(text: str) -> bool:
    """Whether this is the name of one of FedRad's errors that this process knows."""
    classes: list[type[FedRadError]] = [FedRadError]
    for one in classes:
        classes += one.__subclasses__()
    return any(one.__name__ == text for one in classes)


def safe_field(name: str, value: Any) -> Any:
    """Return a named field's value where it has the field's form; else None."""
    if name in _NUMBERS:
        return value if type(value) in (int, float, bool) else None
    return str(value) if isinstance(value, str) and _FIELDS[name].fullmatch(value) else None


def start_json_log(path: Path, *, logger: str = "fedrad", level: int = logging.INFO) -> logging.Handler:
    """Write a logger's records to `path` (mode 0600) too, at most 64 MB in all; returns the handler."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    handler = RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=_FILES_KEPT, encoding="ascii")
    handler.setFormatter(JsonFormatter())
    target = logging.getLogger(logger)
    target.addHandler(handler)
    if target.getEffectiveLevel() > level:
        target.setLevel(level)
    return handler


def _template(record: logging.LogRecord) -> str:
    """The message as it stands in the source: a message that was put together at run time is not one."""
    text = record.msg if isinstance(record.msg, str) else ""
    return text[:_TEMPLATE_CHARACTERS] if record.args or re.fullmatch(r"[a-z][a-z -]{0,60}", text) else ""


def _chain(error: BaseException | None) -> list[str]:
    names: list[str] = []
    while error is not None and len(names) < 8:
        names.append(type(error).__name__)
        error = error.__cause__
    return names
