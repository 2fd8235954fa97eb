# SPDX-License-Identifier: Apache-2.0
"""The maps of the scheduler: what the daemon writes is whole to the kernel."""

import os

import pytest

from agentrun.bpfmaps import PAGE
from agentrun.burst.layout import constants, layouts
from agentrun.scheduling import Scheduling
from tests.bystander import for_a_second, least_seen

SCHED = layouts("sched.h")

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: nobody else looks")


def files(sizes):
    maps = {name: os.memfd_create(name) for name in sizes}
    for name, size in sizes.items():
        os.ftruncate(maps[name], (size + PAGE - 1) // PAGE * PAGE)
    return maps


def test_the_terms_of_the_scheduler_are_never_half_there():
    ring = 2 * PAGE + 2 * constants("sched.h")["SCHED_RING_SIZE"]
    maps = files({"turns": PAGE, "terms": PAGE, "tally": PAGE, "parting": PAGE, "notices": ring})
    terms = os.dup(maps["terms"])
    scheduling = Scheduling()
    scheduling.attach(maps)
    scheduling.set_terms(0.05, 0.04, 0.005)
    stop = least_seen(terms, "Q", [SCHED["terms"].fields[name].offset for name in ("young_ns", "max_wait_ns", "slice_ns")])
    for_a_second(lambda: scheduling.set_terms(0.05, 0.04, 0.005))
    os.close(terms)
    for each in scheduling._maps:
        each.close()
    assert stop() == [50_000_000, 40_000_000, 5_000_000]
