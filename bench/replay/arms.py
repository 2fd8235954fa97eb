# SPDX-License-Identifier: Apache-2.0
"""Ways to share a budget between three tenants. An arm starts three workloads, waits for them, and says how each ended.

It need not hurry to start them: they wait for each other at a gate, which the caller opens. What they noted down (latencies,
completion) is in their own files, which the caller reads, so an arm only has to run a command in the right place.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import trio

from agentrun import ExecutorConfig, Limits, Policy, open_executor
from bench.replay.tasks import OWN

MB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
ENTER = 'echo 0 > "$0/cgroup.procs" && exec "$@"'
"""A shell that moves itself into a leaf and becomes the command: what it allocates is the leaf's from the start."""

# systemd-oomd.service(8) and oomd.conf(5): looks every second; a cgroup whose tasks were all stalled for more than 60 % of
# the last 10 s, for 30 s, has its largest child killed. All of it is compressed as the recordings are.
OOMD_LOOK, OOMD_WINDOW, OOMD_DURATION, OOMD_LIMIT = 1.0, 10.0, 30.0, 0.6
OOMD_HIGH = 0.95
"""Without swap there is no pressure below memory.max, only the kernel's own kill at it: so the budget has a memory.high too."""


WEIGHTS = {True: 150, False: 50}
"""cpu.weight of the HIGH one and of a LOW one, as AgentCgroup has them."""


class Workload(msgspec.Struct, frozen=True):
    """A tenant's command; it writes only below ``Setting.directory``, where all its files are."""

    name: str
    high: bool
    argv: list[str]


class Setting(msgspec.Struct, frozen=True):
    """What three workloads share."""

    budget: int
    """Bytes."""
    deadline: float
    """Seconds after which an arm ends what still runs."""
    speed: float
    """By how much the recordings are compressed; a policy in seconds of the real world has to be as well."""
    directory: Path
    """On a tmpfs (owners can be mapped from Linux 6.3 on), shared by the three: a sandbox would have it as its workspace."""


class Ended(msgspec.Struct, frozen=True):
    """How a workload ended, in a word; whether it completed, its own file says."""

    how: str
    """``exited``, ``oom`` (the kernel killed it), ``psi``, ``deadline``, or an arm's own word."""
    peak: int | None = None
    """memory.peak."""


Arm = Callable[[Sequence[Workload], Setting], Awaitable[list[Ended]]]


# --- cgroups, by hand -----------------------------------------------------------------------------------------


class Leaf:
    """One workload in a cgroup of its own."""

    def __init__(self, budget: Path, workload: Workload, limits: dict[str, int]) -> None:
        self.workload = workload
        self.path = budget / workload.name
        self.path.mkdir()
        for name, value in limits.items():
            (self.path / name).write_text(str(value))
        self._killed_by = ""
        # In-line on purpose: a guest has one processor, so a thread would not make it faster.
        self._process = subprocess.Popen(["sh", "-c", ENTER, str(self.path), *workload.argv], stdin=subprocess.DEVNULL)

    def current(self) -> int:
        return int((self.path / "memory.current").read_text())

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self, why: str) -> None:
        self._killed_by = self._killed_by or why
        (self.path / "cgroup.kill").write_text("1")

    async def wait(self) -> None:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def end(self) -> Ended:
        """Kill what is left, and remove it."""
        if self.running:
            self.kill("deadline")
        status = self._process.wait()
        while "populated 1" in (self.path / "cgroup.events").read_text():
            time.sleep(0.005)
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        peak = int((self.path / "memory.peak").read_text())
        self.path.rmdir()
        if status == 0:
            return Ended("exited", peak)
        return Ended("oom" if int(events["oom_kill"]) else self._killed_by or f"status {status}", peak)


LimitsOf = Callable[[Workload, Setting], dict[str, int]]
Watcher = Callable[[Path, Sequence[Leaf], Setting], Awaitable[None]]


async def in_cgroups(
    workloads: Sequence[Workload], setting: Setting, limits: LimitsOf, shared: dict[str, int], watch: Watcher | None = None
) -> list[Ended]:
    """Each in its leaf with its `limits`, all below one cgroup with the `shared` ones."""
    budget = CGROUPS / "replay"
    budget.mkdir()
    (budget / "cgroup.subtree_control").write_text("+memory +cpu")
    for name, value in shared.items():
        (budget / name).write_text(str(value))
    leaves: list[Leaf] = []
    try:
        with trio.move_on_after(setting.deadline):
            async with trio.open_nursery() as nursery:
                if watch is not None:
                    nursery.start_soon(watch, budget, leaves, setting)
                for workload in workloads:
                    leaves.append(Leaf(budget, workload, limits(workload, setting)))
                for leaf in leaves:
                    await leaf.wait()
                nursery.cancel_scope.cancel()
    finally:
        ended = [leaf.end() for leaf in leaves]
        budget.rmdir()
    return ended


def no_limits(_workload: Workload, _setting: Setting) -> dict[str, int]:
    return {}


async def watch_pressure(budget: Path, leaves: Sequence[Leaf], setting: Setting) -> None:
    """systemd-oomd's rule for memory pressure; the HIGH one has ManagedOOMPreference=avoid, so it goes last."""
    look, window, duration = (seconds / setting.speed for seconds in (OOMD_LOOK, OOMD_WINDOW, OOMD_DURATION))
    seen: list[tuple[float, float]] = []
    above_since: float | None = None
    with (budget / "memory.pressure").open() as pressure:
        while True:
            pressure.seek(0)
            stalled = int(pressure.read().rpartition("total=")[2]) / 1e6  # the second line: full
            at = trio.current_time()
            seen.append((at, stalled))
            while len(seen) > 2 and seen[1][0] <= at - window:
                del seen[0]
            elapsed = at - seen[0][0]
            if elapsed < window / 2 or (stalled - seen[0][1]) / elapsed < OOMD_LIMIT:
                above_since = None
            elif above_since is None:
                above_since = at
            elif at - above_since >= duration and (alive := [leaf for leaf in leaves if leaf.running]):
                max(alive, key=lambda leaf: (not leaf.workload.high, leaf.current())).kill("psi")
                above_since = None
                seen.clear()
            await trio.sleep(look)


# --- the arms -------------------------------------------------------------------------------------------------


async def arm_alone(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """Not an arm: what each of them takes with the machine to itself, one after the other."""
    return [(await in_cgroups([workload], setting, no_limits, {}))[0] for workload in workloads]


async def arm_none(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """No isolation: the budget, and whom the kernel kills at it."""
    return await in_cgroups(workloads, setting, no_limits, {"memory.max": setting.budget})


async def arm_max(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """A third of the budget for each, with memory.max."""
    shared = {"memory.max": setting.budget}
    return await in_cgroups(workloads, setting, lambda *_: {"memory.max": setting.budget // 3}, shared)


async def arm_high(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """A third of the budget for each LOW one, with memory.high alone; the HIGH one is not limited. Weights as in AgentCgroup."""

    def limits(workload: Workload, setting: Setting) -> dict[str, int]:
        return {"cpu.weight": WEIGHTS[workload.high]} | ({} if workload.high else {"memory.high": setting.budget // 3})

    return await in_cgroups(workloads, setting, limits, {"memory.max": setting.budget})


async def arm_psi(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """A killer in user space that goes by pressure, as systemd-oomd does."""
    shared = {"memory.max": setting.budget, "memory.high": int(setting.budget * OOMD_HIGH)}
    return await in_cgroups(workloads, setting, no_limits, shared, watch_pressure)


HIGH_PRIORITY = 10
NO_BUDGET = Limits(memory_max=None, memory_swap_max=None, pids_max=None)


def policy_for(workload: Workload, setting: Setting) -> Policy:
    """What whoever writes policies knows of an agent: what it idles at. That is its steady budget; above it, all is a burst.

    A burst may have the whole budget, for as long as it takes: who has it when is the governor's business. Whoever has to wait
    is frozen where he is, for as long as it takes: a throttled one would creep on, into what somebody else needs.
    """
    idle = int(Path(workload.argv[1]).read_text().split()[1])
    high = int((idle + OWN) * MB)
    limits = Limits(
        memory_high=high, memory_max=setting.budget, memory_burst=setting.budget - high, burst_seconds=setting.deadline,
        on_exhausted="throttle", throttle_seconds=0.0, freeze_seconds=setting.deadline,
    )  # fmt: skip
    return Policy(name=workload.name, limits=limits, timeout=setting.deadline)


async def arm_agentrun(workloads: Sequence[Workload], setting: Setting) -> list[Ended]:
    """agentrun, as a host's owner would set it up: one memory budget, a tenant of higher priority, the probes process.

    ``Ended.how`` is the call's outcome, or the reason of its verdict. Tenants have AgentCgroup's weights, as in `high`.
    """
    tenants = {one.name: msgspec.structs.replace(NO_BUDGET, cpu_weight=WEIGHTS[one.high]) for one in workloads}
    priorities = {workload.name: HIGH_PRIORITY for workload in workloads if workload.high}
    config = ExecutorConfig(
        probes=True,
        phases=False,
        memory_budget=setting.budget,
        tenant_priorities=priorities,
        tenant_limits=tenants,
        pool_least=0,
        pool_most=0,
    )
    ended: dict[str, Ended] = {}
    async with open_executor(config) as executor:
        await executor.memory.wait_ready()

        async def one(workload: Workload) -> None:
            policy, directory = policy_for(workload, setting), str(setting.directory)
            result = await executor.run(workload.argv, policy=policy, tenant=workload.name, workspace=directory)
            how = "exited" if result.ok else result.verdict.reason if result.verdict else result.outcome.value
            ended[workload.name] = Ended(how, result.usage.memory_peak)

        async with trio.open_nursery() as nursery:
            for workload in workloads:
                nursery.start_soon(one, workload)
    return [ended[workload.name] for workload in workloads]


ALONE = "alone"
ARMS: dict[str, Arm] = {
    "none": arm_none, "max": arm_max, "high": arm_high, "psi": arm_psi, "agentrun": arm_agentrun,
}  # fmt: skip
