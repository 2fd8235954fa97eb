"""Into a sandbox's network namespace and out of it: sockets that live there and are served from here.

The namespace is a property of the thread, and a socket keeps the one it was made in. So a thread is started for the purpose,
enters, makes the sockets, and ends: no thread that does anything else is ever elsewhere, and none can fail to come back. One
of trio's own would be used again, by whoever is next.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeVar

import trio

from agentrun.egress import rtnl, watch

T = TypeVar("T")

BACKLOG: Final = 128
"""Connections that may wait to be accepted, at each listening socket."""
BUFFER: Final = 1 << 18
"""Bytes of each queue of a connection inside (the kernel doubles it, and caps it at net.core.[rw]mem_max). Left to itself it
lets megabytes pile up, at the daemon's expense, for a tool that does not read."""
IP_PKTINFO: Final = 8
_CLONE_NEWNET: Final = 0x40000000
_SIOCGSKNS: Final = 0x894C
"""ioctl: a descriptor of the network namespace a socket is in (include/uapi/linux/sockios.h)."""
_ENTERING: Final = "entering the sandbox's network namespace"

_libc = ctypes.CDLL(None, use_errno=True)


class Sockets(NamedTuple):
    """What an idle sandbox costs: three sockets."""

    dns: socket.socket
    """UDP, port 53 of every address."""
    dns_tcp: socket.socket
    """Listens at 127.0.0.1:53."""
    watch: socket.socket
    """AF_PACKET on lo: see ``watch``."""

    def close(self) -> None:
        """Close them. Takes milliseconds: a packet socket's end waits for an RCU grace period."""
        for sock in self:
            sock.close()


async def prepare(netns_fd: int) -> Sockets:
    """Make everything local in a network namespace, and make the sockets that wait there.

    Raises:
        OSError: the kernel refused a step; nothing is left open.
    """
    return await _inside(lambda: netns_fd, _prepare)


async def listen(neighbour: socket.socket, address: str, ports: Iterable[int]) -> tuple[list[socket.socket], list[OSError]]:
    """Sockets that listen at ``address`` and each of ``ports``, in the namespace ``neighbour`` is in.

    Returns them and, for the ports that could not be had, why; ``filename`` is the port.

    Raises:
        OSError: the namespace could not be entered.
    """

    def namespace() -> int:
        # No descriptor of the namespace is kept while a sandbox is idle: one of its sockets leads there.
        return fcntl.ioctl(neighbour, _SIOCGSKNS)

    def make() -> tuple[list[socket.socket], list[OSError]]:
        made, failed = [], []
        for port in ports:
            try:
                made.append(_listener(address, port))
            except OSError as error:
                failed.append(OSError(error.errno, error.strerror, str(port)))
        return made, failed

    return await _inside(namespace, make, close=True)


def _prepare() -> Sockets:
    made: list[socket.socket] = []
    try:
        rtnl.make_everything_local()
        made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        made[0].setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        made[0].bind(("0.0.0.0", 53))
        made.append(_listener("127.0.0.1", 53))
        made.append(watch.open_socket())
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return Sockets(*made)


def _listener(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # what it accepts inherits them
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _inside(namespace: Callable[[], int], work: Callable[[], T], *, close: bool = False) -> T:
    """Call ``work`` in a thread that has entered the namespace behind the descriptor ``namespace()`` gives, and ends with it.

    Not cancelled: it takes well under a millisecond, and what it made has to be taken over by somebody.
    """
    token, done = trio.lowlevel.current_trio_token(), trio.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def main() -> None:
        try:
            fd = namespace()
            try:
                if _libc.setns(fd, _CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), _ENTERING)
            finally:
                if close:
                    os.close(fd)
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is waited for
            errors.append(error)
        token.run_sync_soon(done.set)

    try:
        threading.Thread(target=main, name="agentrun netns", daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread can be started", _ENTERING) from error
    with trio.CancelScope(shield=True):
        await done.wait()
    if errors:
        raise errors[0]
    return results[0]
