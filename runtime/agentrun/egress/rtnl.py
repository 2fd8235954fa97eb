"""The few words of rtnetlink that egress needs: make everything local, and ask what kind of place an address is.

pyroute2 speaks all of it, and was measured against this: 0.9.7 takes 186 ms and 24 MB to import and 4 ms of Python in each
namespace (an asyncio loop of its own for four messages), all of it with the GIL, hence out of the daemon's one loop. This
takes a quarter of a millisecond, in the kernel.

Sources: rtnetlink(7), netlink(7); in the kernel tree ``include/uapi/linux/{netlink,rtnetlink,if_addr}.h``.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from agentrun.egress.addresses import IpAddress

OWN_ADDRESS: Final = "198.18.0.1"
"""The sandbox's address: what its connections come from. First of the range the names' addresses are from (RFC 2544)."""

RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTN_BROADCAST: Final = 3
RTN_ANYCAST: Final = 4

_NEWLINK, _NEWADDR, _NEWROUTE, _GETROUTE, _ERROR = 16, 20, 24, 26, 2
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_LOOPBACK: Final = 1
"""Index of lo: the first device of every network namespace."""
_IFF_UP = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_TABLE_LOCAL, _PROTO_STATIC = 255, 4
_SCOPE_UNIVERSE, _SCOPE_HOST = 0, 254
_HEADER = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFADDRMSG = struct.Struct("=BBBBI")


def make_everything_local() -> None:
    """In the calling thread's network namespace: lo up, and every IPv4 and IPv6 address routed to it ("AnyIP").

    Whatever a program sends then stays in the namespace, and arrives there: nothing has to be refused for it not to get out,
    and what was tried can be seen. ``OWN_ADDRESS`` makes it a host with IPv4 to programs that ask (AI_ADDRCONFIG), and keeps
    a connection from having one address at both ends. Where IPv6 is off, it stays off.

    Raises:
        OSError: the kernel refused a step; ``filename`` says which.
    """
    own, lo = socket.inet_aton(OWN_ADDRESS), struct.pack("=I", _LOOPBACK)
    create = _CREATE | _EXCL
    v4 = _RTMSG.pack(socket.AF_INET, 0, 0, 0, _TABLE_LOCAL, _PROTO_STATIC, _SCOPE_HOST, RTN_LOCAL, 0)
    v6 = _RTMSG.pack(socket.AF_INET6, 0, 0, 0, _TABLE_LOCAL, _PROTO_STATIC, _SCOPE_UNIVERSE, RTN_LOCAL, 0)
    address = _IFADDRMSG.pack(socket.AF_INET, 32, 0, _SCOPE_UNIVERSE, _LOOPBACK)
    steps = {
        "bringing up lo": _message(_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, _LOOPBACK, _IFF_UP, _IFF_UP)),
        f"giving lo {OWN_ADDRESS}": _message(_NEWADDR, create, address, (_IFA_ADDRESS, own), (_IFA_LOCAL, own)),
        "routing every IPv4 address to lo": _message(_NEWROUTE, create, v4, (_RTA_OIF, lo), (_RTA_PREFSRC, own)),
        "": _message(_NEWROUTE, create, v6, (_RTA_OIF, lo)),
    }
    for what, (kind, data) in zip(steps, _talk(list(steps.values())), strict=True):
        number = -struct.unpack_from("=i", data)[0] if kind == _ERROR else 0
        if number and what:
            raise OSError(number, os.strerror(number), what)


def route_kind(address: IpAddress) -> int:
    """What the calling thread's namespace takes an address for: RTN_UNICAST, RTN_LOCAL (its own), …; 0 if it has no route.

    Raises:
        OSError: the kernel cannot be asked.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    header = _RTMSG.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    [(kind, data)] = _talk([_message(_GETROUTE, 0, header, (_RTA_DST, address.packed))])
    return data[7] if kind == _NEWROUTE else 0  # rtmsg.rtm_type


def _message(kind: int, flags: int, header: bytes, *attributes: tuple[int, bytes]) -> bytes:
    """A request; every part is padded to four bytes."""
    body = header + b"".join(
        struct.pack("=HH", 4 + len(data), name) + data + b"\0" * (-len(data) % 4) for name, data in attributes
    )
    # A request for something is answered by it; one for a change, by an acknowledgement.
    wanted = _REQUEST | flags | (0 if kind == _GETROUTE else _ACK)
    return _HEADER.pack(_HEADER.size + len(body), kind, wanted, 0, 0) + body


def _talk(requests: Sequence[bytes]) -> list[tuple[int, bytes]]:
    """Send requests at once; the type and content of each one's answer, in order. The kernel has answered before we read."""
    answers: list[tuple[int, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.send(b"".join(requests))
        while len(answers) < len(requests):
            data = sock.recv(1 << 15)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                answers.append((kind, data[_HEADER.size : length]))
                data = data[(length + 3) & ~3 :]
    return answers
