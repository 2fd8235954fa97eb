# SPDX-License-Identifier: Apache-2.0
"""Thousands of calls of every kind at once: each result right, and nothing more than before afterwards.

``AGENTRUN_STORM`` says how many; 10,000 under CI, else 1,500.
"""

import os
import random
import signal

import pytest
import trio

from agentrun import Outcome
from tests.support import Leaks, with_executor

pytestmark = pytest.mark.host

CALLS = int(os.environ.get("AGENTRUN_STORM") or ("10000" if os.environ.get("CI") else "1500"))
AT_ONCE = 32
BIG = 100_000_000
TREE = "i=0; while [ $i -lt 200 ]; do sleep 300 & i=$((i+1)); done; exit 3"


async def fast(executor, number):
    result = await executor.run(["echo", str(number)])
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == (Outcome.EXITED, 0, b"%d\n" % number, b"")


async def failing(executor, number):
    code = number % 255 + 1
    result = await executor.run(["sh", "-c", f"echo {number} >&2; exit {code}"])
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == (Outcome.EXITED, code, b"", b"%d\n" % number)


async def signaled(executor, number):
    which = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)[number % 3]
    result = await executor.run(["sh", "-c", f"kill -{which.value} $$"])
    assert (result.outcome, result.exit_code, result.signal) == (Outcome.SIGNALED, None, which)


async def not_found(executor, number):
    result = await executor.run([f"no-such-command-{number}"])
    assert (result.outcome, result.exit_code, result.signal) == (Outcome.FAILED_TO_START, 127, None)


async def closed(executor, number):
    result = await executor.run(["sh", "-c", "exec <&- >&- 2>&-; exit 9"])
    assert (result.outcome, result.exit_code, result.stdout) == (Outcome.EXITED, 9, b"")


async def orphans(executor, number):
    result = await executor.run(
        ["sh", "-c", f"(setsid sleep 300 &) ; (setsid sh -c 'sleep 300 & exec sleep 300' &) ; echo {number}"]
    )
    assert (result.outcome, result.exit_code, result.stdout) == (Outcome.EXITED, 0, b"%d\n" % number)


async def late(executor, number):
    result = await executor.run(["sh", "-c", f"echo {number}; sleep 300"], timeout=0.5)
    assert (result.outcome, result.signal, result.returncode) == (Outcome.TIMED_OUT, 9, 124)
    assert result.stdout in (b"", b"%d\n" % number)


async def cancelled(executor, number):
    with trio.move_on_after(0.001 * (number % 40)) as scope:
        await executor.run(["sleep", "300"])
    assert scope.cancelled_caught


async def fed(executor, number):
    data = b"%d " % number * 20_000
    result = await executor.run(["cat"], stdin=data)
    assert (result.ok, result.stdout, result.truncated) == (True, data, False)


async def tree(executor, number):
    result = await executor.run(["sh", "-c", TREE])
    assert (result.outcome, result.exit_code) == (Outcome.EXITED, 3)


async def big(executor, number):
    result = await executor.run(["head", "-c", str(BIG), "/dev/zero"])
    assert (result.ok, result.truncated) == (True, True)
    assert b"[agentrun: %d bytes cut]" % (BIG - executor.config.capture_limit) in result.stdout


async def other_tenant(executor, number):
    result = await executor.run(["echo", str(number)], tenant=f"t{number % 3}")
    assert (result.ok, result.stdout) == (True, b"%d\n" % number)


KINDS = {
    fast: 7000, failing: 1000, signaled: 600, not_found: 500, closed: 300, orphans: 200, fed: 150, late: 70, cancelled: 100,
    other_tenant: 60, tree: 20,
}  # fmt: skip


async def quiet(executor):
    """Every pool has shrunk to what it keeps, and every ended slot is gone."""
    with trio.fail_after(60):
        while True:
            stats = executor.statistics()
            calm = all(p.idle == p.target == 1 and not p.building and not p.leased for p in stats.pools.values())
            if calm and stats.running == 0:
                return
            await trio.sleep(0.05)


def test_a_storm_of_calls_leaves_nothing():
    random_numbers = random.Random(CALLS)
    plan = random_numbers.choices(list(KINDS), list(KINDS.values()), k=CALLS - 4)
    plan += [big] * 3 + [tree]
    random_numbers.shuffle(plan)

    async def body(executor):
        for tenant in ("default", "t0", "t1", "t2"):
            await executor.run(["true"], tenant=tenant)
        await quiet(executor)
        before = Leaks(executor.tree.path)
        todo = iter(enumerate(plan))
        wrong = []

        async def worker():
            for number, kind in todo:
                try:
                    await kind(executor, number)
                except Exception as error:  # noqa: BLE001 - all of them, with their numbers
                    wrong.append((kind.__name__, number, error))

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(worker)
        assert wrong == []
        stats = executor.statistics()
        assert (stats.running, stats.queued, stats.refused, stats.stuck) == (0, 0, 0, 0)
        assert stats.completed == CALLS + 4
        await quiet(executor)
        await trio.to_thread.run_sync(before.check)

    with_executor(body, seconds=max(60, CALLS // 20))
