"""Who uses a session: a lock for each, flock(2), which ends with its holder however that ends.

Calls share it. Whoever changes a session, or compares it with its directory, has it alone; so no call runs in it meanwhile, and
nobody else changes it. Who needs the lock of the whole store as well takes it afterwards, and nobody the other way round: while
one session is waited for, or takes long, all others go on.

The lock's file has the name of the mount that calls use: two overlays must not write to one layer, and one does not see what
another has written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agentrun.errors import UsageError

_PATIENCE: Final = 1.0
"""Seconds to wait for calls to be gone."""
_AT_WORK: Final = "it is being changed, compared or applied; try again when that is over"
_MOUNT: Final = 16
"""Letters of a mount's name."""


class Busy(UsageError):
    """Others use a session in a way that nobody else can use it meanwhile: see ``share``."""


def share(path: Path, session_id: str, mounted: str) -> tuple[int, str]:
    """Be one of those who use a session, until the descriptor that is returned is closed. Never waits.

    Args:
        path: the lock's file.
        mounted: what this returned when the caller mounted the session; empty: he has not.

    Returns:
        The descriptor, and the name of the mount that is in use: another one than the caller gave, if he has to mount it now.

    Raises:
        Busy: others use it who have it mounted otherwise, or somebody has it alone.
        UsageError: there is no such session.
    """
    fd = _open(path, session_id)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"session {session_id}: {_AT_WORK}") from None
        if not mounted or os.pread(fd, _MOUNT, 0) != mounted.encode():
            mounted = _take_turn(fd, session_id)
    except BaseException:
        os.close(fd)
        raise
    return fd, mounted


@contextlib.contextmanager
def alone(path: Path, session_id: str) -> Iterator[None]:
    """Be the only one who uses a session, for the length of a block.

    Raises:
        UsageError: there is none; or calls run in it, or somebody else has it alone, and that takes long.
    """
    fd = _open(path, session_id)
    try:
        _wait_alone(fd, session_id)
        yield
    finally:
        os.close(fd)


def _open(path: Path, session_id: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError(f"session: there is no session {session_id}") from None


def _take_turn(fd: int, session_id: str) -> str:
    """Be the one whose mount is in use, with a lock that is shared before and after; what it is called."""
    mount = secrets.token_hex(_MOUNT // 2)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(fd, mount.encode(), 0)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        mount = ""
    # Between the two kinds of lock there is a moment with none.
    if not mount or os.pread(fd, _MOUNT, 0) != mount.encode():
        raise Busy(f"session {session_id}: calls of another policy, tenant or runtime run in it; wait for them")
    return mount


def _wait_alone(fd: int, session_id: str) -> None:
    """Wait until nobody uses a session. A call that has just returned may still be being taken down."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UsageError(f"session {session_id}: {_who_uses(fd)}") from None
        time.sleep(0.001)


def _who_uses(fd: int) -> str:
    """Calls let others share the lock; one who does not is at work on the session himself."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _AT_WORK
    return "calls run in it; wait for them, or end them"
