"""Typed values from parsed JSON: frozen dataclasses in, the same values out, everything else refused.

Guarantees: `build(T, plain(x)) == x`; an unknown or missing key, a wrong type, a number out of range or a
text that does not match its field's pattern raises EntryInvalid naming the place and what was expected.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from common.errors import EntryInvalid

SITE_PATTERN = r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?"
MAX_ITEMS = 100_000


def text(pattern: str) -> Any:
    """A text field (or a list or object of texts) that matches the whole pattern."""
    return dataclasses.field(metadata={"pattern": re.compile(pattern)})


def hex64(*, optional: bool = False) -> Any:
    """A SHA-256 or Ed25519 public key as 64 lower-case hex digits; empty where optional."""
    return text(r"(?:[0-9a-f]{64})?") if optional else text(r"[0-9a-f]{64}")


def site_id() -> Any:
    return text(SITE_PATTERN)


def ranged(low: float, high: float) -> Any:
    """An int or float field in [low, high]."""
    return dataclasses.field(metadata={"low": low, "high": high})


def build(annotation: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into a value of the annotated type; raises EntryInvalid."""
    return _builder(annotation)(value, where)


def plain(value: Any) -> Any:
    """Turn a typed value into JSON values; the inverse of `build`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, StrEnum):
        return value.value
    return value


Build = Callable[[Any, str], Any]


@functools.cache
def _builder(annotation: Any) -> Build:
    if dataclasses.is_dataclass(annotation):
        return _dataclass_builder(typing.cast(type, annotation))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return _tuple_builder(_builder(arguments[0]))
    if origin is dict:
        return _dict_builder(_builder(arguments[1]))
    if origin in (types.UnionType, typing.Union):
        raise TypeError(f"no builder for {annotation}")
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return _enum_builder(annotation)
    return _scalar_builder(annotation)


def _scalar_builder(kind: type) -> Build:
    def build_scalar(value: Any, where: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise EntryInvalid(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    return build_scalar


def _enum_builder(kind: type[StrEnum]) -> Build:
    members = {member.value: member for member in kind}

    def build_enum(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in members:
            raise EntryInvalid(f"{where}: expected one of {', '.join(members)}")
        return members[value]

    return build_enum


def _tuple_builder(item: Build) -> Build:
    def build_tuple(value: Any, where: str) -> Any:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise EntryInvalid(f"{where}: expected a list of at most {MAX_ITEMS}, got {type(value).__name__}")
        return tuple(item(entry, f"{where}[{index}]") for index, entry in enumerate(value))

    return build_tuple


def _dict_builder(item: Build) -> Build:
    name = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,63}")

    def build_dict(value: Any, where: str) -> Any:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise EntryInvalid(f"{where}: expected an object, got {type(value).__name__}")
        for key in value:
            if not name.fullmatch(key):
                raise EntryInvalid(f"{where}: expected names of lower-case letters, digits, _ . @ -")
        return {key: item(entry, f"{where}.{key}") for key, entry in value.items()}

    return build_dict


def _dataclass_builder(cls: type) -> Build:
    hints = typing.get_type_hints(cls)
    parts = [(f.name, _builder(hints[f.name]), f.metadata) for f in dataclasses.fields(cls)]
    names = {name for name, _, _ in parts}

    def build_dataclass(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise EntryInvalid(f"{where}: expected an object, got {type(value).__name__}")
        if value.keys() != names:
            wrong = sorted(value.keys() ^ names)
            raise EntryInvalid(f"{where}: unknown or missing {', '.join(wrong)[:200]}")
        arguments = {}
        for name, item, metadata in parts:
            built = item(value[name], f"{where}.{name}")
            if metadata:
                _check(metadata, built, f"{where}.{name}")
            arguments[name] = built
        return cls(**arguments)

    return build_dataclass


def _check(metadata: Mapping[str, Any], value: Any, where: str) -> None:
    if "pattern" in metadata:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for item in items:
            if not metadata["pattern"].fullmatch(item):
                raise EntryInvalid(f"{where}: expected text of the form {metadata['pattern'].pattern}")
    elif not metadata["low"] <= value <= metadata["high"]:
        raise EntryInvalid(
            f"{where}: expected a value in [{metadata['low']:g}, {metadata['high']:g}], got {value:g}"
        )
