"""Attach what records the phases of sandboxes: ``bpf/phases.c``."""

from __future__ import annotations

import os
import time

from agentrun.probes.attach import Attached
from agentrun.probes.loader import load
from agentrun.probes.tracefs import TRACING

MAPS = ("calls", "zygotes", "cold", "histograms", "daemon", "counted")
"""Whose descriptors the daemon gets."""


def attach_phases() -> Attached:
    """Compile, load and attach; it records once the daemon has said who it is.

    Must run in the daemon's pid namespace, as whatever the daemon starts does.

    Raises:
        ProbesError: the compiler or the kernel refused.
    """
    begun = time.monotonic()
    program = load("phases", _defines())
    maps = {name: program[name.encode()].map_fd for name in MAPS}
    return Attached("phases", maps, time.monotonic() - begun, {}, program)


def _defines() -> dict[str, int | str]:
    """Which pid namespace's numbers the daemon uses, and what this kernel does not have."""
    namespace = os.stat("/proc/self/ns/pid")
    defines: dict[str, int | str] = {"PIDNS_DEV": namespace.st_dev, "PIDNS_INO": f"{namespace.st_ino}u"}
    if not (TRACING / "events/syscalls/sys_enter_landlock_restrict_self").exists():
        defines["NO_LANDLOCK"] = 1
    return defines
