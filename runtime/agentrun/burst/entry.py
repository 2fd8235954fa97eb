"""A leaf that exists, as memory control knows it."""

from __future__ import annotations

from agentrun.burst.watch import Watch
from agentrun.cgroup.leaf import Leaf
from agentrun.policy import DEFAULT, Limits

ABOVE_LIMIT = "above its memory limit"


class Entry:
    """A leaf, what it is held to, and the call in it, if that has a steady budget."""

    __slots__ = ("killed", "leaf", "level", "limits", "lost", "number", "tenant", "watch")

    def __init__(self, leaf: Leaf, tenant: str, level: int | None = None) -> None:
        self.leaf, self.tenant = leaf, tenant
        self.level = level
        """In the cgroup tree, if it is a container of another runtime; None: it is one of ours."""
        self.number = 0
        """Of the kernel programs' table; 0 if it is not there."""
        self.limits: Limits = DEFAULT.limits
        self.watch: Watch | None = None
        self.killed = ""
        """Why memory control killed it."""
        self.lost = False
        """The programs went away, or came only, while its call ran."""

    def sentence(self, usage: int) -> str:
        """Why the programs in the kernel killed it at ``usage`` bytes, in the ladder's words."""
        limits = self.limits
        if limits.memory_max is not None and usage > limits.memory_max:
            return ABOVE_LIMIT
        if limits.on_exhausted in ("stop", "throttle"):
            return "it was to be stopped above its budget, and sat in a system call that only death ends"
        return "its burst allowance is used up" if limits.memory_burst else "above its memory budget"
