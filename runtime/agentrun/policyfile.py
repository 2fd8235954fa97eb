"""A policy file: its bytes, read with bounds, become typed tables; tables are laid over those they extend.

What is wrong is said in one line: the file, the key with its whole path, the value, and what would be right. msgspec decides
what is wrong; where it is, and the words, are found here.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import types
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType

from agentrun.errors import UsageError
from agentrun.policytables import PolicyTables
from agentrun.tomltext import printable, show, show_key, show_path

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

LARGEST = 64 << 10
"""Bytes of a policy file. The shipped ones have 2000; tomllib needs seconds for a megabyte made to be slow."""

# Each part of a dotted key costs tomllib the time of all before it. Ours have four; a host name in a list looks like one, and
# has 127 at most. Nothing here is tried twice (possessive quantifiers, a start only where a word starts), or the search itself
# would take minutes over a long word.
_DEEP_KEY = re.compile(r"""(?<![A-Za-z0-9_-])(?:(?>[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')[ \t]*+\.[ \t]*+){128}""")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of at most ``LARGEST``. Never waits: not for a FIFO, a device or a terminal.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: for a device, opening is an act
            raise UsageError(f"{show_path(path)}: not a regular file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{show_path(path)}: not a regular file")
            data = file.read(LARGEST + 1) or b""  # None: it would have to wait, which some files of /proc do
    except OSError as error:
        raise UsageError(f"{show_path(path)}: {error.strerror}") from error
    except ValueError:
        raise UsageError(f"{show_path(path)}: a path has no NUL") from None
    if len(data) > LARGEST:
        raise UsageError(f"{show_path(path)}: larger than a policy can be ({LARGEST >> 10} kB)")
    return data


def read_tables(data: bytes, where: str) -> PolicyTables:
    """Decode one file.

    Raises:
        UsageError: not TOML, an unknown key, a value of the wrong kind; names ``where``, the key and the value.
    """
    tree = _parse(data, where)
    try:
        return msgspec.convert(tree, PolicyTables)
    except msgspec.ValidationError as error:
        fault = next(_faults(tree, PolicyTables, ""), None)
        raise UsageError(f"{where}: {fault or error}") from None


def _parse(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > LARGEST:
        raise UsageError(f"{where}: larger than a policy can be ({LARGEST >> 10} kB)")
    try:
        text = data.decode()
        if _DEEP_KEY.search(text):
            raise UsageError(f"{where}: not a policy: a key of more than 128 parts")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not TOML: byte {error.start} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: not TOML: {printable(str(error))[:200]}") from None
    except RecursionError:
        raise UsageError(f"{where}: not a policy: lists or tables nested too deep") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise UsageError(f"{where}: not a policy: a number of thousands of digits") from None


def merge(base: _Struct, over: _Struct) -> _Struct:
    """``over`` laid on what it extends, key by key; a list, and a table of free keys, replaces the other as a whole."""
    changes: dict[str, Any] = {}
    for name in base.__struct_fields__:
        ours, theirs = getattr(over, name), getattr(base, name)
        if isinstance(theirs, msgspec.Struct):
            changes[name] = merge(theirs, ours)
        elif ours is not UNSET:
            changes[name] = ours
    return msgspec.structs.replace(base, **changes)


# ---------------------------------------------------------------- what is wrong, and where


def _faults(value: object, hint: Any, key: str) -> Iterator[str]:
    """What is wrong with a value of a type, the innermost place first."""
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        pass
    else:
        return
    for kind in _members(hint):
        yield from _inside(value, kind, key)
    yield f"{key}: {show(value)} is not {describe(hint)}"


def _inside(value: object, kind: Any, key: str) -> Iterator[str]:
    origin = get_origin(kind) or kind
    if origin is list and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _faults(item, get_args(kind)[0], f"{key}[{number}]")
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _faults(item, get_args(kind)[1], _join(key, name))
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, Mapping):
        fields = _fields(kind)
        for name, item in value.items():
            if name not in fields:
                yield _unknown(name, item, key, list(fields))
        for field in msgspec.structs.fields(kind):
            inner = _join(key, field.encode_name)
            if field.encode_name in value:
                yield from _faults(value[field.encode_name], fields[field.encode_name], inner)
            elif field.required:
                yield f"{inner}: is missing; it is {describe(fields[field.encode_name])}"


def _members(hint: Any) -> list[Any]:
    """The types of a union, without what says that the key may be left out, and without bounds."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) if part is not UnsetType for member in _members(part)]
    return [hint]


def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Name in the file → type."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}


def _join(key: str, name: str) -> str:
    return f"{key}.{show_key(name)}" if key else show_key(name)


def _unknown(name: str, value: object, key: str, known: list[str]) -> str:
    # In the wrong table; a slip of the pen; else everything there is.
    elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == name]
    close = get_close_matches(name, known, 1) if len(name) <= 60 else []
    if len(elsewhere) == 1 or close:
        advice = f"did you mean {_join(key, close[0]) if len(elsewhere) != 1 else elsewhere[0]}?"
    else:
        advice = f"known: {', '.join(known)}"
    if _join(key, name) == "process.rlimits.nproc":
        advice = "say pids.max, which sets it"
    return f"{_join(key, name)}: unknown key, with {show(value)} ({advice})"


def key_paths(kind: type[msgspec.Struct] = PolicyTables, key: str = "") -> list[str]:
    """Every key a policy file may have, as ``table.key``."""
    found = []
    for name, hint in _fields(kind).items():
        tables = [member for member in _members(hint) if isinstance(member, type) and issubclass(member, msgspec.Struct)]
        found += key_paths(tables[0], _join(key, name)) if tables else [_join(key, name)]
    return found


def describe(hint: Any) -> str:
    """What would be right, in words."""
    if get_origin(hint) is Annotated:
        return str(next(meta.description for meta in get_args(hint)[1:]))
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(describe(part) for part in get_args(hint) if part is not UnsetType)
    if get_origin(hint) is Literal:
        *most, last = map(show, get_args(hint))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) is list:
        return "a list"
    if hint is bool:
        return "true or false"
    if hint is str:
        return "text in quotes"
    return "a table"
