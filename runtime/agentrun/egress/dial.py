"""From a name to a connection, on the host's side: resolve, judge every address, connect to one that was judged."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from functools import partial

import trio

from agentrun.egress import rtnl
from agentrun.egress.addresses import IpAddress, forbidden
from agentrun.egress.rules import Rules

RESOLVE_TIMEOUT = 10.0
"""Seconds the host's resolver may take."""
CONNECT_TIMEOUT = 10.0
"""Seconds all connection attempts for one name may take together."""
ATTEMPT_TIMEOUT = 4.0
"""Seconds one address may take while there is another to try."""
KEEP = 30.0
"""Seconds an answer of the host's resolver is used again; getaddrinfo does not say how long it may be."""
KEEP_FAILURE = 1.0
"""Seconds a failure of it is."""
MOST_ADDRESSES = 8
LOOKUPS = 4
"""Threads one sandbox may have waiting for the host's resolver."""

_OF_HOST = frozenset({rtnl.RTN_LOCAL, rtnl.RTN_BROADCAST, rtnl.RTN_ANYCAST})
"""Kinds of routes that end here."""


class Refused(Exception):
    """There is no connection; the message says why."""


class Dialer:
    """Connects one sandbox's relays."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._limiter: trio.CapacityLimiter | None = None
        self._lookups: dict[str, _Lookup] = {}

    async def dial(self, name: str, port: int) -> socket.socket:
        """A connected, non-blocking socket to a canonical name the rules allow at ``port``.

        What is connected to is an address that was judged, never the name again: a second answer of DNS cannot differ.

        Raises:
            Refused: it does not resolve, every address is forbidden, or none answers.
        """
        rule = self._rules.match(name, port)
        if rule is None:
            raise Refused("not allowed")
        pin = self._rules.pinned(name)
        candidates = [_plain(pin)] if pin is not None else await self._resolve(name)
        good: list[IpAddress] = []
        refusal = "does not resolve to an address"
        for address in candidates[:MOST_ADDRESSES]:
            try:
                of_host = rtnl.route_kind(address) in _OF_HOST
            except OSError as error:
                raise Refused(f"the host could not look up the route to {address}: {error.strerror}") from error
            if reason := forbidden(address, of_host=of_host, pinned=pin is not None, private=rule.private):
                refusal = f"resolves to {address}, {reason}"
            else:
                good.append(address)
        if not good:
            raise Refused(refusal)
        return await _connect(good, port)

    async def _resolve(self, name: str) -> list[IpAddress]:
        """The name's addresses, IPv4 first: where it does not work it fails at once, while IPv6 may go nowhere."""
        lookup = self._lookups.get(name)
        if lookup is None or trio.current_time() > lookup.until:
            lookup = self._lookups[name] = _Lookup()
            try:
                lookup.addresses = await self._look_up(name)
            except Refused as error:
                lookup.error = str(error)
                lookup.until = trio.current_time() + KEEP_FAILURE
            else:
                lookup.until = trio.current_time() + KEEP
            finally:
                lookup.done.set()
        await lookup.done.wait()
        if lookup.error:
            raise Refused(lookup.error)
        return lookup.addresses

    async def _look_up(self, name: str) -> list[IpAddress]:
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(LOOKUPS)
        # With a trailing dot the host's search list is not tried: the name that is allowed is the one that is meant. A name
        # of one label only works with it. As bytes, for of a str Python would make IDNA 2003.
        asked = (name + "." if "." in name else name).encode()
        call = partial(socket.getaddrinfo, asked, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        with trio.move_on_after(RESOLVE_TIMEOUT):
            try:
                found = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
            except OSError as error:
                raise Refused(f"the host cannot resolve it: {error.strerror}") from error
            except RuntimeError as error:
                raise Refused("the host cannot resolve it: it has no thread left") from error
            # Without zone: a link-local address is refused with or without one.
            addresses = {_plain(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])): None for entry in found}
            return sorted(addresses, key=lambda address: address.version)
        raise Refused(f"the host's resolver did not answer in {RESOLVE_TIMEOUT:g} s")


class _Lookup:
    """One question to the host's resolver, and everybody who waits for it."""

    __slots__ = ("addresses", "done", "error", "until")

    def __init__(self) -> None:
        self.addresses: list[IpAddress] = []
        self.done = trio.Event()
        self.error = ""
        self.until = float("inf")


def _plain(address: IpAddress) -> IpAddress:
    """An IPv4-mapped address as what the kernel would make of it, so that it is asked about its own."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


async def _connect(addresses: list[IpAddress], port: int) -> socket.socket:
    failure = ""
    with trio.move_on_after(CONNECT_TIMEOUT):
        for address in addresses:
            last = address == addresses[-1]
            failure = f"{address} did not answer in time"
            with trio.move_on_after(CONNECT_TIMEOUT if last else ATTEMPT_TIMEOUT):
                try:
                    return await _connect_to(address, port)
                except OSError as error:
                    failure = f"{address}: {error.strerror}"
    raise Refused(f"could not connect to {failure}")


async def _connect_to(address: IpAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        number = sock.connect_ex((str(address), port))
        if number == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock
