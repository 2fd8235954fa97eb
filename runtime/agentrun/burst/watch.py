"""One call under memory control, and the record of it that goes into its result."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple

from agentrun.burst.account import Account
from agentrun.burst.headroom import Claim
from agentrun.burst.ladder import Bucket, Mode, Rung
from agentrun.cgroup.leaf import Leaf
from agentrun.policy import Limits
from agentrun.types import BurstStep

_STEPS_KEPT = 1024
"""What lives for days would else have as many as it likes."""


class Watch:
    """A call whose policy has a steady budget."""

    def __init__(self, leaf: Leaf, tenant: str, limits: Limits, priority: int, now: float) -> None:
        assert limits.memory_high is not None
        self.leaf, self.tenant, self.limits, self.priority = leaf, tenant, limits, priority
        self.account = Account(leaf.fd)
        self.rung = Rung.WITHIN
        self.until: float | None = None
        self.bucket = Bucket(limits.memory_high, limits.memory_burst or 0, limits.burst_seconds or 0.0, now)
        self.steps: list[BurstStep] = []
        self.started = monotonic()
        self.since = float("inf")
        self.near = limits.memory_high - min(1 << 20, limits.memory_high >> 5)
        """Bytes from which on a call that has reached its budget is still taken to be at it: memory.high holds it just below."""
        self.hit = False
        """It has reached its budget, and has not been clearly below since."""
        self.notice = -1
        """Of ``notices``, where the controller's own are what wakes the governor."""
        self.usage = self.high = 0
        """Bytes it uses, and its memory.high as it was written last (0: its steady budget, -1: none)."""

    @property
    def limit(self) -> int:
        """How far a grant lets it go, bytes."""
        return self.granted if self.limits.memory_max is None else min(self.granted, self.limits.memory_max)

    @property
    def granted(self) -> int:
        """Its steady budget and its burst, bytes."""
        return (self.limits.memory_high or 0) + (self.limits.memory_burst or 0)

    def claim(self) -> Claim:
        """What it uses and may use."""
        return Claim(self.priority, self.since, self.usage, self.limit)

    def note(self, rung: Rung, usage: int, reason: str, reaction: float | None) -> None:
        """Put a step on record."""
        self.rung = rung
        if rung is Rung.WITHIN:
            self.since = float("inf")
        elif self.since == float("inf"):
            self.since = monotonic()
        at = round(monotonic() - self.started, 6)
        self.steps.append(BurstStep(rung=rung.value, at=at, usage=usage, reason=reason, reaction=reaction))
        del self.steps[:-_STEPS_KEPT]


class Record(NamedTuple):
    """What memory control has to say of a call that ended."""

    mode: Mode
    """The weakest there was during the call."""
    peak: int | None
    """Bytes, where the programs in the kernel counted them."""
    killed: str
    """Why memory control killed it; empty if it did not."""
    steps: Sequence[BurstStep]
    lost: bool
    """The programs went away, or came only, while it ran."""


NO_RECORD = Record(Mode.NONE, None, "", (), lost=False)
