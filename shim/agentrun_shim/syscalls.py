"""The mount API, by the kernel's own names: five-line wrappers that turn errno into ``OSError`` at once.

glibc gained these functions in 2.36; they are called by number, so that an older libc is no reason to fail. ``PyDLL`` keeps
the GIL: none of these calls blocks, and releasing it costs more than the call.

Sources: open_tree(2), move_mount(2), fsopen(2), fsconfig(2), fsmount(2), mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Final

AT_EMPTY_PATH: Final = 0x1000
AT_FDCWD: Final = -100
AT_RECURSIVE: Final = 0x8000
FSCONFIG_CMD_CREATE: Final = 6
FSCONFIG_SET_STRING: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSOPEN_CLOEXEC: Final = 1
MOUNT_ATTR_IDMAP: Final = 0x00100000
MOUNT_ATTR_NODEV: Final = 0x00000004
MOUNT_ATTR_NOEXEC: Final = 0x00000008
MOUNT_ATTR_NOSUID: Final = 0x00000002
MOUNT_ATTR_RDONLY: Final = 0x00000001
MOVE_MOUNT_F_EMPTY_PATH: Final = 4
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_NOSUID: Final = 2
MS_PRIVATE: Final = 1 << 18
MS_RDONLY: Final = 1
MS_REC: Final = 1 << 14
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
OPEN_TREE_CLONE: Final = 1

CLONE_FS: Final = 0x00000200
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWNET: Final = 0x40000000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWUTS: Final = 0x04000000

RESOLVE_IN_ROOT: Final = 0x10

_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 428, 429, 430, 431, 432
_NR_OPENAT2, _NR_MOUNT_SETATTR = 437, 442

_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


CANNOT_MAP_OWNERS: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What ``mount_setattr`` answers to MOUNT_ATTR_IDMAP where a file system, or a mount of a tree, cannot be mapped."""


def _call(what: str, number: int, *args: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """A detached clone of the mount at ``path`` (with OPEN_TREE_CLONE); returns its fd, close-on-exec."""
    raw = os.fsencode(path)
    return _call(
        f"open_tree {path or f'fd {dirfd}'}", _NR_OPEN_TREE, ctypes.c_int(dirfd), raw, ctypes.c_uint(flags | OPEN_TREE_CLOEXEC)
    )


def new_filesystem(fstype: str, options: Mapping[str, str] | Sequence[tuple[str, str]], attr_flags: int) -> int:
    """A new, detached file system: fsopen, fsconfig and fsmount in one; returns the mount's fd, close-on-exec.

    An option may come more than once; fsconfig(2) takes 255 bytes of each.
    """
    fs = _call(f"fsopen {fstype}", _NR_FSOPEN, fstype.encode(), ctypes.c_uint(FSOPEN_CLOEXEC))
    try:
        for key, value in options.items() if isinstance(options, Mapping) else options:
            _call(
                f"fsconfig {fstype} {key}={value}", _NR_FSCONFIG, ctypes.c_int(fs), ctypes.c_uint(FSCONFIG_SET_STRING),
                key.encode(), value.encode(), ctypes.c_int(0),
            )  # fmt: skip
        _call(
            f"fsconfig {fstype}", _NR_FSCONFIG, ctypes.c_int(fs), ctypes.c_uint(FSCONFIG_CMD_CREATE), None, None, ctypes.c_int(0)
        )
        return _call(
            f"fsmount {fstype}", _NR_FSMOUNT, ctypes.c_int(fs), ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(attr_flags)
        )
    except OSError as error:
        raise OSError(error.errno, _complaint(fs) or error.strerror, error.filename) from None
    finally:
        os.close(fs)


def _complaint(fs: int) -> str:
    """What a file system says of its own accord about why it cannot be made: fsopen(2), "Message retrieval interface"."""
    said = []
    with contextlib.suppress(OSError):  # ENODATA: no more
        while line := os.read(fs, 4096):
            said.append(line.decode(errors="replace").strip())
    return "; ".join(line.removeprefix("e ") for line in said if line.startswith("e "))


def move_mount(mount_fd: int, dirfd: int, path: str) -> None:
    """Attach a detached mount at ``path``."""
    _call(
        f"move_mount {path}", _NR_MOVE_MOUNT, ctypes.c_int(mount_fd), b"", ctypes.c_int(dirfd), os.fsencode(path),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )  # fmt: skip


def mount(source: bytes, target: bytes, fstype: bytes, flags: int, data: bytes) -> None:
    """mount(2), for what the newer calls cannot say."""
    if _libc.mount(source, target, fstype, ctypes.c_ulong(flags), data):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mount {os.fsdecode(fstype)}")


def leave_mount_namespace() -> None:
    """Give the calling thread a mount namespace of its own, from which nothing comes back: unshare(2), mount_namespaces(7)."""
    if _libc.unshare(CLONE_FS | CLONE_NEWNS) or _libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")


def mount_setattr(mount_fd: int, attr_set: int, *, recursive: bool = False, userns_fd: int = 0) -> None:
    """Set flags of a detached mount and make it private; with MOUNT_ATTR_IDMAP, map its owners through ``userns_fd``."""
    attr = _MountAttr(attr_set=attr_set, propagation=MS_PRIVATE, userns_fd=userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _call(
        f"mount_setattr {attr_set:#x}", _NR_MOUNT_SETATTR, ctypes.c_int(mount_fd), b"", ctypes.c_uint(flags),
        ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)),
    )  # fmt: skip


def open_in_root(dirfd: int, path: str, flags: int) -> int:
    """Open ``path`` as if ``dirfd`` were the root, links and all: openat2(2), RESOLVE_IN_ROOT. Its fd, close-on-exec."""
    how = _OpenHow(flags=flags | os.O_CLOEXEC, resolve=RESOLVE_IN_ROOT)
    return _call(
        path, _NR_OPENAT2, ctypes.c_int(dirfd), os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
    )  # fmt: skip
