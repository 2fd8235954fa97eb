"""DNS messages, as far as the sandbox's resolver needs them: one question in, one answer out.

Only the question is read, and strictly: what follows it (EDNS) is not needed to answer, and an answer without EDNS says that
it was not understood (RFC 6891, section 7), which every resolver copes with. All answers fit into 512 bytes.

Sources: RFC 1035, section 4; RFC 4343 for how odd bytes are shown; RFC 8482 for ANY.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

import msgspec

from agentrun.egress.rules import canonical_name

NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4
REFUSED: Final = 5

TYPE_A: Final = 1
TYPE_PTR: Final = 12
TYPE_AAAA: Final = 28
TYPE_ANY: Final = 255
CLASS_IN: Final = 1

TTL: Final = 60
"""Seconds a client may keep an answer: an address stays the name's as long as the sandbox lives."""

_HEADER = struct.Struct("!HHHHHH")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
_OPCODE = 0x7800
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_REVERSE = ".in-addr.arpa"


class Query(msgspec.Struct, frozen=True):
    """A well-formed query."""

    ident: int
    flags: int
    question: bytes
    """As it came, to be echoed: a client may have mixed upper and lower case on purpose."""
    name: str
    """Canonical (``rules.canonical_name``), or empty if it is no host name."""
    shown: str
    """The name for people: printable whatever bytes it had, at most 255 characters."""
    kind: int
    """The type asked for, say TYPE_A."""
    in_class: bool
    """The class is IN."""

    @property
    def reverse(self) -> ipaddress.IPv4Address | None:
        """The IPv4 address whose name a PTR query wants."""
        if self.kind != TYPE_PTR or not self.name.endswith(_REVERSE):
            return None
        try:
            return ipaddress.IPv4Address(".".join(reversed(self.name.removesuffix(_REVERSE).split("."))))
        except ValueError:
            return None


class BadQuery(Exception):
    """What came is no query. ``reply`` is what to answer; None: nothing, for an answer might start a loop."""

    def __init__(self, reply: bytes | None) -> None:
        self.reply = reply
        super().__init__("not a DNS query")


def parse_query(data: bytes) -> Query:
    """Read a message.

    Raises:
        BadQuery: it is not a query with exactly one question in plain form. Nothing else is ever raised.
    """
    if len(data) < _HEADER.size:
        raise BadQuery(None)
    ident, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & _QR:
        raise BadQuery(None)
    if flags & _OPCODE:
        raise BadQuery(_header(ident, flags, NOTIMP))
    labels, end = _labels(data)
    if labels is None or end + 4 > len(data) or (questions, answers, authorities) != (1, 0, 0) or flags & _TC:
        raise BadQuery(_header(ident, flags, FORMERR))
    kind, klass = struct.unpack_from("!HH", data, end)
    question = data[_HEADER.size : end + 4]
    return Query(ident, flags, question, _name(labels), _shown(labels), kind, klass == CLASS_IN)


def _labels(data: bytes) -> tuple[list[bytes] | None, int]:
    """The first question's name and where it ends. None if it is cut off, too long, or compressed: there is nothing yet
    that a pointer could rightly point to.
    """
    labels: list[bytes] = []
    at = _HEADER.size
    while at < len(data):
        length = data[at]
        at += 1
        if length == 0:
            return labels, at
        if length > 63 or at + length > len(data) or at + length - _HEADER.size > 254:
            break
        labels.append(data[at : at + length])
        at += length
    return None, at


def _name(labels: list[bytes]) -> str:
    # Bytes that are in no host name end here: a label may have a dot or a NUL inside, and must not look like two.
    if not all(_PLAIN.issuperset(label) for label in labels):
        return ""
    try:
        return canonical_name(b".".join(labels).decode("ascii"))
    except ValueError:
        return ""


def _shown(labels: list[bytes]) -> str:
    text = ".".join("".join(chr(byte) if byte in _PLAIN else f"\\{byte:03d}" for byte in label) for label in labels) or "."
    return text.lower() if len(text) <= 255 else text[:254].lower() + "…"


def reply(query: Query, code: int, answer: tuple[int, bytes] | None = None) -> bytes:
    """The answer to a query: a response code, and one record of (type, data) if there is one."""
    head = _header(query.ident, query.flags, code, 1, 0 if answer is None else 1)
    if answer is None:
        return head + query.question
    kind, data = answer
    # 0xC00C: "the name at offset 12", the question's.
    return head + query.question + struct.pack("!HHHIH", 0xC00C, kind, CLASS_IN, TTL, len(data)) + data


def _header(ident: int, flags: int, code: int, questions: int = 0, answers: int = 0) -> bytes:
    return _HEADER.pack(ident, _QR | _AA | _RA | flags & (_OPCODE | _RD) | code, questions, answers, 0, 0)


def encode_name(name: str) -> bytes:
    """A canonical name as it goes over the wire, uncompressed."""
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split(".")) + b"\0"
