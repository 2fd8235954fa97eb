"""The ladder: what to do about a leaf, from what is known of it. Pure; the governor looks and acts.

::

    within ──above the steady budget──► granted ──allowance used up──► throttled ──► frozen ──► killed
       ▲              │ no headroom            │                          │            │
       │              └──────────► throttled, or frozen where nothing can throttle     │
       └───────────── below the steady budget again ◄────────────────────┴────────────┘

Every rung but *within* and *granted* is bounded in time: a bare ``memory.high`` lets a tool crawl for ever.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from agentrun.policy import Limits

CLEARLY = 0.95
"""Of the steady budget: what braked a call lets go only below it, or the call would crawl along the line, without end."""


class Mode(StrEnum):
    """What holds calls to their memory on this host, at this moment."""

    CONTROLLER_BPF = "controller+bpf"
    """memory.max and memory.high limit, programs in the kernel detect and strike."""
    BPF = "bpf"
    """There is no memory controller: programs in the kernel count every page, and strike."""
    CONTROLLER = "controller"
    """memory.max and memory.high limit; the kernel's own notices are the detector."""
    NONE = "none"


class Rung(StrEnum):
    """How a call stands with its memory."""

    WITHIN = "within"
    GRANTED = "granted"
    NOTICED = "noticed"
    """Its allowance is used up, and the policy wants no more than to know."""
    THROTTLED = "throttled"
    FROZEN = "frozen"
    KILLED = "killed"


class Bucket:
    """A burst's allowance, as the programs in the kernel keep it (bpf/judge.h): byte-seconds above the steady budget."""

    def __init__(self, steady: int, burst: int, seconds: float, now: float) -> None:
        self._steady, self._back = steady, burst
        self.capacity = self.credit = burst * seconds
        self._usage, self._looked = 0, now

    def look(self, usage: int, now: float) -> float:
        """What is left now; between two looks usage is taken to have been what it was at the first."""
        elapsed, above = now - self._looked, self._usage - self._steady
        change = -above * elapsed if above > 0 else self._back * elapsed
        self.credit = min(self.capacity, max(0.0, self.credit + change))
        self._usage, self._looked = usage, now
        return self.credit

    def empty(self) -> None:
        """The kernel says that nothing is left."""
        self.credit = 0.0


class Situation(NamedTuple):
    """A leaf at one moment. Bytes, and seconds of the clock ``now`` is from."""

    rung: Rung
    usage: int
    """Without the page cache that the kernel can drop."""
    credit: float
    headroom: bool
    """There is memory for all that a grant may use."""
    can_throttle: bool
    now: float
    until: float | None
    """When the present rung ends."""


class Step(NamedTuple):
    """Where a leaf goes, until when, and why."""

    rung: Rung
    until: float | None
    reason: str


def climb(s: Situation, limits: Limits) -> Step | None:
    """The next step of a leaf with ``limits.memory_high``; None to stay."""
    assert limits.memory_high is not None
    if s.rung is Rung.KILLED:
        return None
    braked = s.rung in (Rung.THROTTLED, Rung.FROZEN)
    if s.usage <= limits.memory_high * (CLEARLY if braked else 1):
        return None if s.rung is Rung.WITHIN else Step(Rung.WITHIN, None, "below the steady budget again")
    due = s.until is not None and s.now >= s.until
    if s.credit <= 0:
        return _used_up(s, limits, due)
    match s.rung:
        case Rung.WITHIN | Rung.NOTICED | Rung.THROTTLED | Rung.FROZEN if s.headroom:
            return Step(Rung.GRANTED, None, "there is memory for its burst")
        case Rung.GRANTED if s.headroom:
            return None
        case Rung.WITHIN | Rung.NOTICED | Rung.GRANTED:
            return _brake(s, limits, "there is no memory for its burst")
        case Rung.THROTTLED if due:
            return _freeze(s, limits, "throttled for as long as its policy allows, and there is still no memory")
        case Rung.FROZEN if due:
            return Step(Rung.KILLED, None, "frozen for as long as its policy allows, and there is still no memory")
    return None


def _used_up(s: Situation, limits: Limits, due: bool) -> Step | None:
    reason = "its burst allowance is used up" if limits.memory_burst else "above its memory budget"
    match s.rung, limits.on_exhausted:
        case (Rung.THROTTLED, _) if due:
            return _freeze(s, limits, f"{reason}, and throttling did not help")
        case (Rung.FROZEN, _) if due:
            return Step(Rung.KILLED, None, f"{reason}, and it was frozen for as long as its policy allows")
        case (Rung.THROTTLED | Rung.FROZEN | Rung.NOTICED, _):
            return None
        case (_, "kill"):
            return Step(Rung.KILLED, None, reason)
        case (_, "stop"):
            return _freeze(s, limits, reason)
        case (_, "throttle"):
            return _brake(s, limits, reason)
    return Step(Rung.NOTICED, None, reason)


def _brake(s: Situation, limits: Limits, reason: str) -> Step:
    if s.can_throttle and limits.throttle_seconds > 0:
        return Step(Rung.THROTTLED, s.now + limits.throttle_seconds, reason)
    return _freeze(s, limits, reason)


def _freeze(s: Situation, limits: Limits, reason: str) -> Step:
    if limits.freeze_seconds > 0:
        return Step(Rung.FROZEN, s.now + limits.freeze_seconds, reason)
    return Step(Rung.KILLED, None, reason)
