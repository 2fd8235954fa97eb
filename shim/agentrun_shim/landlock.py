"""Landlock as numbers: what this kernel's version of it can hold a tool to, and which rights a directory needs.

The rules themselves are executed by the native runner. Only writing is handled: what may be read is the mounts' business, and
a wall that also covered reading would need a rule for every directory of the image.

Sources: landlock(7), Documentation/userspace-api/landlock.rst, include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
from functools import cache
from typing import Final, NamedTuple

_NR_CREATE_RULESET: Final = 444
_CREATE_RULESET_VERSION: Final = 1

WRITE_FILE: Final = 1 << 1
REMOVE: Final = 1 << 4 | 1 << 5
MAKE_DEVICES: Final = 1 << 6 | 1 << 11
MAKE: Final = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 12
REFER: Final = 1 << 13  # since version 2
TRUNCATE: Final = 1 << 14  # 3
IOCTL_DEV: Final = 1 << 15  # 5
SCOPE_ABSTRACT_SOCKETS: Final = 1 << 0  # 6
SCOPE_SIGNALS: Final = 1 << 1  # 6
LOG_NOTHING: Final = 1 << 0 | 1 << 2
"""Since 7: no audit record of what the tool, or a sandbox of its own, is refused; it can refuse itself things for ever."""


class Rights(NamedTuple):
    """Bits for a ruleset, all of them known to this kernel."""

    handled: int
    scoped: int
    directory: int
    """What may be done below a directory that is the tool's."""
    files: int
    """What may be done with a file, or the files of a directory that cannot change, such as /dev."""
    flags: int
    """For landlock_restrict_self."""


@cache
def version() -> int:
    """The kernel's Landlock ABI, 0 if it has none, or was told at boot to leave it off."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = int(libc.syscall(_NR_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_CREATE_RULESET_VERSION)))
    return 0 if found < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP) else max(found, 0)


def rights(abi: int) -> Rights:
    """The rights to write, as an ABI has them."""
    newer = (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0) | (IOCTL_DEV if abi >= 5 else 0)
    handled = WRITE_FILE | REMOVE | MAKE | MAKE_DEVICES | newer
    return Rights(
        handled=handled,
        scoped=SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS if abi >= 6 else 0,
        directory=handled & ~MAKE_DEVICES,
        files=handled & (WRITE_FILE | TRUNCATE | IOCTL_DEV),
        flags=LOG_NOTHING if abi >= 7 else 0,
    )
