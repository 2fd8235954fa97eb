"""Values as TOML: whole documents for ``agentrun policy show``, and single values, cut short, for messages."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_LONGEST = 60
"""Characters of a value that a message shows."""
_WIDEST = 120
"""Columns of a list that stays on one line."""


def quote(text: str) -> str:
    """A basic string. What cannot be printed is escaped, so it is one line and harmless to a terminal."""
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else _escape(ord(c))) for c in text) + '"'


def _escape(code: int) -> str:
    # A lone surrogate (a byte of a path that is not UTF-8) has no escape in TOML; it only ever appears in messages.
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def write_key(key: str) -> str:
    """A key, in quotes if it needs them."""
    return key if _BARE.fullmatch(key) else quote(key)


def write_value(value: object) -> str:
    """A string, number, truth value, list or inline table.

    Raises:
        TypeError: TOML has no such value.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)  # inf and nan are TOML's words too
        case str():
            return quote(value)
        case list() | tuple():
            return "[" + ", ".join(map(write_value, value)) + "]"
        case Mapping():
            inside = ", ".join(f"{write_key(key)} = {write_value(item)}" for key, item in value.items())
            return f"{{ {inside} }}" if inside else "{}"
    raise TypeError(f"{type(value).__name__} is not a TOML value")


def write_document(tables: Mapping[str, object], path: tuple[str, ...] = ()) -> str:
    """A document: each table with its plain keys first, then the tables in it.

    Raises:
        TypeError: it contains something that TOML has no value for.
    """
    plain = {key: value for key, value in tables.items() if not isinstance(value, Mapping)}
    lines = [f"{write_key(key)} = {_wrapped(value)}\n" for key, value in plain.items()]
    if path and (lines or not tables):
        lines.insert(0, f"\n[{'.'.join(map(write_key, path))}]\n")
    inner = [write_document(value, (*path, key)) for key, value in tables.items() if isinstance(value, Mapping)]
    return "".join([*lines, *inner])


def _wrapped(value: object) -> str:
    text = write_value(value)
    if len(text) <= _WIDEST or not isinstance(value, list):
        return text
    return "[\n" + "".join(f"    {write_value(item)},\n" for item in value) + "]"


def show(value: object) -> str:
    """A value as a message shows it: one line, printable, short; a table only by its kind."""
    match value:
        case bool() | float():
            return write_value(value)
        case int():
            # str() refuses numbers of more than 4300 digits.
            return str(value) if abs(value) < 1 << 64 else f"a number of {value.bit_length()} bits"
        case str():
            return quote(value) if len(value) <= _LONGEST else quote(value[:_LONGEST]) + "…"
        case list():
            inside = [show(item) if isinstance(item, (bool, int, float, str)) else "…" for item in value[:4]]
            text = "[" + ", ".join([*inside, "…"] if len(value) > len(inside) else inside) + "]"
            return text if len(text) <= 2 * _LONGEST else f"a list of {len(value)}"
        case Mapping():
            return "a table"
        case datetime.date() | datetime.time():
            return value.isoformat()
    return type(value).__name__


def show_key(key: str) -> str:
    """A key as a message shows it: as it is written, and short."""
    return write_key(key if len(key) <= _LONGEST else key[:_LONGEST] + "…")


def printable(text: str) -> str:
    """A text that may quote anything, as one harmless line."""
    return "".join(c if c.isprintable() else _escape(ord(c)) for c in text)


def show_path(path: object) -> str:
    """A path as a message shows it: itself, in quotes if it cannot be printed."""
    text = str(path)
    return text if text.isprintable() else quote(text)
