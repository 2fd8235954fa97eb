"""How much memory may still be granted, and to whom first: a banker's rule over everything that may burst.

Whoever is ahead of a call, by priority or because its burst began earlier, has what it may still take set aside. So the first in
line can always finish, whatever those behind it hold, and when it has, the next one can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from agentrun.burst.account import Account
from agentrun.units import MIB

STEP = 16 * MIB
"""The least that is worth beginning a burst with."""
LEAST = MIB
"""What keeps one that has begun: whoever is first in line may be at its peak with hardly more than that left, and needs no more.
When there is none the kernel brakes it, at its memory.high."""
FRESH = 0.01
"""Seconds for which what is free is taken for granted: several calls are looked at together."""
RESERVE_LEAST = 128 * MIB
RESERVE_SHARE = 0.05
"""Of the machine's memory, which no burst may use: the host has to live as well."""


class Claim(NamedTuple):
    """What one call uses, and how far it may go."""

    priority: int
    since: float
    """When its burst began; infinite if it has none."""
    usage: int
    limit: int

    def is_behind(self, other: Claim) -> bool:
        """The other one's needs come first."""
        return (other.priority, -other.since) > (self.priority, -self.since)


def available(claim: Claim, others: Iterable[Claim], free: int) -> int:
    """How many more bytes of ``free`` ones a call may take, with what those ahead of it may still take set aside."""
    reserved = sum(max(0, other.limit - other.usage) for other in others if claim.is_behind(other))
    return min(claim.limit - claim.usage, free - reserved)


def worth_it(claim: Claim, more: int, *, granted: bool) -> bool:
    """Whether so many more bytes are a grant; less keeps one than begins one, or it would come and go with every page."""
    return more >= min(claim.limit - claim.usage, LEAST if granted else STEP)


def host_free(meminfo: str = "/proc/meminfo") -> int:
    """Bytes of the machine that may be granted: what it can give without swapping, less the reserve."""
    total = available = 0
    with open(meminfo, "rb") as file:
        for line in file.read(4096).splitlines():
            name, _, rest = line.partition(b":")
            if name == b"MemTotal":
                total = int(rest.split()[0]) * 1024
            elif name == b"MemAvailable":
                available = int(rest.split()[0]) * 1024
                break
    return available - max(RESERVE_LEAST, int(total * RESERVE_SHARE))


class Budget:
    """A cgroup with a limit for all that is below it."""

    def __init__(self, fd: int, limit: int) -> None:
        self._account, self._limit = Account(fd), limit

    def free(self, used: Callable[[], int], now: float) -> int:
        """Bytes left: the controller's account of it, or where there is none the sum of what its calls use.

        Page cache does not count as used: the kernel drops it before it says no.
        """
        found = self._account.look(now)
        return self._limit - used() if found is None else self._limit - found[0] + found[1]


class Funds:
    """What there is to grant from: the host, and the budgets of everybody ("") and of tenants."""

    def __init__(self, used: Callable[[str], int]) -> None:
        """``used``: bytes that the calls of a tenant, or of everybody, use; for where there is no memory controller."""
        self._used = used
        self.budgets: dict[str, Budget] = {}
        self._seen: dict[str, tuple[float, int]] = {}

    def free(self, tenant: str, now: float) -> int:
        """Bytes a tenant's calls may still have: the least of the host's, everybody's and its own."""
        free = self._look("host", now, host_free)
        for name in ("", tenant):
            if (budget := self.budgets.get(name)) is not None:
                free = min(free, self._look(f"tenant {name}", now, partial(budget.free, partial(self._used, name), now)))
        return free

    def _look(self, what: str, now: float, look: Callable[[], int]) -> int:
        looked, free = self._seen.get(what, (float("-inf"), 0))
        if now - looked > FRESH:
            self._seen[what] = now, free = now, look()
        return free
