"""What a tool call gives back: frozen, with names that stay.

The JSON of a result (``Result.to_json()``, ``agentrun exec --json``) has the field names below. Sizes are bytes, times are
seconds, and a value the host cannot measure is null.
"""

from __future__ import annotations

import base64
import enum
from typing import Any

import msgspec


class Outcome(enum.StrEnum):
    """How a tool call ended."""

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMED_OUT = "timed_out"
    MEMORY_KILLED = "memory_killed"
    CANCELLED = "cancelled"
    FAILED_TO_START = "failed_to_start"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool call used, every process of it together."""

    wall: float
    """Seconds from execve to exit."""
    cpu_user: float
    """Seconds, from the leaf's cpu.stat."""
    cpu_system: float
    memory_peak: int | None
    """Bytes; see ``memory_source``. Includes the sandbox's own few hundred kB."""
    memory_source: str | None
    """``memory.peak`` (the leaf, exact), or ``rusage`` (largest single process, where there is no memory controller)."""
    io_read: int | None
    """Bytes read from block devices, from io.stat."""
    io_written: int | None
    pids_peak: int | None
    """Most processes and threads at once, from pids.peak (Linux 6.1); init of the sandbox counts as one."""
    throttled: float | None
    """Seconds held back by cpu.max."""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """When each step was reached, seconds since the call was made."""

    queued: float
    """A place among the running calls was free."""
    leased: float
    """A sandbox was ours."""
    dispatched: float
    """The request was sent into it."""
    first_exec: float | None
    """The sandbox was about to execve the tool; null if it never got there."""
    total: float
    """The result existed."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Why a call did not simply exit, in words for the agent that made it."""

    reason: str
    """``timeout``, ``memory``, ``cancelled`` or ``start``."""
    message: str
    advice: str


class Unenforced(msgspec.Struct, frozen=True):
    """A limit of the policy that nothing on this host enforces."""

    limit: str
    reason: str


class BurstStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a call on the ladder of memory control; see docs/design.md."""

    rung: str
    """``within``, ``granted``, ``noticed``, ``throttled``, ``frozen`` or ``killed``."""
    at: float
    """Seconds since the call was dispatched."""
    usage: int
    """Bytes it used then."""
    reason: str
    reaction: float | None = None
    """Seconds from what the kernel saw to what was done; null where nothing in the kernel saw it."""


class Hint(msgspec.Struct, frozen=True, kw_only=True):
    """A memory hint as it was taken."""

    asked: str
    memory_max: int
    """Bytes the call was given."""
    clamped_to: str | None = None
    """What was in the way of more, ``policy`` or ``tenant``; null if the call got what it asked for."""


class Denied(msgspec.Struct, frozen=True, kw_only=True):
    """Something the tool tried and the policy refused."""

    kind: str
    """``syscall`` or ``network``."""
    what: str
    """The system call, or the host and port."""
    reason: str
    count: int
    """How often; at least, where the tool tried without end."""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What a call changed in a copy-on-write workspace; kept until it is applied or discarded (docs/workspaces.md)."""

    id: str
    """For ``agentrun diff``, ``apply`` and ``discard``."""
    added: int
    modified: int
    """Content, target of a link, or extended attributes."""
    deleted: int
    type: int
    """Another kind of thing is there now."""
    mode: int
    """Mode or owner, but not the content."""
    time: int
    """Files of which only the time of modification is another."""
    bytes: int
    """Disk that it takes while it is kept."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one tool call."""

    id: str
    """The call's name: its leaf is ``call-<id>``."""
    outcome: Outcome
    exit_code: int | None
    """The tool's exit status; null if it did not exit by itself."""
    signal: int | None
    """The signal that ended it."""
    stdout: bytes | None
    """What it wrote, when captured; head and tail when there was more than the bound."""
    stderr: bytes | None
    truncated: bool
    usage: Usage
    timings: Timings
    warm: bool
    """The sandbox came ready-made from the pool; else it was built for this call."""
    verdict: Verdict | None
    unenforced: tuple[Unenforced, ...]
    denied: tuple[Denied, ...] = ()
    """What was refused, where the kernel lets us see it: system calls of the filter, addresses of the network."""
    hint: Hint | None = None
    memory_mode: str = "none"
    """What held the call to its memory: ``controller+bpf``, ``bpf``, ``controller`` or ``none``; the weakest while it ran."""
    bursts: tuple[BurstStep, ...] = ()
    """What memory control did, where the policy has a steady budget."""
    phases: dict[str, float | None] | None = None
    """Seconds of each phase of its sandbox, for a call that asked (docs/latency.md); null for what was not seen in the kernel."""
    changes: Changes | None = None
    """What was changed, in a copy-on-write workspace; null if nothing was, or it was none."""
    private_runtime: bool = False
    """No daemon was there: a runtime was started for this one call."""

    @property
    def ok(self) -> bool:
        """The tool exited with status 0."""
        return self.outcome is Outcome.EXITED and self.exit_code == 0

    @property
    def returncode(self) -> int:
        """The exit status a shell would show: 124 timed out, 126/127 not started, 128+n signal, else the tool's own."""
        if self.outcome is Outcome.TIMED_OUT:
            return 124
        if self.outcome is Outcome.MEMORY_KILLED:
            return 137
        if self.exit_code is not None:
            return self.exit_code
        return 128 + (self.signal or 9)

    def to_json(self) -> bytes:
        """The documented JSON. Captured text is a string; if it was not UTF-8, ``<name>_base64`` has the exact bytes."""
        tree: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("stdout", "stderr"):
            raw = getattr(self, name)
            if raw is not None:
                tree[name] = raw.decode("utf-8", "replace")
                if tree[name].encode() != raw:
                    tree[f"{name}_base64"] = base64.b64encode(raw).decode()
        return msgspec.json.encode(tree)
