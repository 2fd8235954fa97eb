"""The six functions of libseccomp that make a filter program of rules.

Called through ctypes: the library is on every Debian (apt needs it), its headers and Python module mostly are not. No filter is
loaded here: the program is exported and handed on.

Sources: seccomp_init(3), seccomp_rule_add(3), seccomp_attr_set(3), seccomp_export_bpf(3), seccomp_version(3).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:  # the OCI runtime compiles filters without msgspec, which is not where engines start it
    from agentrun_shim.seccomp_profile import Condition, Op

LIBRARY: Final = "libseccomp.so.2"
LEAST: Final = (2, 5)
"""The first version with the binary tree."""
MANY: Final = 32
"""Rules beyond which a tree is shorter to walk than a list; with none at all, versions to 2.5.4 crash on the tree."""

_ACT_BADARCH, _CTL_OPTIMIZE = 2, 8
_BINARY_TREE = 2
_OPS: Final[dict[Op, int]] = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}

Rule: TypeAlias = "tuple[int, int, tuple[Condition, ...]]"
"""An action word (SECCOMP_RET_* and its data), a system call number, and conditions that must all hold."""


class _Version(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("major", "minor", "micro")]


class _Comparison(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("datum_a", ctypes.c_uint64), ("datum_b", ctypes.c_uint64)]


def export(default: int, bad_arch: int, rules: Iterable[Rule]) -> bytes:
    """Compile rules for x86-64: an array of ``struct sock_filter``.

    ``default`` is the action word where no rule fits, ``bad_arch`` the one for callers of any other architecture and of the x32
    interface. No rule may have ``default`` as its action.

    Raises:
        OSError: the library is missing or too old, or refused a rule.
    """
    library = _library()
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise OSError(22, f"refuses default action {default:#x} (seccomp_init)", LIBRARY)
    try:
        _check("seccomp_attr_set", library.seccomp_attr_set(context, _ACT_BADARCH, ctypes.c_uint32(bad_arch)))
        count = 0
        for action, nr, conditions in rules:
            array = (_Comparison * len(conditions))(*map(_comparison, conditions))
            what = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), nr, len(conditions), array)
            _check(f"seccomp_rule_add, system call {nr}", what)
            count += 1
        if count > MANY:
            _check("seccomp_attr_set", library.seccomp_attr_set(context, _CTL_OPTIMIZE, ctypes.c_uint32(_BINARY_TREE)))
        return _read_back(library, context)
    finally:
        library.seccomp_release(context)


def _read_back(library: ctypes.PyDLL, context: ctypes.c_void_p) -> bytes:
    """The program, by way of a file in memory: only libseccomp 2.6 can write to a buffer."""
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        _check("seccomp_export_bpf", library.seccomp_export_bpf(context, fd))
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _comparison(condition: Condition) -> _Comparison:
    if condition.op == "MASKED_EQ":
        return _Comparison(condition.arg, _OPS[condition.op], condition.mask, condition.value)
    return _Comparison(condition.arg, _OPS[condition.op], condition.value, 0)


@cache
def _library() -> ctypes.PyDLL:
    try:
        library = ctypes.PyDLL(LIBRARY)  # the GIL is kept: nothing here blocks
    except OSError as error:
        raise FileNotFoundError(2, "seccomp filters are compiled with it (apt-get install libseccomp2)", LIBRARY) from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_release.restype = None
    library.seccomp_version.restype = ctypes.POINTER(_Version)
    version = library.seccomp_version().contents
    if (version.major, version.minor) < LEAST:
        found = f"{version.major}.{version.minor}.{version.micro}"
        raise OSError(38, f"version {found} is too old ({'.'.join(map(str, LEAST))} or newer is needed)", LIBRARY)
    return library


def _check(what: str, result: int) -> None:
    if result < 0:
        raise OSError(-result, f"{os.strerror(-result)} ({what})", LIBRARY)
