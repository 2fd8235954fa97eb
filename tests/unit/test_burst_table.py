# SPDX-License-Identifier: Apache-2.0
"""What the programs in the kernel judge by, as another processor sees it while the daemon writes: never a value that is none."""

import os
import time

import pytest

from agentrun.bpfmaps import PAGE, Map
from agentrun.burst.layout import constants, layouts
from agentrun.burst.table import Orders, Table
from tests.bystander import for_a_second, least_seen

LEAF, SETTINGS = layouts()["leaf"], layouts()["settings"]
ORDERS = Orders(steady=1 << 20, ceiling=2 << 30, burst=1 << 30, burst_seconds=60, slack=0, on_exhausted=2, on_ceiling=2)

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: nobody else looks")


@pytest.fixture
def made(monkeypatch):
    """A table whose maps are files in memory, and the descriptors of those."""
    sizes = {
        "slots": PAGE, "leaves": LEAF.size * constants()["LEAVES"], "settings": PAGE, "counters": PAGE,
        "events": 2 * PAGE + 2 * constants()["RING_SIZE"],
    }  # fmt: skip
    maps = {name: os.memfd_create(name) for name in sizes}
    for name, size in sizes.items():
        os.ftruncate(maps[name], (size + PAGE - 1) // PAGE * PAGE)
    kept = {name: os.dup(fd) for name, fd in maps.items()}
    monkeypatch.setattr(Map, "update", lambda *_: None)
    monkeypatch.setattr(Map, "delete", lambda *_: None)
    table = Table(maps, 3)
    yield table, kept
    table.close()
    for fd in kept.values():
        os.close(fd)


def members(number, *names):
    return [number * LEAF.size + LEAF.fields[name].offset for name in names]


def test_a_correction_is_never_half_there(made):
    table, maps = made
    usage, credit, begun = 100 << 20, 4e9, time.monotonic_ns() // 1000
    table.arm(1, ORDERS)
    table.correct(1, usage, 0, credit)
    stop = least_seen(maps["leaves"], "Q", members(1, "looked_us", "usage", "peak", "credit"))
    for_a_second(lambda: table.correct(1, usage, 0, credit))
    looked_us, *rest = stop()
    assert looked_us >= begun
    assert rest == [usage, usage, int(credit * 1e6) >> 10]


def test_orders_are_never_half_there(made):
    table, maps = made
    begun = time.monotonic_ns() // 1000
    table.arm(1, ORDERS)
    stop = least_seen(maps["leaves"], "Q", members(1, "looked_us", "steady", "ceiling", "capacity", "credit"))
    for_a_second(lambda: table.arm(1, ORDERS))
    looked_us, *rest = stop()
    allowance = 60_000_000 << 20
    assert looked_us >= begun
    assert rest == [1 << 20, 2 << 30, allowance, allowance]


def test_the_level_of_calls_is_always_watched(made):
    table, maps = made
    stop = least_seen(maps["settings"], "I", [SETTINGS.fields["level"].offset])
    for_a_second(lambda: table.remove(table.add(77, 5), 77))
    assert stop() == [3]


def test_levels_stay_where_they_are_when_another_comes(made):
    table, _ = made
    told = table._settings.words[1:6]
    table.add(77, 5)
    table.add(78, 2)
    assert told.tolist()[:4] == [3, 3, 5, 2]
    table.remove(2, 78)
    table.add(79, 4)
    table.remove(1, 77)
    assert told.tolist()[:3] == [2, 3, 4]
    told.release()


def test_no_two_leaves_have_an_episode_in_common(made):
    table, _ = made
    seen = []
    for identity in range(1, 50):
        number = table.add(identity)
        for _ in range(3):
            seen.append(table._leaves.words[members(number, "episode")[0] // 4])
            table.release(number)
    assert len({*seen}) == len(seen)
