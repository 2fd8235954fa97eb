# SPDX-License-Identifier: Apache-2.0
"""The pool against builders of the test's: who gets which slot, when more are built, what a failure costs. The clock jumps."""

from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrun.errors import HostError, SandboxError
from agentrun.pool import DECAY, PARALLEL_BUILDS, RETIRED, RETRY_MOST, UNUSED, Pool


class Works:
    """The host's side of a pool: numbered slots, how long one takes, whether it fails."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.failure: Exception | None = None
        self.made = self.at_once = self.most_at_once = self.attempts = 0
        self.starts: list[float] = []
        self.discarded: list[int] = []

    async def build(self) -> int:
        self.attempts += 1
        self.starts.append(trio.current_time())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        if self.failure:
            raise self.failure
        self.made += 1
        return self.made


def pooled(test):
    """Run an async test(pool, works, nursery) on a mock clock."""

    def make(seconds=1.0, least=0, most=8):
        async def main():
            works = Works(seconds)
            async with trio.open_nursery() as nursery:
                pool = Pool(works.build, works.discarded.append, lambda task: task(), nursery, least=least, most=most, plan=None)
                await test(pool, works, nursery)
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return make


def test_a_warm_slot_costs_no_wait():
    @pooled
    async def run(pool, works, nursery):
        pool.shrink()
        await trio.sleep(5)
        assert (pool.statistics().idle, works.made) == (3, 3)
        before = trio.current_time()
        leases = [await pool.lease() for _ in range(3)]
        assert trio.current_time() == before
        assert {slot for slot, _ in leases} == {1, 2, 3}
        assert all(warm for _, warm in leases)
        slot, warm = await pool.lease()
        assert (slot, warm, trio.current_time() - before) == (4, False, 1.0)
        stats = pool.statistics()
        assert (stats.hits, stats.misses, stats.leased) == (3, 1, 4)

    run(least=3)


def test_those_who_wait_are_served_in_their_order():
    @pooled
    async def run(pool, works, nursery):
        got = []

        async def call(number):
            got.append((number, (await pool.lease())[0]))

        for number in range(10):
            nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().waiting == 10
        await trio.sleep(10)
        assert sorted(got) == [(number, number + 1) for number in range(10)]  # the first that is built is the first one's

    run()


@pytest.mark.parametrize("count", [1, PARALLEL_BUILDS, 40])
def test_only_so_many_builds_at_once(count):
    @pooled
    async def run(pool, works, nursery):
        async with trio.open_nursery() as callers:
            for _ in range(count):
                callers.start_soon(pool.lease)
        await trio.sleep(100)
        assert works.most_at_once == (min(PARALLEL_BUILDS, count + 2) if count == 1 else PARALLEL_BUILDS)

    run(most=64)


def test_a_waiter_that_gives_up_leaves_its_place():
    @pooled
    async def run(pool, works, nursery):
        with trio.move_on_after(0.5):
            await pool.lease()
        stats = pool.statistics()
        assert (stats.waiting, stats.leased) == (0, 0)
        await trio.sleep(2)
        stats = pool.statistics()
        assert (stats.idle, works.made, len(works.discarded)) == (2, 3, 1)  # what was built for it is kept as far as wanted
        assert (await pool.lease())[1]

    run()


def test_a_slot_that_came_as_its_waiter_gave_up_is_not_lost():
    @pooled
    async def run(pool, works, nursery):
        scope = trio.CancelScope()

        async def caller():
            with scope:
                slot, _ = await pool.lease()
                pool.release(slot)

        original = pool._keep

        def keep_and_cancel(slot):  # the slot is handed over, and in the same moment its waiter is cancelled
            original(slot)
            scope.cancel()

        nursery.start_soon(caller)
        await trio.testing.wait_all_tasks_blocked()
        pool._keep = keep_and_cancel
        await trio.sleep(1.5)
        pool._keep = original
        await trio.sleep(5)
        stats = pool.statistics()
        assert (stats.leased, stats.waiting) == (0, 0)
        assert stats.idle + len(works.discarded) == works.made

    run()


def test_a_failure_reaches_whoever_waits():
    @pooled
    async def run(pool, works, nursery):
        works.failure = SandboxError("mounts", 1)
        with pytest.raises(SandboxError, match="failed at mounts"):
            await pool.lease()
        stats = pool.statistics()
        assert (stats.leased, stats.waiting, stats.failed >= 1, stats.built) == (0, 0, True, 0)
        works.failure = OSError(24, "Too many open files")
        with pytest.raises(HostError, match=r"building a sandbox: .*Too many open files"):
            await pool.lease()
        works.failure = None
        assert not (await pool.lease())[1]

    run()


def test_failing_builds_nobody_waits_for_get_rare():
    @pooled
    async def run(pool, works, nursery):
        works.failure = HostError("no")
        for _ in range(105):  # somebody calls shrink every second; not yet so long that the pool is given up
            pool.shrink()
            await trio.sleep(1)
        late = [start for start in works.starts if start > works.starts[0] + 40]
        assert len(late) <= 65 / RETRY_MOST + PARALLEL_BUILDS
        assert len(late) > 10  # and it does not give up
        works.failure = None
        await trio.sleep(2 * RETRY_MOST)
        pool.shrink()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().idle == 1
        assert pool._pause == 0

    run(seconds=0.0, least=1, most=1)


def test_demand_is_followed_and_forgotten():
    @pooled
    async def run(pool, works, nursery):
        slots = []
        for _ in range(6):
            slots.append((await pool.lease())[0])
        assert pool.target == 12
        for slot in slots:
            pool.release(slot)
        await trio.sleep(DECAY)
        assert (pool.statistics().idle, pool.statistics().leased) == (12, 0)
        await trio.sleep(0.1 + works.seconds * 6)
        pool.shrink()
        assert pool.target == 2 == pool.statistics().idle
        assert set(slots) <= set(works.discarded)
        assert works.made == 6 + 12
        assert len(works.discarded) == 6 + 10
        assert len(set(works.discarded)) == len(works.discarded)

    run(least=2, most=20)


def test_a_peak_within_the_last_seconds_is_remembered():
    @pooled
    async def run(pool, works, nursery):
        slots = [(await pool.lease())[0] for _ in range(3)]
        for slot in slots:
            pool.release(slot)
        await trio.sleep(DECAY - 1)
        pool.shrink()
        assert pool.target == 6
        await trio.sleep(2)
        pool.shrink()
        assert pool.target == 0

    run()


def test_a_pool_nobody_uses_is_emptied():
    @pooled
    async def run(pool, works, nursery):
        slot, _ = await pool.lease()
        await trio.sleep(UNUSED + 1)
        pool.shrink()
        assert pool.target >= 2  # a call that takes long is use
        pool.release(slot)
        pool.shrink()
        await trio.sleep(5)
        assert (pool.target, pool.statistics().idle) == (0, 0)
        await pool.lease()
        assert pool.target >= 2

    run(least=2)


def test_a_pool_nobody_has_used_for_long_is_deserted():
    @pooled
    async def run(pool, works, nursery):
        slot, _ = await pool.lease()
        await trio.sleep(RETIRED + 1)
        assert not pool.deserted, "a call runs"
        pool.release(slot)
        await trio.sleep(RETIRED)
        assert not pool.deserted, "one ended just now"
        pool.shrink()
        await trio.sleep(1)
        assert pool.deserted
        with trio.move_on_after(0.5):
            await pool.lease()
        await trio.sleep(0.4)
        assert not pool.deserted, "somebody has called"
        pool.shrink()
        await trio.sleep(RETIRED + 1)
        assert pool.deserted
        assert not pool.closed
        pool.close()
        assert pool.closed

    run(least=1)


def test_a_pool_that_was_filled_is_never_deserted():
    @pooled
    async def run(pool, works, nursery):
        await pool.fill(0)
        await trio.sleep(10 * RETIRED)
        pool.shrink()
        assert not pool.deserted

    run()


def test_bounds():
    @pooled
    async def run(pool, works, nursery):
        assert pool.target == 2
        for _ in range(9):
            await pool.lease()
        assert pool.target == 5
        await trio.sleep(20)
        assert pool.statistics().idle == 5

    run(least=2, most=5)


def test_closing():
    @pooled
    async def run(pool, works, nursery):
        await pool.fill(3)
        for _ in range(3):
            await pool.lease()
        errors = []

        async def caller():
            try:
                await pool.lease()
            except HostError as error:
                errors.append(str(error))

        for _ in range(6):
            nursery.start_soon(caller)
        await trio.sleep(0.1)
        pool.close()
        await trio.sleep(10)
        assert errors == ["the pool was closed"] * 6
        assert (pool.statistics().idle, pool.statistics().waiting, pool.statistics().leased) == (0, 0, 3)
        assert len(works.discarded) == works.made - 3  # what was being built is ended, not kept

    run()


def test_fill():
    @pooled
    async def run(pool, works, nursery):
        await pool.fill(12)
        assert (pool.statistics().idle, pool.statistics().built, pool.target) == (12, 12, 12)
        pool.shrink()
        assert works.discarded == []

    run(seconds=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 5), st.floats(0.01, 3)), max_size=30), st.integers(0, 3), st.integers(1, 6)
)
def test_no_slot_is_lost_or_given_twice(calls, least, most):
    @pooled
    async def run(pool, works, nursery):
        held = Counter()

        async def call(start, length, patience):
            await trio.sleep(start)
            with trio.move_on_after(patience):
                slot, _ = await pool.lease()
                with trio.CancelScope(shield=True):
                    held[slot] += 1
                    assert held[slot] == 1
                    assert slot not in works.discarded
                    await trio.sleep(length)
                pool.release(slot)

        async with trio.open_nursery() as callers:
            for one in calls:
                callers.start_soon(call, *one)
        await trio.sleep(50)
        stats = pool.statistics()
        assert (stats.leased, stats.waiting, stats.building) == (0, 0, 0)
        assert stats.idle + len(works.discarded) == works.made == stats.built
        assert len(set(works.discarded)) == len(works.discarded)
        assert stats.idle <= most
        assert works.most_at_once <= PARALLEL_BUILDS

    run(least=least, most=most)
