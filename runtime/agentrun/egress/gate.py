"""The gate: listening sockets for the names a sandbox has looked up, and a relay for each connection that comes in there.

A socket listens at one name's address and one allowed port, so a connection that is accepted is an allowed one, and its
listener says for which name. Connections to anything else find nobody: the kernel refuses them, and the watch sees them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final, Protocol

import trio

from agentrun.egress import netns
from agentrun.egress.dial import Dialer, Refused
from agentrun.egress.ledger import Ledger
from agentrun.egress.relay import relay, reset
from agentrun.egress.resolver import Name

MOST_CONNECTIONS: Final = 128
"""Relayed connections of one sandbox at once, two descriptors each. More are reset and reported."""
MOST_LISTENERS: Final = 512
"""Listening sockets of one sandbox: one for each port of each name it has looked up."""
BATCH: Final = 16
"""Connections accepted at once from one socket, before others have their turn."""
OUT_OF_ORDER: Final = 400
"""What a failure to accept counts, in events: as much as makes us pause, for the connection is still there."""


class Start(Protocol):
    """Starts a task that ends with the path."""

    def __call__(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start ``function(*args)``."""


class Gate:
    """The listening sockets and connections of one sandbox."""

    def __init__(
        self,
        dialer: Dialer,
        ledger: Ledger,
        neighbour: socket.socket,
        handle: Callable[[socket.socket, Callable[[], int]], None],
        start: Start,
    ) -> None:
        """``neighbour`` is any socket in the sandbox's namespace; ``handle`` has a function called when a socket is readable."""
        self._dialer, self._ledger, self._neighbour = dialer, ledger, neighbour
        self._handle, self._start = handle, start
        self._listeners: list[socket.socket] = []
        self._connections = 0
        self._unsent: set[socket.socket] = set()
        self._all_sent = trio.Event()

    async def introduce(self, name: Name) -> bool:
        """Listen at the address and every port of a name; False if that cannot be done for any of them."""
        if len(self._listeners) + len(name.ports) > MOST_LISTENERS:
            self._ledger.deny(name.name, f"this call has used {MOST_LISTENERS} pairs of names and ports; there are no more")
            return False
        try:
            made, failed = await netns.listen(self._neighbour, str(name.address), name.ports)
        except OSError as error:
            self._ledger.deny(name.name, f"the host could not make room for it: {error.strerror}")
            return False
        for failure in failed:
            own = failure.errno == errno.EADDRINUSE
            reason = "the sandbox itself listens at this port of every address" if own else f"the host: {failure.strerror}"
            self._ledger.deny(f"{name.name}:{failure.filename}", reason)
        for sock in made:
            self._listeners.append(sock)
            self._handle(sock, partial(self._accept, sock, name.name, sock.getsockname()[1]))
        return bool(made)

    def _accept(self, listener: socket.socket, name: str, port: int) -> int:
        target, count = f"{name}:{port}", 0
        try:
            for sock in accepted(listener):
                count += 1
                if self._connections >= MOST_CONNECTIONS:
                    self._ledger.deny(target, f"more than {MOST_CONNECTIONS} connections at once")
                    reset(sock)
                else:
                    self._connections += 1
                    self._unsent.add(sock)
                    self._start(self._connect, sock, name, port)
        except OSError as error:
            self._ledger.deny(target, f"the host could not accept it: {error.strerror}")
            return OUT_OF_ORDER
        return count

    async def _connect(self, inside: socket.socket, name: str, port: int) -> None:
        target = f"{name}:{port}"
        try:
            outside = await self._dialer.dial(name, port)
        except Refused as error:
            self._ledger.deny(target, str(error))
        else:
            await relay(inside, outside, self._ledger.grant(target), partial(self._sent, inside))
        finally:
            reset(inside)  # unless the relay has closed it
            self._sent(inside)
            self._connections -= 1

    def _sent(self, inside: socket.socket) -> None:
        self._unsent.discard(inside)
        if not self._unsent:
            self._all_sent.set()

    async def drain(self) -> None:
        """Wait until all that the sandbox sent is on its way. For when it is dead: nothing ends this while it goes on sending."""
        while self._unsent:
            self._all_sent = trio.Event()
            await self._all_sent.wait()

    def close(self) -> None:
        """Close the listening sockets; connections end with their tasks."""
        while self._listeners:
            self._listeners.pop().close()


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait, up to ``BATCH``, non-blocking.

    Raises:
        OSError: the host is short of something, say descriptors; they are still there.
    """
    for _ in range(BATCH):
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except ConnectionAbortedError:
            continue
        sock.setblocking(False)
        yield sock
