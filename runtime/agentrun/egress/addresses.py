"""Which addresses a relay may connect to. A name is in the hands of whoever runs its zone, so what it resolves to is judged.

Four kinds, from "never" to "always":

* **never**: cloud metadata services, link-local, multicast, broadcast, the unspecified address and the rest of 0.0.0.0/8.
* **the host itself**: loopback, and every address the host has. Only if the policy's host table pins it: then a human has
  named that one address; a DNS answer has not.
* **private**: whatever is not globally routable. If the table pins it, or the rule says ``private``.
* **global**: always.

An IPv6 address with an IPv4 address inside (mapped, translated, NAT64, 6to4, Teredo) is judged as both, and the stricter
verdict holds: a translator on the way would deliver to the inner one.

Sources: RFC 6890 and the IANA special-purpose registries; RFC 4291, 2765, 3056, 4380, 6052, 8215 for what is inside.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, Oracle, OpenStack, DigitalOcean, Hetzner, …; here for its better reason
        "169.254.170.0/24",  # AWS: credentials of ECS tasks and EKS pods
        "fd00:ec2::/32",  # AWS: the same over IPv6
        "fd20:ce::254",  # Google
        "fd00:42::42",  # Scaleway
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure's host, WireServer; a public address by its looks
        "192.0.0.192",  # Oracle Classic
    )
)
_EMBEDDED_LOW = tuple(
    ipaddress.IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
"""Ranges whose last 32 bits are an IPv4 address."""
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("2002::/16"))
_NOWHERE = ipaddress.IPv4Network("0.0.0.0/8")
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


def embedded(address: IpAddress) -> Iterator[IpAddress]:
    """The address, and every IPv4 address inside it."""
    yield address
    if isinstance(address, ipaddress.IPv4Address) or address.is_loopback or address.is_unspecified:
        return
    if any(address in network for network in _EMBEDDED_LOW):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo


def never(address: IpAddress) -> str | None:
    """Why no rule and no pin makes this address reachable, in words after "it is"; None if one could."""
    for inner in embedded(address):
        if any(inner in network for network in METADATA):
            return "a cloud metadata address"
        if inner.is_link_local:
            return "a link-local address"
        if inner.is_multicast or inner == _BROADCAST:
            return "a multicast or broadcast address"
        if inner.is_unspecified or inner in _NOWHERE:
            return "the unspecified address"
    return None


def forbidden(address: IpAddress, *, of_host: bool, pinned: bool, private: bool) -> str | None:
    """Why a relay may not connect there, in words after "it is"; None if it may.

    ``of_host``: the kernel says that the address is this host's own (``rtnl.route_kind``). ``pinned``: the host table names
    it. ``private``: the rule has that word.
    """
    if reason := never(address):
        return reason
    if pinned:
        return None
    if of_host or any(inner.is_loopback for inner in embedded(address)):
        return "an address of the host itself (only a pin in hosts may name one)"
    if not private and any(_is_private(inner) for inner in embedded(address)):
        return "a private address (the rule may say private, or hosts may pin it)"
    return None


def _is_private(address: IpAddress) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not address.is_global
    if any(address in network for network in _TRANSLATED):
        return False  # as private as what is inside
    return address not in _GLOBAL_V6 or not address.is_global
