"""The supervisor's side of a seccomp filter: system calls the kernel holds until somebody answers.

A filter loaded with SECCOMP_FILTER_FLAG_NEW_LISTENER comes with a descriptor, its listener. A call the filter gives USER_NOTIF
waits, and the listener becomes readable; one ``receive``, and one ``answer`` or ``let_continue``, let it go on. Once nobody holds
the listener, such calls fail with ENOSYS. The caller is a process in a sandbox and may die at any moment: no error here.

What a notification says of arguments are registers, copied; memory they point to may change until the call is made. So
``let_continue`` is for calls that would be allowed anyway.

Sources: seccomp_unotify(2), include/uapi/linux/seccomp.h, kernel/seccomp.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from functools import cache
from typing import Final, NamedTuple

from agentrun_shim.syscall_table import NUMBERS

NOTIF: Final = struct.Struct("=QII iIQ6Q")
"""struct seccomp_notif: id, pid, flags, and struct seccomp_data: nr, arch, instruction pointer, six arguments."""
RESPONSE: Final = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, value, error (-errno), flags."""
IOCTL_RECV: Final = 0xC0502100
"""SECCOMP_IOCTL_NOTIF_RECV: _IOWR('!', 0, struct seccomp_notif)."""
IOCTL_SEND: Final = 0xC0182101
"""SECCOMP_IOCTL_NOTIF_SEND: _IOWR('!', 1, struct seccomp_notif_resp)."""
FLAG_CONTINUE: Final = 1
_NR_SECCOMP: Final = 317
_GET_NOTIF_SIZES: Final = 3
_GONE: Final = (errno.ENOENT, errno.EINTR, errno.EINPROGRESS)


class Notification(NamedTuple):
    """A call that waits."""

    id: int
    pid: int
    """Of the caller, in our pid namespace; 0 if it is not visible here."""
    nr: int
    args: tuple[int, ...]


@cache
def sizes() -> tuple[int, int]:
    """What this kernel takes a notification and a response to be, bytes; newer kernels may have longer ones than we know.

    Raises:
        OSError: the kernel has no user notifications (before Linux 5.0).
    """
    libc = ctypes.PyDLL(None, use_errno=True)
    found = (ctypes.c_uint16 * 3)()
    if libc.syscall(ctypes.c_long(_NR_SECCOMP), ctypes.c_uint(_GET_NOTIF_SIZES), ctypes.c_uint(0), found) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "seccomp SECCOMP_GET_NOTIF_SIZES")
    return max(found[0], NOTIF.size), max(found[1], RESPONSE.size)


def receive(fd: int) -> Notification | None:
    """Take the next call that waits at a listener; ``None`` if its caller died meanwhile.

    Blocks where none waits: call it only when the listener is readable.

    Raises:
        OSError: ``fd`` is no listener.
    """
    buffer = bytearray(sizes()[0])  # zeros: the kernel refuses anything else
    try:
        fcntl.ioctl(fd, IOCTL_RECV, buffer)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    ident, pid, _flags, nr, _arch, _ip, *args = NOTIF.unpack_from(buffer)
    return Notification(ident, pid, nr & 0xFFFFFFFF, tuple(args))


def answer(fd: int, ident: int, error: int) -> bool:
    """Make the call fail with ``error``, or return 0 if that is 0. False if it does not wait any more."""
    return _send(fd, ident, -error, 0)


def let_continue(fd: int, ident: int) -> bool:
    """Let the call go on as if no filter were there (Linux 5.5). False if it does not wait any more."""
    return _send(fd, ident, 0, FLAG_CONTINUE)


def _send(fd: int, ident: int, error: int, flags: int) -> bool:
    buffer = bytearray(sizes()[1])
    RESPONSE.pack_into(buffer, 0, ident, 0, error, flags)
    try:
        fcntl.ioctl(fd, IOCTL_SEND, buffer)
    except OSError as failure:
        if failure.errno in _GONE:
            return False
        raise
    return True


@cache
def _names() -> dict[int, str]:
    return {number: name for name, number in NUMBERS.items()}


def syscall_name(nr: int) -> str:
    """The name of an x86-64 system call, or ``syscall_<number>`` where we know none."""
    return _names().get(nr) or f"syscall_{nr}"
