# SPDX-License-Identifier: Apache-2.0
"""What the scheduler for calls promises, tried on a kernel with sched_ext: run in a guest by test_sched.py.

    python -m tests.vm.run --ext4 7.2 -- .venv/bin/python -m tests.vm.guest_sched [NAME…]

Two calls compute without end on the only processor while others come and go. Times are the emulator's, so what is compared is the
same boot with the scheduler and without it, in turns. Verdicts are printed as guest_limits.py does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import trio

from agentrun import Executor, ExecutorConfig, Limits, Policy, Result, open_executor
from agentrun.burst.link import Link
from agentrun.cgroup.leaf import Leaf
from agentrun.probes.sched import STATE
from agentrun.scheduling import Scheduling
from tests.vm.guest_limits import verdict

SCHED_EXT = 7
EXT_SERVER = Path("/sys/kernel/debug/sched/ext_server/cpu0/runtime")
CHECK_TIMEOUT = 180.0
ROUNDS, CALLS = 2, 10
"""Each round is that many calls without the scheduler and as many with it."""
SHORT = "i=0; while [ $i -lt 600 ]; do i=$((i+1)); done"
POLICY = Policy(name="sched")
SPIN = "while :; do :; done"

Check = Callable[["Trial"], Awaitable[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


class Trial:
    """An executor whose calls are told to the scheduler, and a probes process that has it, or not."""

    def __init__(self, executor: Executor, nursery: trio.Nursery) -> None:
        self.executor, self._nursery = executor, nursery
        self._scope = trio.CancelScope()
        self.scheduling = Scheduling()
        self.leaves: list[Leaf] = []
        """Of calls that have begun."""
        self.costs: list[float] = []
        """Seconds that telling the scheduler took on the way of each."""
        self.link: Link | None = None
        governor = executor.memory.governor
        begin, end, register, forget = governor.begin, governor.end, governor.register, governor.forget

        def begun(leaf: Leaf, limits: Limits) -> None:
            begin(leaf, limits)
            at = perf_counter()
            self.scheduling.begin(leaf, limits)
            self.costs.append(perf_counter() - at)
            self.leaves.append(leaf)

        def ended(leaf: Leaf) -> Any:
            self.scheduling.end(leaf)
            return end(leaf)

        def registered(leaf: Leaf, tenant: str) -> None:
            register(leaf, tenant)
            self.scheduling.prepare(leaf)

        def forgotten(leaf: Leaf) -> None:
            self.scheduling.forget(leaf)
            forget(leaf)

        governor.begin, governor.end = begun, ended  # type: ignore[method-assign]
        governor.register, governor.forget = registered, forgotten  # type: ignore[method-assign]

    async def turn_on(self, frozen: Sequence[Leaf] = ()) -> Link:
        """Have the scheduler, if it is not there; compiling it goes faster without what computes beside it."""
        if self.scheduling.on and self.link is not None:
            return self.link
        await self.turn_off()
        link = self.link = Link({"sched": True}, self._take, self.scheduling.detach)
        self._scope = trio.CancelScope()
        self._nursery.start_soon(self._keep, link, self._scope)
        for leaf in frozen:
            leaf.freeze(True)
        await until(link.done.is_set)
        for leaf in frozen:
            leaf.freeze(False)
        assert self.scheduling.on, self.scheduling.status()
        return link

    async def turn_off(self) -> None:
        """Let its process end, and the scheduler with it."""
        self._scope.cancel()
        await until(lambda: state() == "disabled")
        await until(lambda: self.link is None or not self.link.pid)

    async def _keep(self, link: Link, scope: trio.CancelScope) -> None:
        with scope:
            await link.run()

    def _take(self, message: dict[str, Any], maps: Mapping[str, int]) -> None:
        if message["kind"] == "sched":
            self.scheduling.attach(maps)
        else:
            self.scheduling.refused(message["error"])

    @contextlib.asynccontextmanager
    async def hogs(self, *weights: int | None) -> AsyncIterator[list[Leaf]]:
        """Calls that compute until the end of this."""
        async with trio.open_nursery() as nursery:
            before = len(self.leaves)
            for weight in weights:
                nursery.start_soon(self.run, SPIN, Limits(cpu_weight=weight))
            await until(lambda: len(self.leaves) == before + len(weights))
            leaves = self.leaves[before:]
            await until(lambda: all(cpu(leaf) > 0.2 for leaf in leaves))
            yield leaves
            nursery.cancel_scope.cancel()

    async def run(self, script: str, limits: Limits | None = None) -> Result:
        policy = POLICY if limits is None else Policy(name="sched", limits=limits)
        return await self.executor.run(["sh", "-c", script], policy=policy, timeout=CHECK_TIMEOUT)

    async def latencies(self, count: int) -> list[float]:
        """Milliseconds of short calls, one after the other, each in a sandbox that is warm."""
        taken = []
        for _ in range(count):
            await self.executor.warm_up(POLICY)
            await trio.sleep(0.1)
            begun = trio.current_time()
            result = await self.run(SHORT)
            taken.append((trio.current_time() - begun) * 1e3)
            assert result.ok, result
            assert result.warm, result
        return taken


@contextlib.asynccontextmanager
async def spinner() -> AsyncIterator[None]:
    """A normal task that computes without end."""
    process = subprocess.Popen(["sh", "-c", SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def state() -> str:
    return STATE.read_text().strip()


def cpu(leaf: Leaf) -> float:
    """Seconds used by a leaf, as the kernel counts them; nothing if it has gone."""
    with contextlib.suppress(OSError):
        return float(leaf.load()["cpu"] or 0)
    return 0.0


def policies(leaf: Leaf) -> set[int]:
    found = set()
    for pid in leaf.pids():
        with contextlib.suppress(ProcessLookupError):
            found.add(os.sched_getscheduler(pid))
    return found


async def until(condition: Callable[[], bool], patience: float = 60.0) -> None:
    with trio.fail_after(patience):
        while not condition():
            await trio.sleep(0.02)


@check
async def short_calls_are_faster_beside_long_ones(trial: Trial) -> str:
    with_it: list[float] = []
    without: list[float] = []
    async with trial.hogs(None, None) as leaves:
        for _ in range(ROUNDS):
            await trial.turn_off()
            without += await trial.latencies(CALLS)
            await trial.turn_on(leaves)
            assert all(policies(leaf) == {SCHED_EXT} for leaf in leaves), [policies(leaf) for leaf in leaves]
            before = [cpu(leaf) for leaf in leaves]
            begun = trio.current_time()
            trial.costs.clear()
            with_it += await trial.latencies(CALLS)
            shares = [(cpu(leaf) - was) / (trio.current_time() - begun) for leaf, was in zip(leaves, before, strict=True)]
            assert min(shares) > 0.05, shares
    p50, p50_without = statistics.median(with_it), statistics.median(without)
    status = trial.scheduling.status()
    said = (
        f"p50 {p50:.1f} ms with it, {p50_without:.1f} without, most {max(with_it):.1f} and {max(without):.1f}; "
        f"{status.kicks} kicks; the long ones had {shares[0]:.0%} and {shares[1]:.0%} meanwhile; "
        f"{statistics.median(trial.costs) * 1e6:.0f} µs of a call to tell the scheduler"
    )
    assert p50_without > 1.5 * p50, said
    return said


@check
async def long_calls_are_not_starved(trial: Trial) -> str:
    """Six calls that are young for a second each want all of the processor; the long ones have their tenth meanwhile."""
    await trial.turn_on()
    trial.scheduling.set_terms(0.1, 0.05, 0.005)
    async with trial.hogs(None, None) as old:
        await until(lambda: all(cpu(leaf) > 1.2 for leaf in old))
        trial.scheduling.set_terms(1.0, 0.05, 0.005)
        async with trial.hogs(*[None] * 6) as young:
            used, begun = [cpu(leaf) for leaf in (*old, *young)], trio.current_time()
            await until(lambda: sum(cpu(leaf) for leaf in young) > sum(used[2:]) + 2)
            took = trio.current_time() - begun
            gained = [cpu(leaf) - was for leaf, was in zip((*old, *young), used, strict=True)]
    trial.scheduling.set_terms(0.05, 0.05, 0.005)
    status = trial.scheduling.status()
    said = (
        f"in {took:.2f} s {sum(gained[2:]):.2f} s for the young, {gained[0]:.3f} and {gained[1]:.3f} s for the long ones, "
        f"{status.guarded} slices by right"
    )
    assert min(gained[:2]) > 0.02 * took, said
    assert sum(gained[:2]) < 0.4 * sum(gained[2:]), said
    assert status.guarded, said
    return said


@check
async def weights_hold_among_long_calls(trial: Trial) -> str:
    await trial.turn_on()
    async with trial.hogs(100, 300, 100) as leaves:
        before = [cpu(leaf) for leaf in leaves]
        await trio.sleep(4)
        light, heavy, other = (cpu(leaf) - was for leaf, was in zip(leaves, before, strict=True))
    said = f"{light:.2f}, {heavy:.2f} and {other:.2f} s at 100, 300 and 100"
    assert 2.0 < heavy / light < 4.5, said
    assert 0.6 < other / light < 1.6, said
    return said


@check
async def killing_its_process_falls_back(trial: Trial) -> str:
    link = await trial.turn_on()
    async with trial.hogs(None) as leaves:
        assert state() == "enabled"
        os.kill(link.pid, signal.SIGKILL)
        await until(lambda: state() == "disabled", 5)
        await until(lambda: not trial.scheduling.on, 5)
        reason = trial.scheduling.status().reason
        assert (await trial.run(SHORT)).ok
        before = cpu(leaves[0])
        await until(lambda: cpu(leaves[0]) > before + 0.2)
        leaves[0].freeze(True)
        await until(lambda: trial.scheduling.on)  # it is started again, and has those that run
        leaves[0].freeze(False)
        assert state() == "enabled"
        assert policies(leaves[0]) == {SCHED_EXT}
        assert trial.scheduling.used(leaves[0]) is not None
        assert (await trial.run(SHORT)).ok
    return reason


@check
async def being_ejected_is_reported(trial: Trial) -> str:
    """SysRq-S is how an operator gets rid of a scheduler; a stall would end it in the same way."""
    link = await trial.turn_on()
    async with trial.hogs(None):
        Path("/proc/sysrq-trigger").write_text("S")
        await until(lambda: not trial.scheduling.on, 5)
        status = trial.scheduling.status()
        await until(lambda: state() == "disabled", 5)
        assert link.pid, "the probes process ended as well"
        assert "sysrq" in status.reason.lower(), status
        assert (await trial.run(SHORT)).ok
    return status.reason


@check
async def normal_tasks_leave_calls_a_share_or_the_kernel_ends_it(trial: Trial) -> str:
    """Normal tasks go before these, but for a twentieth that the kernel keeps; without that, it takes them back in seconds."""
    link = await trial.turn_on()
    async with trial.hogs(None) as leaves, spinner():
        before = cpu(leaves[0])
        await trio.sleep(4)
        share = (cpu(leaves[0]) - before) / 4
        assert 0.02 < share < 0.25, share
        assert trial.scheduling.on, trial.scheduling.status()
        kept = EXT_SERVER.read_text()
        EXT_SERVER.write_text("0")
        try:
            begun = trio.current_time()
            await until(lambda: not trial.scheduling.on)
            took = trio.current_time() - begun
        finally:
            EXT_SERVER.write_text(kept)
        reason = trial.scheduling.status().reason
        assert link.pid, "the probes process ended as well"
        assert "stall" in reason, reason
        before = cpu(leaves[0])
        await trio.sleep(2)
        after = (cpu(leaves[0]) - before) / 2
        assert after > 0.25, after
    return f"{share:.1%} beside a normal hog; {reason!r} after {took:.1f} s, {after:.0%} from then on"


@check
async def what_has_a_cpu_max_is_left_alone(trial: Trial) -> str:
    await trial.turn_on()
    async with trio.open_nursery() as nursery:
        before = len(trial.leaves)
        nursery.start_soon(trial.run, SPIN, Limits(cpus=0.5))
        await until(lambda: len(trial.leaves) > before)
        leaf = trial.leaves[-1]
        await until(lambda: cpu(leaf) > 0.1)
        assert policies(leaf) == {0}, policies(leaf)
        assert os.sched_getscheduler(0) == 0
        nursery.cancel_scope.cancel()
    return "normal policy"


@check
async def a_tool_that_leaves_is_taken_back(trial: Trial) -> str:
    await trial.turn_on()
    async with trio.open_nursery() as nursery:
        before = len(trial.leaves)
        nursery.start_soon(trial.run, f"exec chrt --other 0 sh -c '{SPIN}'")
        await until(lambda: len(trial.leaves) > before)
        leaf = trial.leaves[-1]
        await until(lambda: trial.scheduling.status().left > 0)
        await until(lambda: policies(leaf) == {SCHED_EXT}, 5)
        await until(lambda: cpu(leaf) > 0.2)
        nursery.cancel_scope.cancel()
    return f"left {trial.scheduling.status().left} times"


async def trials(names: Sequence[str]) -> None:
    config = ExecutorConfig(probes=False, pool_most=2)
    async with open_executor(config) as executor, trio.open_nursery() as nursery:
        trial = Trial(executor, nursery)
        nursery.start_soon(trial.scheduling.run)
        for name, function in CHECKS.items():
            if not names or name in names:
                with verdict(name) as details, trio.fail_after(CHECK_TIMEOUT):
                    details.append(await function(trial))
        await trial.turn_off()
        nursery.cancel_scope.cancel()


def main(names: Sequence[str]) -> None:
    logging.getLogger("agentrun").setLevel(logging.ERROR)  # that a process dies is meant
    trio.run(trials, names)


if __name__ == "__main__":
    main(sys.argv[1:])
