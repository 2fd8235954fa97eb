# SPDX-License-Identifier: Apache-2.0
"""Histograms: edges, percentiles, differences, and the text that `agentrun lat` prints."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.cli.lat import text
from agentrun.histogram import Histogram, bounds, draw, merge, percentile, rows, since
from agentrun.latency import PHASES

SLOTS = 232


def slot_of(ns: int) -> int:
    """What bpf/phases.c does, in its own steps."""
    v = ns // 125
    if v < 8:
        return v
    exponent = v.bit_length() - 1
    return min(SLOTS - 1, 8 * (exponent - 2) + ((v >> (exponent - 3)) & 7)) if exponent <= 30 else SLOTS - 1


def buckets_of(values) -> list[tuple[float, float, int]]:
    counts: dict[int, int] = {}
    for ns in values:
        counts[slot_of(ns)] = counts.get(slot_of(ns), 0) + 1
    return [(*bounds(slot), number) for slot, number in sorted(counts.items())]


def histogram(*values: int, phase: str = "exec", shape: str = "none/default", kind: str = "warm") -> Histogram:
    return Histogram.of(phase, shape, kind, sum(values) / 1e9, buckets_of(values))


def test_slots_follow_each_other_without_a_gap():
    edges = [bounds(slot) for slot in range(SLOTS)]
    assert edges[0] == (0, 0.125)
    assert all(high == low for (_, high), (low, _) in itertools.pairwise(edges))
    assert all(high / low <= 1.125 for low, high in edges[8:])
    assert edges[-1][1] == 2**28
    for octave in range(28):
        assert any(low == 2**octave for low, _ in edges), "no bucket lies across a power of two"


@given(st.integers(0, (1 << 28) * 1000 - 1))
def test_a_value_lies_in_its_slot(ns):
    low, high = bounds(slot_of(ns))
    assert low <= ns / 1000 < high


def test_percentiles_are_within_an_eighth():
    random.seed(7)
    values = [round(1000 * math.exp(random.gauss(5, 0.6))) for _ in range(5000)]
    ordered = sorted(values)
    buckets = buckets_of(values)
    for rank in (0.5, 0.95, 0.99):
        exact = ordered[int(rank * len(ordered))] / 1e9
        assert percentile(buckets, rank) == pytest.approx(exact, rel=0.05)
    assert percentile(buckets, 0.5) == pytest.approx(statistics.median(values) / 1e9, rel=0.03)


def test_percentiles_of_little():
    assert percentile([], 0.5) is None
    assert percentile([(2.0, 2.25, 1)], 0.5) == pytest.approx(2.125e-6)
    assert percentile([(0.0, 0.125, 1), (8.0, 9.0, 1)], 1.0) == pytest.approx(9e-6)
    assert percentile([(0.0, 0.125, 1), (8.0, 9.0, 1)], 0.5) == pytest.approx(0.125e-6)


def test_rows_are_those_of_bcc():
    microseconds = {1: 0, 1999: 0, 2000: 1, 3999: 1, 4000: 2, 1_000_000: 9, 1_024_000: 10}
    for ns, row in microseconds.items():
        counts = rows(buckets_of([ns]))
        assert (len(counts) - 1, counts[row]) == (row, 1), ns
    assert rows(buckets_of([1_500_000, 5_000_000]), milliseconds=True) == [1, 0, 1]
    assert rows([]) == []


def test_the_histogram_is_printed_as_runqlat_prints_it():
    values = [500] * 233 + [2500] * 742 + [5000] * 203 + [9000] * 173 + [20_000] * 24 + [40_000] * 1
    assert list(draw(buckets_of(values))) == [
        "     usecs               : count     distribution",
        "         0 -> 1          : 233      |************                            |",
        "         2 -> 3          : 742      |****************************************|",
        "         4 -> 7          : 203      |**********                              |",
        "         8 -> 15         : 173      |*********                               |",
        "        16 -> 31         : 24       |*                                       |",
        "        32 -> 63         : 1        |                                        |",
    ]
    assert list(draw([])) == []


def test_the_bars_are_as_long_as_those_of_bcc():
    """The loop of BCC's ``_stars``, written down."""
    for most in (1, 3, 7, 742, 9999):
        for number in {0, 1, most // 3, most // 2, most - 1, most}:
            length = 0
            while not (length > 40 * number / most - 1 or length > 39):
                length += 1
            values = [500] * most + [2500] * number
            drawn = list(draw(buckets_of(values)))
            assert number == 0 or drawn[2].count("*") == length


def test_what_came_between_two_looks():
    before = [histogram(1000, 2000, 2000), histogram(5000, phase="run"), histogram(7, phase="clone")]
    now = [histogram(1000, 2000, 2000, 2000, 90_000), histogram(5000, phase="run"), histogram(3, phase="mounts")]
    new = {one.phase: one for one in since(now, before)}
    assert set(new) == {"exec", "mounts"}
    assert new["exec"].buckets == histogram(2000, 90_000).buckets
    assert new["exec"].sum == pytest.approx(92e-6)
    assert new["exec"].count == 2


def test_counting_that_began_anew_is_all_new():
    (new,) = since([histogram(1000)], [histogram(1000, 1000, 1000)])
    assert new == histogram(1000)


def test_merging_keeps_everything():
    whole = merge([histogram(1000, 2000), histogram(2000, 8000, shape="host/default")], "all", "warm")
    assert whole == histogram(1000, 2000, 2000, 8000, shape="all")


def test_the_text_of_lat():
    given = [
        histogram(*[100_000] * 3, shape="host/default"),
        histogram(*[120_000] * 2, *[300_000] * 1),
        histogram(2_000_000, phase="setup", kind="cold"),
    ]
    assert list(text(given, shapes=False, milliseconds=False)) == [
        "setup, cold: 1 times, p50 1984.0, p95 2041.6, p99 2046.7 us",
        "     usecs               : count     distribution",
        "         0 -> 1          : 0        |                                        |",
        "         2 -> 3          : 0        |                                        |",
        "         4 -> 7          : 0        |                                        |",
        "         8 -> 15         : 0        |                                        |",
        "        16 -> 31         : 0        |                                        |",
        "        32 -> 63         : 0        |                                        |",
        "        64 -> 127        : 0        |                                        |",
        "       128 -> 255        : 0        |                                        |",
        "       256 -> 511        : 0        |                                        |",
        "       512 -> 1023       : 0        |                                        |",
        "      1024 -> 2047       : 1        |****************************************|",
        "",
        "exec, warm: 6 times, p50 104.0, p95 310.4, p99 318.1 us",
        "     usecs               : count     distribution",
        "         0 -> 1          : 0        |                                        |",
        "         2 -> 3          : 0        |                                        |",
        "         4 -> 7          : 0        |                                        |",
        "         8 -> 15         : 0        |                                        |",
        "        16 -> 31         : 0        |                                        |",
        "        32 -> 63         : 0        |                                        |",
        "        64 -> 127        : 5        |****************************************|",
        "       128 -> 255        : 0        |                                        |",
        "       256 -> 511        : 1        |********                                |",
        "",
    ]
    apart = [line for line in text(given, shapes=True, milliseconds=True) if "times" in line]
    assert apart == [
        "setup, cold, none/default: 1 times, p50 1.984, p95 2.042, p99 2.047 ms",
        "exec, warm, host/default: 3 times, p50 0.100, p95 0.104, p99 0.104 ms",
        "exec, warm, none/default: 3 times, p50 0.126, p95 0.315, p99 0.319 ms",
    ]


def test_phases_are_in_the_order_of_a_sandboxs_life():
    assert PHASES[0] == "setup"
    assert PHASES.index("seccomp") < PHASES.index("exec") < PHASES.index("run") < PHASES.index("teardown")
