# SPDX-License-Identifier: Apache-2.0
"""What the programs in the kernel judge by, as another processor sees it while the daemon writes: never a value that is none."""

import mmap
import os
import time

import pytest

from agentrun.bpfmaps import PAGE
from agentrun.burst.layout import constants, layouts
from agentrun.burst.table import Orders, Table

LEAF = layouts()["leaf"]
SECONDS = 1.0


def table_of_files():
    """A table whose maps are files in memory; the descriptor of the leaves."""
    sizes = {
        "slots": PAGE, "leaves": LEAF.size * constants()["LEAVES"], "settings": PAGE, "counters": PAGE,
        "events": 2 * PAGE + 2 * constants()["RING_SIZE"],
    }  # fmt: skip
    maps = {name: os.memfd_create(name) for name in sizes}
    for name, size in sizes.items():
        os.ftruncate(maps[name], (size + PAGE - 1) // PAGE * PAGE)
    leaves = os.dup(maps["leaves"])
    return Table(maps, 3), leaves


def worst_seen(leaves, number, names):
    """A process that looks at these members without end; ``stop()`` gives the least it has seen of each."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        view = memoryview(mmap.mmap(leaves, LEAF.size * (number + 1), mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
        at = [(number * LEAF.size + LEAF.fields[name].offset) // 8 for name in names]
        least = [view[index] for index in at]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for _ in range(1000):
                for place, index in enumerate(at):
                    if (value := view[index]) < least[place]:
                        least[place] = value
        os.write(write, " ".join(map(str, least)).encode())
        os._exit(0)
    os.close(write)

    def stop():
        with os.fdopen(read) as file:
            found = [int(word) for word in file.read().split()]
        os.waitpid(pid, 0)
        return dict(zip(names, found, strict=True))

    return stop


def test_a_correction_is_never_half_there():
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one processor: nobody else looks")
    table, leaves = table_of_files()
    usage, credit, begun = 100 << 20, 4e9, time.monotonic_ns() // 1000
    table.arm(1, Orders(steady=1 << 20, ceiling=None, burst=1 << 30, burst_seconds=60, slack=0, on_exhausted=2, on_ceiling=2))
    table.correct(1, usage, 0, credit)
    stop = worst_seen(leaves, 1, ("usage", "peak", "credit", "looked_us"))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        table.correct(1, usage, 0, credit)
    least = stop()
    os.close(leaves)
    table.close()
    assert least.pop("looked_us") >= begun
    assert least == {"usage": usage, "peak": usage, "credit": int(credit * 1e6) >> 10}
