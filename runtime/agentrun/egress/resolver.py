"""The sandbox's resolver: gives each allowed name an address of its own, and says of every other that there is none.

The addresses mean something in one sandbox only, and nothing is asked of the host's resolver here: a query never leaves. An
address exists from the first time its name is asked for, and so do the sockets that listen there (``introduce``), so a sandbox
that asks for nothing has neither.

NXDOMAIN, and not REFUSED, for what is not allowed: musl waits five seconds for a better answer than REFUSED, and glibc calls
it temporary, which makes programs try again. REFUSED is for questions to resolvers elsewhere, which we only pretend to be.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from agentrun.egress import dns
from agentrun.egress.addresses import IpAddress
from agentrun.egress.ledger import Ledger
from agentrun.egress.netns import IP_PKTINFO
from agentrun.egress.rtnl import OWN_ADDRESS
from agentrun.egress.rules import Rules

MOST_NAMES: Final = 256
"""Names one sandbox may use; wildcards would make it any number."""
MOST_PENDING: Final = 256
"""Queries that may wait for a new name's sockets. One that is dropped costs its client the five seconds until it asks again."""
BATCH: Final = 16
"""Queries answered at once, before others have their turn."""
INTRODUCTION: Final = 10
"""Events a new name counts as: it takes a thread for a moment, and may fail and be tried again."""
TCP_TIMEOUT: Final = 10.0
"""Seconds a DNS connection may take over its next query."""

_PKTINFO = struct.Struct("@i4s4s")  # struct in_pktinfo
_ANCILLARY = socket.CMSG_SPACE(_PKTINFO.size)
_LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


class Name(msgspec.Struct, frozen=True):
    """A name in use."""

    name: str
    address: ipaddress.IPv4Address
    """What the sandbox knows it by."""
    ports: tuple[int, ...]


class Resolver:
    """Answers one sandbox's questions."""

    def __init__(
        self,
        rules: Rules,
        ledger: Ledger,
        sock: socket.socket,
        introduce: Callable[[Name], Awaitable[bool]],
        spend: Callable[[int], Awaitable[None]],
    ) -> None:
        """``sock`` is the UDP one. ``introduce`` makes a new name reachable, or says that it cannot. ``spend`` is awaited for
        what is not counted by who calls us, and slows a flood down.
        """
        self._rules, self._ledger, self._sock, self._introduce, self._spend = rules, ledger, sock, introduce, spend
        self._names: dict[str, Name] = {}
        self._by_address: dict[IpAddress, Name] = {}
        self._pending = 0
        self._lock = trio.Lock()

    def at(self, address: IpAddress) -> Name | None:
        """The name that has this address."""
        return self._by_address.get(address)

    def hear(self, start: Callable[..., None]) -> int:
        """Answer what waits at the UDP socket, up to ``BATCH``; returns how many queries there were.

        Questions that take longer are answered in a task of their own: ``start`` starts it.
        """
        for count in range(BATCH):
            try:
                data, ancillary, _, client = self._sock.recvmsg(4096, _ANCILLARY)
            except OSError:
                return count
            # Where it was sent to, and so where the answer has to come from: every address is ours.
            asked = next((_PKTINFO.unpack(info)[2] for _, kind, info in ancillary if kind == IP_PKTINFO), _LOOPBACK.packed)
            try:
                query = dns.parse_query(data)
            except dns.BadQuery as error:
                if error.reply is not None:
                    self._send(error.reply, client, asked)
                continue
            address = ipaddress.IPv4Address(asked)
            if not address.is_loopback:
                self._ledger.deny(f"{address}:53/udp", f"DNS to {address}: only the sandbox's own resolver answers")
                self._send(dns.reply(query, dns.REFUSED), client, asked)
            elif (answer := self._answer(query)) is not None:
                self._send(answer, client, asked)
            elif self._pending < MOST_PENDING:
                self._pending += 1
                start(self._answer_later, query, client, asked)
        return BATCH

    async def _answer_later(self, query: dns.Query, client: object, asked: bytes) -> None:
        try:
            self._send(await self._answer_fully(query), client, asked)
        finally:
            self._pending -= 1

    def _send(self, message: bytes, client: object, source: bytes) -> None:
        info = (socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO.pack(0, source, bytes(4)))
        with contextlib.suppress(OSError):  # a client whose queue is full, or that is gone, asks again or does not
            self._sock.sendmsg([message], [info], socket.MSG_NOSIGNAL, client)  # type: ignore[arg-type]

    async def serve_tcp(self, sock: socket.socket) -> None:
        """Answer the queries of one TCP connection, then close it."""
        waiting = b""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    with trio.move_on_after(TCP_TIMEOUT) as scope:
                        chunk = await stream.receive_some(4096)
                    if scope.cancelled_caught or not chunk:
                        return
                    waiting += chunk
                    while len(waiting) >= 2 and len(waiting) >= 2 + (size := int.from_bytes(waiting[:2], "big")):
                        message, waiting = waiting[2 : 2 + size], waiting[2 + size :]
                        await self._spend(1)
                        try:
                            answer = await self._answer_fully(dns.parse_query(message))
                        except dns.BadQuery as error:
                            if error.reply is None:
                                return
                            answer = error.reply
                        with trio.move_on_after(TCP_TIMEOUT) as scope:
                            await stream.send_all(len(answer).to_bytes(2, "big") + answer)
                        if scope.cancelled_caught:
                            return

    async def _answer_fully(self, query: dns.Query) -> bytes:
        answer = self._answer(query)
        if answer is None:
            # One at a time: each takes a thread for a moment.
            async with self._lock:
                if query.name not in self._names:
                    await self._add(query.name)
            if query.name in self._names:
                answer = self._answer(query)
        return answer or dns.reply(query, dns.SERVFAIL)

    async def _add(self, name: str) -> None:
        if len(self._names) >= MOST_NAMES:
            self._ledger.deny(name, f"this call has used {MOST_NAMES} names; no more are given addresses")
            return
        await self._spend(INTRODUCTION)
        new = Name(name, ipaddress.IPv4Address(OWN_ADDRESS) + 1 + len(self._names), self._rules.ports(name))
        if await self._introduce(new):
            self._names[name] = self._by_address[new.address] = new

    def _answer(self, query: dns.Query) -> bytes | None:
        """The answer, or None if the name has to be introduced first."""
        if not query.in_class:
            return dns.reply(query, dns.REFUSED)
        if query.name == "localhost" or query.name.endswith(".localhost"):  # RFC 6761, section 6.3
            return self._give(query, _LOOPBACK, v6=ipaddress.IPv6Address("::1"))
        if (address := query.reverse) is not None:
            found = self._by_address.get(address)
            if found or address.is_loopback:
                return dns.reply(query, dns.NOERROR, (dns.TYPE_PTR, dns.encode_name(found.name if found else "localhost")))
        if not query.name or not self._rules.ports(query.name):
            self._ledger.deny(query.shown, "this name is not allowed")
            return dns.reply(query, dns.NXDOMAIN)
        known = self._names.get(query.name)
        if known is None and query.kind in (dns.TYPE_A, dns.TYPE_ANY):
            return None
        return self._give(query, known.address if known else None)

    def _give(self, query: dns.Query, v4: IpAddress | None, v6: IpAddress | None = None) -> bytes:
        if v4 is not None and query.kind in (dns.TYPE_A, dns.TYPE_ANY):
            return dns.reply(query, dns.NOERROR, (dns.TYPE_A, v4.packed))
        if v6 is not None and query.kind == dns.TYPE_AAAA:
            return dns.reply(query, dns.NOERROR, (dns.TYPE_AAAA, v6.packed))
        return dns.reply(query, dns.NOERROR)
