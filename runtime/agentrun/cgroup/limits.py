"""Limits as control files: pure translation, no I/O."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from agentrun.policy import Limits
from agentrun.types import Unenforced

CPU_PERIOD_US = 100_000
PIDS_MOST = 4194304
"""PID_MAX_LIMIT: the kernel takes no greater number."""
_LIFTED = {
    "memory.oom.group": "0", "memory.max": "max", "memory.high": "max", "memory.swap.max": "max", "pids.max": "max",
    "cpu.max": "max", "cpu.max.burst": "0", "io.weight": "100", "cpu.weight": "100",
}  # fmt: skip
"""As the kernel makes a cgroup."""


class Plan(NamedTuple):
    """What limits come to on this host."""

    limits: Limits
    files: Mapping[str, str]
    """The control files of a leaf that express them, in the order they are written."""
    missing: tuple[Unenforced, ...]
    """What nothing here can enforce."""


def plan_limits(limits: Limits) -> dict[str, str]:
    """The control files that express ``limits``, in the order they are written.

    ``memory.oom.group`` goes with ``memory.max``: a tool call dies as a whole, never a random process of it.
    """
    files: dict[str, str] = {}
    if limits.memory_max is not None:
        files["memory.oom.group"] = "1"
        files["memory.max"] = str(limits.memory_max)
    if limits.memory_high is not None:
        # Alone it would let a tool crawl for ever; whoever writes it has a governor that sees to what follows.
        files["memory.high"] = str(limits.memory_high)
    if limits.memory_swap_max is not None:
        files["memory.swap.max"] = str(limits.memory_swap_max)
    if limits.pids_max is not None:
        # One more for init, which the caller does not see.
        files["pids.max"] = str(min(limits.pids_max + 1, PIDS_MOST))
    if limits.cpus is not None:
        files["cpu.max"] = f"{max(1000, round(limits.cpus * CPU_PERIOD_US))} {CPU_PERIOD_US}"
    if limits.cpu_burst is not None:
        files["cpu.max.burst"] = str(round(limits.cpu_burst * 1e6))
    if limits.io_weight is not None:
        files["io.weight"] = str(limits.io_weight)
    if limits.cpu_weight is not None:
        files["cpu.weight"] = str(limits.cpu_weight)
    return files


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """What to write to a leaf that has the control files ``old`` and is to have ``new``, in an order the kernel takes."""
    wanted = {name: _LIFTED[name] for name in old} | dict(new)
    found = {name: text for name, text in wanted.items() if old.get(name) != text}
    burst = "cpu.max.burst"
    if int(old.get(burst, 0)) > int(found.get(burst, sys.maxsize)):
        found = {burst: found[burst]} | found  # before cpu.max: no quota may be below the burst there is
    return found


def plan_budget(limits: Limits) -> dict[str, str]:
    """The control files of a tenant's cgroup, which bounds all its calls together.

    Without ``memory.oom.group``: the kernel kills the highest cgroup that has it within the one that ran out, and the
    tenant's innocent calls and warm sandboxes are in there too.
    """
    files = plan_limits(limits)
    files.pop("memory.oom.group", None)
    files.pop("memory.high", None)
    if limits.pids_max is not None:
        files["pids.max"] = str(limits.pids_max)
    return files
