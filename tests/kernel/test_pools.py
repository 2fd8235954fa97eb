# SPDX-License-Identifier: Apache-2.0
"""Pools of many tenants and policies: what they are called, and that what nobody uses any more goes, whole."""

import pytest
import trio

from agentrun import Limits, Policy, pool
from agentrun.policy import Bind, Filesystem, Process
from agentrun.units import GIB
from tests.kernel.wall import workspace_directory
from tests.support import Leaks, with_executor

pytestmark = pytest.mark.host

SOON = 0.3


@pytest.fixture
def retired_soon(monkeypatch):
    """Retire pools after a fraction of a second; housekeeping comes once a second."""
    monkeypatch.setattr(pool, "RETIRED", SOON)


def policy(number: int, **fields) -> Policy:
    """One of many that differ in their shapes and not in their names' parts."""
    return Policy(name=f"p{number}", process=Process(hostname=f"h{number}"), **fields)


def pools(executor) -> set[str]:
    return set(executor.statistics().pools)


async def until(condition) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.02)


def test_pools_of_different_shapes_have_different_names():
    async def body(executor):
        for number in range(3):
            assert (await executor.run(["true"], policy=policy(number))).ok
        await executor.run(["true"], policy=policy(0, net="host"))
        await executor.run(["true"])
        await executor.run(["true"], tenant="other", policy=policy(1))
        await executor.run(["true"], policy=policy(1, limits=Limits(pids_max=9), best_effort=True))  # no shape of its own
        calls = {name: stats.hits + stats.misses for name, stats in executor.statistics().pools.items()}
        assert calls == {
            "default/none": 1, "default/none#2": 1, "default/none#3": 2, "default/none#4": 1, "default/host": 1,
            "other/none#2": 1,
        }  # fmt: skip

    with_executor(body)


def test_another_seccomp_profile_is_in_the_name():
    async def body(executor):
        await executor.run(["true"], policy=Policy(name="p", seccomp="strict"))
        assert pools(executor) == {"default/none/strict"}

    with_executor(body)


def test_what_nobody_uses_goes(retired_soon):
    """Pools, zygotes, cgroups of tenants and descriptors, as after the first call; and it can all be had again."""

    async def body(executor, place):
        binds = Filesystem(binds=(Bind(str(place), "/data", "rw"),))
        await executor.warm_up()
        assert (await executor.run(["true"], workspace=str(place))).ok
        await until(lambda: all(s.idle == s.target and not s.building for s in executor.statistics().pools.values()))
        before = Leaks(executor.tree.path)
        ids = {}
        for number in range(6):
            tenant = f"t{number}"
            shown = policy(number, fs=binds) if number % 2 else policy(number)
            result = await executor.run(["stat", "-c", "%u", "."], tenant=tenant, policy=shown, workspace=str(place))
            assert result.stdout == b"1000\n", result
            ids[tenant] = executor._fleet.tenants.id_base(tenant)
        assert len(pools(executor)) == 7
        await until(lambda: pools(executor) == {"default/none"})
        await trio.to_thread.run_sync(before.check)
        await until(lambda: {path.name for path in executor.tree.path.glob("tenant-*")} == {"tenant-default"})
        for number in (5, 0):
            result = await executor.run(["true"], tenant=f"t{number}", policy=policy(number), workspace=str(place))
            assert result.ok
        assert {tenant: executor._fleet.tenants.id_base(tenant) for tenant in ids} == ids
        assert len({*ids.values()}) == len(ids)

    with workspace_directory() as place:
        with_executor(body, place)


def test_a_call_that_waits_longer_than_its_pool_lives(retired_soon):
    async def body(executor):
        assert (await executor.run(["true"], tenant="slow")).ok
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run, ["sleep", "4"])
            await until(lambda: executor.statistics().running)
            results = []

            async def wait():
                results.append(await executor.run(["echo", "late"], tenant="slow"))

            nursery.start_soon(wait)
            await until(lambda: executor.statistics().queued)
            await until(lambda: pools(executor) == {"default/none"})
            await until(lambda: not (executor.tree.path / "tenant-slow").exists())
        assert results[0].stdout == b"late\n"
        assert (executor.tree.path / "tenant-slow").is_dir()

    with_executor(body, max_running=1)


def test_a_long_call_is_use_and_a_budget_stays(retired_soon):
    async def body(executor):
        async with executor.start(["sleep", "60"], tenant="busy"):
            await executor.run(["true"], tenant="rich")
            await until(lambda: pools(executor) == {"busy/none"})
            await trio.sleep(1.5)
            assert pools(executor) == {"busy/none"}
            assert (executor.tree.path / "tenant-rich").is_dir()
        assert (await executor.run(["true"], tenant="rich")).ok

    with_executor(body, tenant_limits={"rich": Limits(memory_max=4 * GIB, memory_swap_max=None, pids_max=None)})


def test_calls_while_pools_come_and_go(monkeypatch):
    """Every call finds a pool, whenever housekeeping takes one away."""
    monkeypatch.setattr(pool, "RETIRED", 0.0)

    async def body(executor):
        async def housekeeping():
            while True:
                await executor._fleet._retire([key for key, known in executor._fleet._pools.items() if known.deserted])
                await trio.sleep(0)

        async def caller(number):
            for turn in range(8):
                result = await executor.run(["echo", str(number)], tenant=f"t{number % 2}", policy=policy(number % 3))
                assert result.stdout == b"%d\n" % number, (turn, result)
                await trio.sleep(0.01)

        async with trio.open_nursery() as keepers:
            keepers.start_soon(housekeeping)
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(caller, number)
            keepers.cancel_scope.cancel()

    with_executor(body, pool_least=0, pool_most=2)
