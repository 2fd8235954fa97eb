"""The watch: a packet socket on the sandbox's lo that sees the first packet of whatever is tried and not served.

It only looks. What it misses, or what of it is thrown away when a tool sends packets faster than they are read, is unreported
but goes nowhere all the same: there is no way out of the namespace.

A classic BPF filter lets through, cut to the headers: TCP SYNs, UDP, ICMP echo requests, and every protocol we have no name
for. It keeps out: what is for 127.0.0.0/8, ::1 and the sandbox's own address, for that is the tool talking to itself; UDP from
and to port 53 over IPv4, for there our resolver listens and sees it; and the kernel's own answers (RST, ICMP errors).

Sources: packet(7); in the kernel tree ``Documentation/networking/filter.rst``, ``include/uapi/linux/{filter,if_packet}.h``.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
from typing import Final, Literal

import msgspec

from agentrun.egress.addresses import IpAddress
from agentrun.egress.rtnl import OWN_ADDRESS

Protocol = Literal["tcp", "udp", "ping", "other"]

SNAP: Final = 128
"""Bytes of a packet we look at: the longest IPv4 header and ports, with room."""
_ETH_P_ALL, _ETH_P_IP = 3, 0x0800
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_SO_ATTACH_FILTER: Final = 26

_LD_W, _LD_H, _LD_B = 0x20, 0x28, 0x30  # A = packet[k]
_IND_H, _IND_B = 0x48, 0x50  # A = packet[X + k]
_LDX_IHL = 0xB1  # X = 4 * (packet[k] & 0xf)
_JEQ, _JSET, _AND, _RET = 0x15, 0x45, 0x54, 0x06
_AD_PROTOCOL = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL
_TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58
_SYN, _SYN_ACK = 0x02, 0x12


class Attempt(msgspec.Struct, frozen=True):
    """What a packet was for."""

    protocol: Protocol
    address: IpAddress
    port: int
    """0 where there is none."""


def open_socket() -> socket.socket:
    """The watch of the calling thread's network namespace, non-blocking.

    Raises:
        OSError: the kernel has no packet sockets, or refused one.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    try:
        # In this order: nothing arrives before the filter is there, for a socket of protocol 0 sees no packet until bind.
        attach(sock)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.bind(("lo", _ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock


def attach(sock: socket.socket) -> None:
    """Give a socket the filter."""
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HL", len(code) // 8, ctypes.addressof(buffer)))


def dropped(sock: socket.socket) -> int:
    """Packets that were for the watch and found its queue full, since it was last asked."""
    _, drops = struct.unpack("@II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return int(drops)


def parse(packet: bytes) -> Attempt | None:
    """What a packet, from its network header on, was for; None if it is too short to tell."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        return _attempt(packet[9], ipaddress.IPv4Address(packet[16:20]), packet[4 * (packet[0] & 15) :])
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        return _attempt(packet[6], ipaddress.IPv6Address(packet[24:40]), packet[40:])
    return None


def _attempt(number: int, address: IpAddress, payload: bytes) -> Attempt | None:
    if number in (_TCP, _UDP):
        if len(payload) < 4:
            return None
        return Attempt("tcp" if number == _TCP else "udp", address, int.from_bytes(payload[2:4], "big"))
    return Attempt("ping" if number in (_ICMP, _ICMP6) else "other", address, 0)


_Step = tuple[int, int] | tuple[int, int, str, str]


def program() -> bytes:
    """The filter, as ``struct sock_filter[]``. Offsets are from the network header, for the socket is a SOCK_DGRAM one."""
    own = int(ipaddress.IPv4Address(OWN_ADDRESS))
    # (code, k) or (code, k, where to if so, where to if not); a name by itself is a place, "" the next line.
    lines: list[_Step | str] = [
        (_LD_H, _AD_PROTOCOL), (_JEQ, _ETH_P_IP, "", "ipv6"),
        (_LD_W, 16), (_JEQ, own, "drop", ""),
        (_AND, 0xFF000000), (_JEQ, 127 << 24, "drop", ""),
        (_LD_H, 6), (_JSET, 0x1FFF, "drop", ""),  # not the first fragment: it has no ports
        (_LDX_IHL, 0),
        (_LD_B, 9), (_JEQ, _TCP, "tcp", ""), (_JEQ, _UDP, "udp", ""), (_JEQ, _ICMP, "", "keep"),
        (_IND_B, 0), (_JEQ, 8, "keep", "drop"),
        "tcp", (_IND_B, 13), (_AND, _SYN_ACK), (_JEQ, _SYN, "keep", "drop"),
        "udp", (_IND_H, 0), (_JEQ, 53, "drop", ""), (_IND_H, 2), (_JEQ, 53, "drop", "keep"),
        "ipv6", (_LD_W, 36), (_JEQ, 1, "", "other6"), (_LD_W, 32), (_JEQ, 0, "", "other6"),
        (_LD_W, 28), (_JEQ, 0, "", "other6"), (_LD_W, 24), (_JEQ, 0, "drop", ""),
        "other6", (_LD_B, 6), (_JEQ, _TCP, "tcp6", ""), (_JEQ, _ICMP6, "", "keep"),
        (_LD_B, 40), (_JEQ, 128, "keep", "drop"),
        "tcp6", (_LD_B, 53), (_AND, _SYN_ACK), (_JEQ, _SYN, "keep", "drop"),
        "keep", (_RET, SNAP),
        "drop", (_RET, 0),
    ]  # fmt: skip
    return _assemble(lines)


def _assemble(lines: list[_Step | str]) -> bytes:
    places: dict[str, int] = {}
    steps: list[_Step] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(steps)
        else:
            steps.append(line)
    code = b""
    for at, step in enumerate(steps, 1):
        yes, no = (places.get(name, at) - at for name in step[2:]) if len(step) == 4 else (0, 0)
        code += struct.pack("=HBBI", step[0], yes, no, step[1])
    return code
