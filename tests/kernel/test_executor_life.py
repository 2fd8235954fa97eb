# SPDX-License-Identifier: Apache-2.0
"""The library: cancelling, a full queue, and what happens when parts of an executor die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from agentrun import HostError, Outcome, Overloaded, open_executor
from tests.support import Leaks, cgroup_of, descendants, is_init, own_config, pids_below, run_async, with_executor

pytestmark = pytest.mark.host

TREE = "for i in 1 2 3 4 5; do (sleep 60 & setsid sleep 60 &) ; done; sleep 60"


def idle(executor) -> int:
    return sum(pool.idle for pool in executor.statistics().pools.values())


async def settled(executor, count: int = 1) -> None:
    with trio.fail_after(20):
        while idle(executor) < count:
            await trio.sleep(0.005)


def test_cancelling_a_call_leaves_nothing():
    async def body(executor):
        await executor.run(["true"])
        await settled(executor)
        before = Leaks(executor.tree.path)
        with trio.move_on_after(0.3) as scope:
            await executor.run(["sh", "-c", TREE])
        assert scope.cancelled_caught
        assert executor.calls() == {}
        await trio.to_thread.run_sync(before.check)
        assert (await executor.run(["true"])).ok

    with_executor(body)


def test_a_cancelled_call_is_dead_when_the_cancellation_goes_on():
    async def body(executor):
        leaves = []
        with trio.CancelScope() as scope:
            async with executor.start(["sh", "-c", TREE]) as call:
                leaves.append(executor.tree.path / "tenant-default" / f"call-{call.id}")
                with trio.fail_after(10):
                    while len(pids_below(leaves[0])) < 10:
                        await trio.sleep(0.005)
                scope.cancel()
                await trio.sleep_forever()
        assert pids_below(leaves[0]) == []

    with_executor(body)


def test_more_calls_than_may_run_and_wait_are_refused():
    async def body(executor):
        outcomes = []

        async def one():
            try:
                outcomes.append((await executor.run(["sleep", "0.5"])).ok)
            except Overloaded as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert outcomes.count(True) == 5
        assert outcomes.count("2 calls run and 3 wait; try again later") == 5
        stats = executor.statistics()
        assert (stats.running, stats.queued, stats.refused) == (0, 0, 5)

    with_executor(body, max_running=2, max_queued=3)


def test_a_call_cancelled_while_it_waits_gives_its_place_back():
    async def body(executor):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, ["sleep", "1"])
            while not executor.statistics().running:
                await trio.sleep(0.001)
            with trio.move_on_after(0.1) as scope:
                await executor.run(["true"])
            assert scope.cancelled_caught
        assert (executor.statistics().running, executor.statistics().queued) == (0, 0)
        for _ in range(3):
            assert (await executor.run(["true"])).ok

    with_executor(body, max_running=1)


def test_calls_wait_their_turn():
    async def body(executor):
        order = []

        async def one(number):
            await executor.run(["sleep", "0.05"])
            order.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(one, number)
                await trio.lowlevel.checkpoint()
        assert sorted(order) == list(range(6))

    with_executor(body, max_running=1)


def test_without_a_pool_every_call_is_cold_and_says_so():
    async def body(executor):
        for _ in range(3):
            assert (await executor.run(["true"])).warm is False
        assert idle(executor) == 0

    with_executor(body, pool_least=0, pool_most=0)


def test_the_first_call_is_cold():
    async def body(executor):
        assert (await executor.run(["true"])).warm is False
        await settled(executor)
        assert (await executor.run(["true"])).warm is True

    with_executor(body)


@pytest.mark.parametrize("streaming", [False, True])
def test_closing_while_calls_run(streaming):
    config = own_config()
    before = Leaks(cgroup_of(config.name))
    outcomes = []

    async def body():
        async with trio.open_nursery() as nursery, open_executor(config) as executor:

            async def one():
                if streaming:
                    async with executor.start(["sh", "-c", TREE]) as call:
                        outcomes.append((await call.wait()).outcome)
                else:
                    outcomes.append((await executor.run(["sh", "-c", TREE])).outcome)

            for _ in range(4):
                nursery.start_soon(one)
            with trio.fail_after(10):
                while len(executor.calls()) < 4:
                    await trio.sleep(0.005)
        assert outcomes == [Outcome.CANCELLED] * 4

    run_async(body)
    before.check()
    assert not cgroup_of(config.name).exists()


CLOSED_EARLY = """
import sys, trio
from agentrun import HostError, Outcome, open_executor
from tests.support import Leaks, cgroup_of, own_config

async def call(executor, streaming):
    try:
        if streaming:
            async with executor.start(["sleep", "60"]) as running:
                result = await running.wait()
        else:
            result = await executor.run(["sleep", "60"])
        assert result.outcome is Outcome.CANCELLED, result
    except HostError:
        pass  # the executor was closing, or the sandbox was killed before the tool could start

async def once(config, how, after):
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery, open_executor(config) as executor:
            for number in range(4):
                nursery.start_soon(call, executor, number % 2)
            await trio.sleep(after)
            if how == "exception":
                raise ZeroDivisionError
            scope.cancel()
            await trio.sleep_forever()

for turn in range(25):
    config = own_config(pool_least=turn % 3)
    before = Leaks(cgroup_of(config.name))
    try:
        trio.run(once, config, sys.argv[1], turn * 0.0015)
        assert sys.argv[1] == "cancellation"
    except* ZeroDivisionError:
        pass
    before.check()
    assert not cgroup_of(config.name).exists()
"""
"""Each turn a little later: before anything is built, in the middle of it, and when the calls run."""


@pytest.mark.parametrize("how", ["exception", "cancellation"])
def test_closing_while_sandboxes_are_being_built(how):
    """In a program of its own: what hangs while it closes cannot be cancelled."""
    done = subprocess.run([sys.executable, "-c", CLOSED_EARLY, how], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_closed_executor_refuses():
    async def body():
        async with open_executor(own_config()) as executor:
            pass
        with pytest.raises(HostError, match="clos"):
            await executor.run(["true"])

    run_async(body)


def zygotes() -> list[int]:
    """Our own executor's, not those of a daemon that others use."""
    ours = [pid for pid, (parent, _, _) in descendants(os.getpid()).items() if parent == os.getpid()]
    return [pid for pid in ours if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"agentrun-zygote")
            and Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()]  # fmt: skip


@pytest.mark.parametrize("warm", [True, False])
def test_the_zygote_is_killed_while_idle(warm):
    async def body(executor):
        await executor.run(["true"])
        await settled(executor)
        victims = zygotes()
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for _ in range(5):
            assert (await executor.run(["echo", "ok"])).stdout == b"ok\n"

    with_executor(body, **({} if warm else {"pool_least": 0, "pool_most": 1}))


def test_the_inits_of_idle_slots_are_killed():
    async def body(executor):
        await executor.run(["true"])
        await settled(executor, 2)
        victims = [pid for pid in pids_below(executor.tree.path) if is_init(pid)]
        assert len(victims) >= 2
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        # A runner dies with its init, a moment later; what is asked for in that moment is not a call on an idle slot.
        with trio.fail_after(10):
            while pids_below(executor.tree.path):
                await trio.sleep(0.001)
        for _ in range(5):
            result = await executor.run(["echo", "ok"])
            assert (result.outcome, result.stdout) == (Outcome.EXITED, b"ok\n")

    with_executor(body)


def test_the_name_of_a_live_executor_is_taken():
    async def body(executor):
        with pytest.raises(HostError, match="belongs to an agentrun that is running"):
            async with open_executor(executor.config):
                pass
        assert (await executor.run(["true"])).ok

    with_executor(body)


def test_the_init_of_a_running_call_is_killed():
    async def body(executor):
        async with executor.start(["sleep", "60"]) as call:
            leaf = executor.tree.path / "tenant-default" / f"call-{call.id}"
            with trio.fail_after(10):
                while "sleep" not in {Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids_below(leaf)}:
                    await trio.sleep(0.001)
            (victim,) = filter(is_init, pids_below(leaf))
            os.kill(victim, signal.SIGKILL)
            with trio.fail_after(10):
                result = await call.wait()
        assert (result.outcome, result.signal) == (Outcome.SIGNALED, 9)
        assert (await executor.run(["true"])).ok

    with_executor(body)
