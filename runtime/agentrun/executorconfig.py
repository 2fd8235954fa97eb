"""How an executor is run: every setting an embedding program, or the daemon's configuration, can give it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from agentrun.policy import Limits


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many sandboxes are kept, and for whom."""

    pool_least: int = 1
    """Warm slots each pool in use keeps."""
    pool_most: int = 32
    """Warm slots a pool keeps at most. 0: build every slot when it is asked for."""
    id_base: int = 0x60000000
    """First host uid and gid of ranges of 65,536: one for whoever is a stranger in a workspace, then one for each tenant."""
    tenant_limits: Mapping[str, Limits] = {}
    """Budgets of tenants: what all calls of one may use together."""


class ExecutorConfig(FleetConfig, frozen=True, kw_only=True):
    """How an executor is run."""

    name: str = ""
    """Of its cgroup, ``agentrun-<name>``; empty: one made from the pid and the time."""
    max_running: int = 64
    """Calls at once; more wait."""
    max_queued: int = 1024
    """Calls that may wait; more are refused with ``Overloaded``."""
    capture_limit: int = 1 << 20
    """Bytes kept of each captured stream."""
    probes: bool = False
    """Start the probes process: programs in the kernel that see memory charged, and act at once. Takes BCC and some 120 MB."""
    phases: bool = True
    """If there is one, let it also time what sandboxes are made of, for ``agentrun lat``; docs/latency.md has what that costs."""
    sched: bool = False
    """And schedule short calls before long ones, where the kernel has sched_ext; docs/scheduling.md."""
    memory_budget: int | None = None
    """Bytes for all calls together; bursts are granted out of it."""
    tenant_priorities: Mapping[str, int] = {}
    """Whose bursts come first: the higher; 0 for who is not named."""
