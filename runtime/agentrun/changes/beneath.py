"""Files below a held directory. No link is followed, nothing above or on another file system is reached: openat2(2).

Whoever can write to a tree may replace a directory of it by a link at any moment. Every path here is therefore walked by the
kernel from the tree's own descriptor, and the last name is only ever used relative to its directory's descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
"""Without O_NONBLOCK, a pipe that somebody puts where a file was would be waited for."""
HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
PATH_MOST: Final = 4000
"""Bytes of a path below its tree; PATH_MAX is 4096. What lies deeper is refused."""
NOT_THERE: Final = (errno.ENOENT, errno.ENOTDIR)
ESCAPES: Final = (errno.ELOOP, errno.EXDEV)
"""What openat2 says of a link on the way, and of another file system."""

_NR_OPENAT2, _NR_RENAMEAT2 = 437, 316
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


def _call(path: bytes, number: int, *args: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(path))
    return result


def _openat2(dirfd: int, path: bytes, flags: int, resolve: int) -> int:
    how = _OpenHow(flags=flags | os.O_CLOEXEC, resolve=resolve)
    while True:
        try:
            return _call(
                path, _NR_OPENAT2, ctypes.c_int(dirfd), path or b".", ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
            )
        except OSError as error:
            if error.errno != errno.EAGAIN:  # a rename somewhere made the kernel unsure about "..": openat2(2)
                raise


def open_beneath(root: int, path: bytes, flags: int) -> int:
    """Open what is at ``path`` below ``root``; the empty path is the root itself.

    Raises:
        OSError: ELOOP for a link on the way, EXDEV for another file system.
    """
    if len(path) > PATH_MOST:
        raise OSError(errno.ENAMETOOLONG, f"a path of more than {PATH_MOST} bytes", os.fsdecode(path[:80]) + "…")
    return _openat2(root, path, flags, _RESOLVE)


def open_plainly(path: bytes) -> int:
    """An O_PATH descriptor of a directory by a path that has no links in it: one that has some now is another directory."""
    return _openat2(-100, path, os.O_PATH | os.O_DIRECTORY, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)


@contextlib.contextmanager
def opened(root: int, path: bytes, flags: int) -> Iterator[int]:
    """``open_beneath`` for a block."""
    fd = open_beneath(root, path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def look(root: int, path: bytes) -> os.stat_result | None:
    """What is at a path, a link itself; None if there is nothing.

    Raises:
        OSError: the way there leads through a link or to another file system.
    """
    try:
        with opened(root, path, HANDLE) as fd:
            return os.fstat(fd)
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise


def look_at(directory: int, name: bytes) -> os.stat_result | None:
    """The same for a name in an open directory."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def rename(directory: int, old: bytes, new: bytes, flags: int) -> None:
    """renameat2(2) within one directory."""
    fd = ctypes.c_int(directory)
    _call(old, _NR_RENAMEAT2, fd, old, fd, new, ctypes.c_uint(flags))


def sync_file_system(fd: int) -> None:
    """Have everything on the disk that has been written to the file system of ``fd``: syncfs(2)."""
    if _libc.syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def names_in(root: int, path: bytes) -> list[tuple[bytes, os.stat_result]]:
    """What is in a directory, in order; a name that goes away meanwhile is left out."""
    with opened(root, path, DIRECTORY) as fd:
        with os.scandir(fd) as entries:
            names = sorted(os.fsencode(entry.name) for entry in entries)
        return [(name, found) for name in names if (found := look_at(fd, name)) is not None]


def join(above: bytes, name: bytes) -> bytes:
    """A path below a tree's root from that of its directory."""
    return above + b"/" + name if above else name


def split(path: bytes) -> tuple[bytes, bytes]:
    """The opposite: the directory, and the name in it."""
    above, _, name = path.rpartition(b"/")
    return above, name


def walk(root: int, top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Everything below a directory, parents first; nothing is held open in between, so no depth is too much."""
    todo = [top]
    while todo:
        above = todo.pop()
        for name, found in names_in(root, above):
            path = join(above, name)
            yield path, found
            if stat.S_ISDIR(found.st_mode):
                todo.append(path)
