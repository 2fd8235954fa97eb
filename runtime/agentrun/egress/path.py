"""The path out of one sandbox: its resolver, its gate and its watch, served by one task.

An idle path is four descriptors (three sockets and the epoll that watches them) and one task. The daemon's share of a call's
networking is bounded: so many names, connections and lookups a sandbox, and so many events a second.
"""

from __future__ import annotations

import ipaddress
import logging
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Self

import trio

from agentrun.egress import netns, watch
from agentrun.egress.addresses import never
from agentrun.egress.dial import Dialer
from agentrun.egress.gate import OUT_OF_ORDER, Gate, accepted
from agentrun.egress.ledger import Denial, Grant, Ledger
from agentrun.egress.relay import reset
from agentrun.egress.resolver import Resolver
from agentrun.egress.rules import Rules
from agentrun.errors import HostError

LINGER: Final = 2.0
"""Seconds a closing path gives to what a tool sent last, and did not wait for, to get out."""
MOST_DNS_CONNECTIONS: Final = 8
"""Connections to the resolver over TCP at once."""
BATCH: Final = 32
"""Packets of the watch looked at before others have their turn."""
EVENTS_PER_SECOND: Final = 2000.0
EVENTS_AT_ONCE: Final = 400.0
"""Events (queries, connections, packets seen) a sandbox may cause beyond its rate before it is kept waiting."""

_log = logging.getLogger("agentrun")
_SYNTHETIC = ipaddress.IPv4Network("198.18.0.0/15")
_DNS_PORTS = (53, 853)
_CLOSING_AT_ONCE = 64
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("agentrun egress closing")


class EgressPath:
    """Made by ``open``; ended by ``aclose``, or with the nursery it is in."""

    def __init__(self, rules: Rules, sockets: netns.Sockets) -> None:
        self._sockets = sockets
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], int]] = {}
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()
        self._budget = _Budget()
        self._dns_connections = 0
        self._ledger = Ledger()
        self._gate = Gate(Dialer(rules), self._ledger, sockets.dns, self._handle, self._start)
        self._resolver = Resolver(rules, self._ledger, sockets.dns, self._gate.introduce, self._budget.spend)
        self._handle(sockets.dns, lambda: self._resolver.hear(self._start))
        self._handle(sockets.dns_tcp, self._accept_dns)
        self._handle(sockets.watch, self._look)

    @classmethod
    async def open(cls, netns_fd: int, rules: Rules, nursery: trio.Nursery) -> Self:
        """Make the only way out of a network namespace, and serve it in ``nursery``.

        The namespace must be fresh: only lo in it, and nothing running that may change it. The descriptor is not kept. No tool
        may run there before this has returned.

        Raises:
            HostError: the kernel refused a step. Nothing is left but routes and addresses in that namespace.
        """
        try:
            sockets = await netns.prepare(netns_fd)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise HostError(f"preparing a sandbox's network for egress: {where}{error.strerror}") from error
        try:
            path = cls(rules, sockets)
        except OSError as error:
            sockets.close()
            raise HostError(f"preparing a sandbox's network for egress: {error.strerror} (raise LimitNOFILE)") from error
        try:
            await nursery.start(path._run, name="agentrun egress")
        except BaseException:
            # For a nursery that takes no more tasks; else the task has closed them.
            path._epoll.close()
            sockets.close()
            raise
        return path

    def denied(self) -> tuple[Denial, ...]:
        """What was tried in vain so far, with what the kernel has yet to tell us; at any time, also after ``aclose``."""
        self._catch_up()
        return self._ledger.denied()

    def granted(self) -> tuple[Grant, ...]:
        """The names and ports that were reached so far, and the bytes; at any time, also after ``aclose``."""
        return self._ledger.granted()

    async def aclose(self) -> None:
        """End the path. To be called when the sandbox's processes are dead; calling it again does nothing.

        What they had sent gets ``LINGER`` seconds to be delivered, as it would from any other host; then everything is closed.
        """
        with trio.CancelScope(shield=True):
            self._catch_up()
            with trio.move_on_after(LINGER):
                await self._gate.drain()
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()
            await self._closed.wait()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await self._serve()
                finally:
                    self._catch_up()
                    self._nursery = None
        except Exception:  # noqa: BLE001 - see _fail
            self._fail()
        finally:
            self._gate.close()
            self._epoll.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._sockets.close, limiter=_closing())
            self._closed.set()

    async def _serve(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            await self._budget.spend(sum(self._take()))

    def _take(self) -> list[int]:
        """Have everything handled that is ready now; how many events each source had."""
        return [self._handlers[fd]() for fd, _ in self._epoll.poll(0)]

    def _catch_up(self) -> None:
        """Take what has arrived and was not looked at yet: the last words of a tool that has just ended."""
        if self._nursery is None:
            return
        try:
            for _ in range(32):
                if all(count in (0, OUT_OF_ORDER) for count in self._take()):
                    break
            self._ledger.overlook(watch.dropped(self._sockets.watch))
        except Exception:  # noqa: BLE001 - see _fail
            self._fail()

    def _fail(self) -> None:
        """Something is wrong with us. One sandbox loses its network; its call, and the executor, go on."""
        _log.exception("a sandbox's egress path failed")
        self._ledger.deny("(everything)", "agentrun failed at relaying; its log says why")
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            self._nursery = None

    def _handle(self, sock: socket.socket, handler: Callable[[], int]) -> None:
        """Call ``handler`` when ``sock`` is readable; it returns how many events it took."""
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _start(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        assert self._nursery is not None, "handlers run only while the path is served"
        self._nursery.start_soon(function, *args)

    def _accept_dns(self) -> int:
        count = 0
        try:
            for sock in accepted(self._sockets.dns_tcp):
                count += 1
                if self._dns_connections >= MOST_DNS_CONNECTIONS:
                    reset(sock)
                else:
                    self._dns_connections += 1
                    self._start(self._serve_dns, sock)
        except OSError:
            return OUT_OF_ORDER
        return count

    async def _serve_dns(self, sock: socket.socket) -> None:
        try:
            await self._resolver.serve_tcp(sock)
        finally:
            self._dns_connections -= 1

    def _look(self) -> int:
        for count in range(BATCH):
            try:
                packet = self._sockets.watch.recv(watch.SNAP)
            except OSError:
                return count
            if (attempt := watch.parse(packet)) is not None:
                self._judge(attempt)
        return BATCH

    def _judge(self, attempt: watch.Attempt) -> None:
        """Report what the watch saw, unless it was a connection the gate serves. The kernel has refused it already."""
        address, port = attempt.address, attempt.port
        name = self._resolver.at(address)
        place = name.name if name else f"[{address}]" if address.version == 6 else str(address)
        udp = attempt.protocol == "udp"
        target = f"{place}:{port}{'/udp' if udp else ''}" if port else place
        if attempt.protocol == "tcp" and name:
            if port in name.ports:
                return
            reason = f"this name is allowed at {_list_ports(name.ports)} only"
        elif port in _DNS_PORTS and not name:
            reason = f"DNS to {address}: only the sandbox's own resolver answers"
        elif why := never(address):
            reason = f"{why}, which no tool may reach"
        elif attempt.protocol == "ping":
            reason = "ping is not relayed, only TCP to allowed names"
        elif attempt.protocol != "tcp":
            reason = f"{'UDP' if udp else 'this protocol'} is not relayed, only TCP to allowed names"
        elif address.version == 6:
            reason = "IPv6 is not relayed; connect to an allowed name"
        elif address in _SYNTHETIC:
            reason = "no name has this address; look names up in the call that uses them"
        else:
            reason = "an address, not a name; connect to an allowed name"
        self._ledger.deny(target, reason)


class _Budget:
    """Events a sandbox may cause: a leaky bucket, so that one that floods us costs a bounded part of the daemon's time."""

    __slots__ = ("_at", "_level")

    def __init__(self) -> None:
        self._level, self._at = 0.0, trio.current_time()

    async def spend(self, events: int) -> None:
        now = trio.current_time()
        self._level = max(0.0, self._level - (now - self._at) * EVENTS_PER_SECOND) + events
        self._at = now
        if self._level > EVENTS_AT_ONCE:
            await trio.sleep((self._level - EVENTS_AT_ONCE) / EVENTS_PER_SECOND)


def _closing() -> trio.CapacityLimiter:
    """For threads that close packet sockets, milliseconds each: not in the way of those who have other things to do."""
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(trio.CapacityLimiter(_CLOSING_AT_ONCE))
        return _limiter.get()


def _list_ports(ports: tuple[int, ...]) -> str:
    return f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports))}"
