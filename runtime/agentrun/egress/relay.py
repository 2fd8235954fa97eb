"""The relay: two TCP connections, joined.

Nothing is kept but what one side has sent and the other has not taken yet, and no more is read until it has: back-pressure
goes through. The end of one direction is passed on as such (half-close); an error on either side resets both, so that a
transfer that was cut off never looks complete.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable

import trio

from agentrun.egress.ledger import Traffic

CHUNK = 1 << 16
"""Bytes moved at once; a connection holds at most this much for each direction. Longer ones keep the daemon's loop busy."""

_buffer = bytearray(CHUNK)
"""One for all: between filling and emptying it nobody else runs. An idle connection has none."""
_view = memoryview(_buffer)
_RESET = struct.pack("@ii", 1, 0)  # struct linger


async def relay(inside: socket.socket, outside: socket.socket, traffic: Traffic, sent: Callable[[], None]) -> None:
    """Pass bytes both ways until both directions have ended; then close both sockets. They must be non-blocking.

    ``sent`` is called once all that came from inside has been handed to the kernel for outside, its end too. Whatever ends the
    relay early, each side is reset unless all that was for it has been passed on, with its end.
    """
    complete: set[socket.socket] = set()

    async def pump(source: socket.socket, sink: socket.socket, add: Callable[[int], None]) -> None:
        try:
            await _pump(source, sink, add)
            complete.add(sink)
        except OSError:
            nursery.cancel_scope.cancel()

    def add_sent(size: int) -> None:
        traffic.sent += size

    def add_received(size: int) -> None:
        traffic.received += size

    try:
        for sock in (inside, outside):
            # What comes in small pieces goes out in small pieces: we are not the one to wait for more.
            with contextlib.suppress(OSError):  # it may be gone already, which the pumps will find out
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump, outside, inside, add_received)
            await pump(inside, outside, add_sent)
            sent()
    finally:
        for sock in (inside, outside):
            if sock in complete:
                sock.close()
            else:
                reset(sock)


async def _pump(source: socket.socket, sink: socket.socket, add: Callable[[int], None]) -> None:
    while True:
        await trio.lowlevel.wait_readable(source)
        try:
            size = source.recv_into(_buffer)
        except BlockingIOError:
            continue
        if not size:
            sink.shutdown(socket.SHUT_WR)
            return
        add(size)
        done = _send(sink, _view[:size])
        if done < size:
            await _send_rest(sink, bytes(_view[done:size]))


async def _send_rest(sink: socket.socket, rest: bytes) -> None:
    done = 0
    while done < len(rest):
        await trio.lowlevel.wait_writable(sink)
        done += _send(sink, memoryview(rest)[done:])


def _send(sink: socket.socket, data: memoryview) -> int:
    try:
        return sink.send(data, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0


def reset(sock: socket.socket) -> None:
    """Close a connection so that the other side gets an error, and not an end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
