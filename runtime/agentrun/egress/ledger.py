"""What a tool was let do and what not, counted. Bounded, however hard a tool tries."""

from __future__ import annotations

import msgspec

MOST_DENIALS = 64
"""Distinct denials kept; the rest is one number."""


class Denial(msgspec.Struct, frozen=True):
    """Something a tool tried in vain."""

    target: str
    """``name:port`` where the name is known, else ``address:port``, with ``/udp`` if it was; a name that was only looked up."""
    reason: str
    """Why, in words an agent can act on."""
    count: int
    """How often; for UDP, packets."""


class Grant(msgspec.Struct, frozen=True):
    """A name and port that were reached."""

    target: str
    """``name:port``."""
    connections: int
    sent: int
    """Bytes the tool sent."""
    received: int
    """Bytes the tool got."""


class Traffic:
    """The running total of one target."""

    __slots__ = ("connections", "received", "sent")

    def __init__(self) -> None:
        self.connections = self.sent = self.received = 0


class Ledger:
    """The account of one sandbox."""

    __slots__ = ("_denied", "_granted", "_unlisted")

    def __init__(self) -> None:
        self._denied: dict[tuple[str, str], int] = {}
        self._granted: dict[str, Traffic] = {}
        self._unlisted = 0

    def deny(self, target: str, reason: str, count: int = 1) -> None:
        """Note an attempt that failed."""
        key = (target, reason)
        if key in self._denied or len(self._denied) < MOST_DENIALS:
            self._denied[key] = self._denied.get(key, 0) + count
        else:
            self._unlisted += count

    def overlook(self, count: int) -> None:
        """Note attempts of which no more is known."""
        self._unlisted += count

    def grant(self, target: str) -> Traffic:
        """Note a connection that was made; its bytes are to be added to what this returns."""
        traffic = self._granted.setdefault(target, Traffic())
        traffic.connections += 1
        return traffic

    def denied(self) -> tuple[Denial, ...]:
        """In the order of their first time, at most ``MOST_DENIALS`` and one more that counts the rest."""
        listed = [Denial(target, reason, count) for (target, reason), count in self._denied.items()]
        if self._unlisted:
            listed.append(Denial("(others)", f"not listed one by one: at most {MOST_DENIALS} are", self._unlisted))
        return tuple(listed)

    def granted(self) -> tuple[Grant, ...]:
        """In the order of their first connection. Bounded by the names one sandbox may use."""
        return tuple(Grant(target, t.connections, t.sent, t.received) for target, t in self._granted.items())
