"""A unix socket that the daemon serves: making its file, who is at the other end, and sending."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from typing import NamedTuple

import trio

from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import UsageError

_PEERCRED = struct.Struct("iII")


class Peer(NamedTuple):
    """Who connected, as the kernel saw him then."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """Who is at the other end of a connection."""
    return Peer(*_PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)))


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    """Send everything."""
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


def open_listener(path: str, group: int | None) -> trio.socket.SocketType:
    """Bind the socket: mode 0600, or 0660 for a group. A dead daemon's socket is replaced, a live one's is not.

    Of directories only our own below /run is made: another that is missing is a mistake in a path.

    Raises:
        UsageError: the path cannot be used, or a daemon answers there.
    """
    if not path:
        raise UsageError("socket: the path is empty")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.dirname(path) == os.path.dirname(DEFAULT_SOCKET):
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise UsageError(f"socket {path}: there is something else at that path, which is left alone")
            if _answers(path):
                raise UsageError(f"socket {path}: a daemon answers there already")
            os.unlink(path)
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o660)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise UsageError(f"socket {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


def _answers(path: str) -> bool:
    os.stat(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
