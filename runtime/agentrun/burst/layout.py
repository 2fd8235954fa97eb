"""The structs of the headers in ``bpf/``, read from those very files: there is one definition, and it is C."""

from __future__ import annotations

import re
import struct
from functools import cache
from typing import NamedTuple

from agentrun_shim.data import data_path

_CODES = {"u8": "B", "u16": "H", "u32": "I", "s32": "i", "u64": "Q", "s64": "q"}
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_STRUCT = re.compile(r"struct (\w+) \{(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"\s*(\w+) (\w+)(?:\[(\d+)\])?\s*")
_ENUM = re.compile(r"enum (\w+) \{(.*?)\};", re.DOTALL)
_DEFINE = re.compile(r"^#define (\w+) (\w+)$", re.MULTILINE)


class Field(NamedTuple):
    """A member: where it is and how ``struct`` reads it."""

    offset: int
    code: str


class Layout(NamedTuple):
    """One struct: little-endian, naturally aligned."""

    size: int
    fields: dict[str, Field]

    def part(self, first: str, last: str) -> struct.Struct:
        """The members from one to another, which must lie side by side.

        Native, because then each is copied at once: the programs may read it in the middle of our writing, on another CPU.
        """
        names = list(self.fields)
        names = names[names.index(first) : names.index(last) + 1]
        found = struct.Struct("@" + "".join(self.fields[name].code for name in names))
        assert found.size == self.fields[last].offset + struct.calcsize(self.fields[last].code) - self.fields[first].offset
        return found


@cache
def layouts(header: str = "events.h") -> dict[str, Layout]:
    """Every struct of a header.

    Raises:
        ValueError: a member this reader does not understand.
    """
    return {name: _layout(name, body) for name, body in _STRUCT.findall(_text(header))}


@cache
def constants(header: str = "events.h") -> dict[str, int]:
    """Its enumerators and numeric defines."""
    found = {name: int(value, 0) for name, value in _DEFINE.findall(_text(header)) if value[0].isdigit()}
    for _, body in _ENUM.findall(_text(header)):
        for item in body.split(","):
            name, _, value = item.partition("=")
            found[name.strip()] = int(value, 0)
    return found


@cache
def _text(header: str) -> str:
    return _COMMENT.sub("", data_path(f"bpf/{header}").read_text())


def _layout(name: str, body: str) -> Layout:
    fields: dict[str, Field] = {}
    offset = widest = 0
    for member in body.split(";")[:-1]:
        found = _MEMBER.fullmatch(member)
        if found is None or (found[1] not in _CODES and found[1] != "char"):
            raise ValueError(f"struct {name}: {member.strip()!r} is no member this reader knows")
        kind, label, count = found.groups()
        code = f"{count}s" if kind == "char" else (count or "") + _CODES[kind]
        unit = 1 if kind == "char" else struct.calcsize(_CODES[kind])
        offset = (offset + unit - 1) // unit * unit
        fields[label] = Field(offset, code)
        offset += struct.calcsize(f"<{code}")
        widest = max(widest, unit)
    return Layout((offset + widest - 1) // widest * widest, fields)
