"""Give the kernel a table of BPF functions (``struct_ops``), compiled by BCC, which knows nothing of these: by bpf(2) itself.

What libbpf would do, and no more: load each function as what it implements, put their descriptors into a map that looks like the
kernel's struct, and make a link of that map. The link is the table's life: when its descriptor closes, the kernel drops it.
Documentation/bpf/kfuncs and include/uapi/linux/bpf.h in the kernel.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from typing import NamedTuple

from agentrun.probes.btf import Btf
from agentrun.probes.loader import ProbesError

_NR_BPF = 321  # x86-64
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _BTF_LOAD, _LINK_CREATE = 0, 2, 5, 18, 28
_MAP_TYPE_STRUCT_OPS, _PROG_TYPE_STRUCT_OPS, _ATTACH_STRUCT_OPS = 26, 27, 44
_F_SLEEPABLE, _F_LINK = 1 << 4, 1 << 13
_CALL, _PSEUDO_CALL, _PSEUDO_KFUNC_CALL = 0x85, 1, 2
_HELPERS = 1000
"""Helpers have lower numbers than this; functions, which come after the types in BTF, have higher ones."""
_LOG_SIZE = 1 << 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Function(NamedTuple):
    """One member of the table."""

    code: bytes
    sleepable: bool = False


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, len(attr))
    result: int = _libc.syscall(_NR_BPF, command, buffer, len(attr))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mark_kernel_calls(code: bytes, functions: Mapping[int, str]) -> bytes:
    """BCC compiles a call of a number as the call of a helper; where the number is one of ``functions``, say that it is a BTF id.

    Raises:
        ProbesError: a call of something that is neither.
    """
    marked = bytearray(code)
    for at in range(0, len(code), 8):
        opcode, registers, _, number = struct.unpack_from("<BBhi", code, at)
        if opcode != _CALL or registers >> 4 == _PSEUDO_CALL:
            continue
        if number in functions:
            marked[at + 1] = registers & 15 | _PSEUDO_KFUNC_CALL << 4
        elif number >= _HELPERS:
            raise ProbesError(f"the compiler made a call of {number}, which nobody asked for")
    return bytes(marked)


def attach_table(name: str, btf: Btf, functions: Mapping[str, Function], values: Mapping[str, bytes], label: str) -> int:
    """Load ``functions`` (member → code) and attach them with ``values`` (member → bytes) as a ``struct name``; returns the link.

    ``btf`` must have been asked for the struct's members, for ``bpf_struct_ops_<name>`` and its ``data``.

    Raises:
        ProbesError: the kernel refused; the message is the verifier's where it had one.
        OSError: another system call failed.
    """
    wrapped = f"bpf_struct_ops_{name}"
    value = bytearray(btf.sizes[wrapped])
    data = btf.offsets[f"{wrapped}.data"]
    opened: list[int] = []
    try:
        for member, function in functions.items():
            program = _load(f"{label}_{member}", function, btf.ids[name], btf.positions[f"{name}.{member}"])
            opened.append(program)
            struct.pack_into("<Q", value, data + btf.offsets[f"{name}.{member}"], program)
        for member, bytes_ in values.items():
            at = data + btf.offsets[f"{name}.{member}"]
            value[at : at + len(bytes_)] = bytes_
        opened.append(types := _types())
        table = _bpf(_MAP_CREATE, struct.pack(
            "<IIIIIII16sIIIII", _MAP_TYPE_STRUCT_OPS, 4, len(value), 1, _F_LINK, 0, 0, label.encode(),
            0, types, 0, 0, btf.ids[wrapped],
        ))  # fmt: skip
        opened.append(table)
        key = ctypes.create_string_buffer(4)
        held = ctypes.create_string_buffer(bytes(value), len(value))
        _bpf(_MAP_UPDATE, struct.pack("<IIQQQ", table, 0, ctypes.addressof(key), ctypes.addressof(held), 0))
        return _bpf(_LINK_CREATE, struct.pack("<IIII", table, 0, _ATTACH_STRUCT_OPS, 0))
    finally:
        for fd in opened:  # the link holds what it needs
            os.close(fd)


def _load(name: str, function: Function, struct_id: int, member: int) -> int:
    try:
        return _load_quietly(name, function, struct_id, member, None)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return _load_quietly(name, function, struct_id, member, log)
        except OSError:
            lines = [line for line in log.value.decode(errors="replace").splitlines() if not line.startswith("processed")]
            raise ProbesError(f"{name}: {error.strerror}: {'; '.join(lines[-3:])}") from error


def _load_quietly(name: str, function: Function, struct_id: int, member: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
    code = ctypes.create_string_buffer(function.code, len(function.code))
    licence = ctypes.create_string_buffer(b"GPL")
    said = (1, len(log), ctypes.addressof(log)) if log is not None else (0, 0, 0)
    return _bpf(_PROG_LOAD, struct.pack(
        "<IIQQIIQII15sxIIIIQIIQII", _PROG_TYPE_STRUCT_OPS, len(function.code) // 8,
        ctypes.addressof(code), ctypes.addressof(licence), *said, 0, _F_SLEEPABLE if function.sleepable else 0,
        name.encode(), 0, member, 0, 0, 0, 0, 0, 0, 0, struct_id,
    ))  # fmt: skip


def _types() -> int:
    """A map of a kernel type wants BTF of its own beside the kernel's; that it has nothing to say does not matter."""
    strings = b"\0int\0"
    kind = struct.pack("<IIII", 1, 1 << 24, 4, 1 << 24 | 32)
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(kind), len(kind), len(strings))
    blob = ctypes.create_string_buffer(header + kind + strings, 24 + len(kind) + len(strings))
    return _bpf(_BTF_LOAD, struct.pack("<QQIII", ctypes.addressof(blob), 0, len(blob), 0, 0))
