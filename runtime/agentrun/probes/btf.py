"""Offsets of struct members, values of enums and names of functions in the running kernel, from its BTF.

Documentation/bpf/btf in the kernel.

BCC does not relocate by BTF as libbpf does, so what a program has to know of a struct is read here and passed as a define.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _FUNC, _FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = (
    1,
    3,
    4,
    5,
    6,
    12,
    13,
    14,
    15,
    17,
    19,
)
_EXTRA = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
"""Bytes after the common part, for kinds whose size does not depend on the number of members."""
_PER_MEMBER = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}


class Btf:
    """One kernel's types, as far as they were asked for."""

    def __init__(self, members: Mapping[str, Iterable[str]], functions: Iterable[str], path: Path = VMLINUX) -> None:
        """Read ``members`` (struct → its members) and which of ``functions`` there are. 5 MB, some 50 ms.

        Raises:
            OSError: the kernel has no BTF (CONFIG_DEBUG_INFO_BTF).
            ValueError: it is not BTF.
        """
        data = path.read_bytes()
        magic, _, _, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"{path}: not BTF")
        text = data[header + strings : header + strings + strings_size]
        wanted = {text.find(b"\0" + name.encode() + b"\0") + 1: name for name in (*members, *functions)}
        wanted.pop(0, None)
        self.offsets: dict[str, int] = {}
        """``struct.member`` → bytes from its start."""
        self.positions: dict[str, int] = {}
        """``struct.member`` → which of its members it is, from 0."""
        self.values: dict[str, int] = {}
        """Enumerators of the enums that were asked for with these as their members."""
        self.functions: set[str] = set()
        self.ids: dict[str, int] = {}
        """Structs, enums and functions → their type id, by which bpf(2) knows them."""
        sizes: dict[str, int] = {}
        at, end, identity = header + types, header + types + types_size, 0
        while at < end:
            identity += 1
            name_at, info, size = _TYPE.unpack_from(data, at)
            kind, count = info >> 24 & 31, info & 0xFFFF
            name = wanted.get(name_at)
            if name is not None:
                if kind == _STRUCT and count and name not in sizes:
                    sizes[name] = size
                    self.ids[name] = identity
                    self._read(data, at + _TYPE.size, count, bool(info >> 31), text, name, set(members.get(name, ())))
                elif kind == _FUNC:
                    self.functions.add(name)
                    self.ids.setdefault(name, identity)
                elif kind in (_ENUM, _ENUM64):
                    self._enumerate(data, at + _TYPE.size, count, kind, text, set(members.get(name, ())))
            at += _TYPE.size + _EXTRA.get(kind, 0) + count * _PER_MEMBER.get(kind, 0)
        self.sizes = sizes

    def _read(self, data: bytes, at: int, count: int, bitfields: bool, text: bytes, name: str, members: set[str]) -> None:
        for number in range(count):
            member_at, _, bits = _TYPE.unpack_from(data, at + 12 * number)
            member = text[member_at : text.index(b"\0", member_at)].decode()
            if member in members:
                self.offsets[f"{name}.{member}"] = (bits & 0xFFFFFF if bitfields else bits) // 8
                self.positions[f"{name}.{member}"] = number

    def _enumerate(self, data: bytes, at: int, count: int, kind: int, text: bytes, members: set[str]) -> None:
        size = _PER_MEMBER[kind]
        for number in range(count):
            member_at, low, high = struct.unpack("<III", data[at + size * number :][:size].ljust(12, b"\0"))
            member = text[member_at : text.index(b"\0", member_at)].decode()
            if member in members:
                self.values[member] = high << 32 | low
