"""The machine: what it is, how busy it is, and waiting until it is quiet."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

QUIET = 0.15
"""Share of all processors' time that others may use while the machine still counts as quiet."""


class Machine(msgspec.Struct, kw_only=True):
    """Facts that belong to every figure."""

    kernel: str
    processors: int
    model: str
    memory_mb: int
    python: str
    hypervisor: bool
    cgroups: str
    """``v2``, ``hybrid`` or ``none``: what lies on /sys/fs/cgroup."""
    started: str
    loadavg: str
    busy_before: dict[str, float] = {}
    """Share of processor time others used just before each part."""
    waited: float = 0.0
    """Seconds spent waiting for a quiet machine, all waits together."""
    versions: dict[str, str] = {}

    @property
    def quiet(self) -> bool:
        """It was before every part."""
        return all(share <= QUIET for share in self.busy_before.values())


def describe() -> Machine:
    """Read the facts."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "?")
    return Machine(
        kernel=platform.release(),
        processors=os.cpu_count() or 1,
        model=model,
        memory_mb=meminfo()["MemTotal"] // 1024,
        python=platform.python_version(),
        hypervisor=" hypervisor" in cpuinfo,
        cgroups=cgroup_layout(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        loadavg=Path("/proc/loadavg").read_text().strip(),
    )


def cgroup_layout(mountinfo: str = "/proc/self/mountinfo") -> str:
    """``v2`` if /sys/fs/cgroup itself is cgroup2, ``hybrid`` if cgroup2 is mounted elsewhere."""
    layout = "none"
    for line in Path(mountinfo).read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            if before.split()[4] == "/sys/fs/cgroup":
                return "v2"
            layout = "hybrid"
    return layout


def meminfo() -> dict[str, int]:
    """/proc/meminfo, kB."""
    pairs = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(rest.split()[0]) for name, _, rest in pairs}


async def busy(seconds: float = 0.5) -> float:
    """The share of all processors' time that was used, from /proc/stat; ours is nothing, as we sleep meanwhile."""
    idle, total = _stat()
    await trio.sleep(seconds)
    idle_then, total_then = _stat()
    return max(0.0, 1 - (idle_then - idle) / max(1, total_then - total))


async def wait_quiet(machine: Machine, part: str, patience: float = 20.0) -> str:
    """Wait, at most ``patience`` seconds, until others leave the machine alone; returns a line about it."""
    started = trio.current_time()
    while True:
        share = await busy()
        if share <= QUIET or trio.current_time() - started > patience:
            break
    waited = trio.current_time() - started
    machine.waited += waited
    machine.busy_before[part] = share
    verdict = "quiet" if share <= QUIET else "NOT QUIET"
    load = " ".join(Path("/proc/loadavg").read_text().split()[:3])
    return f"machine {verdict}: {share:.0%} busy with others after waiting {waited:.0f} s, load {load}"


def _stat() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


@contextlib.contextmanager
def more_descriptors(wanted: int) -> Iterator[int]:
    """Raise the soft RLIMIT_NOFILE for the time of the block; yields what it is then.

    Not for the whole run: the contenders inherit it, and some of them close every descriptor up to the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = max(soft, min(wanted, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    try:
        yield raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
