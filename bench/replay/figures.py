# SPDX-License-Identifier: Apache-2.0
"""What the runs come to: for each arm a few figures, each with its 95 % confidence interval."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median

import msgspec

from bench.numbers import Report, cell, quantile
from bench.replay.arms import ALONE
from bench.replay.guest import Run, Tenant

RESAMPLES = 1000
Z = 1.959964
"""The normal distribution's 97.5 % point."""


class Figure(msgspec.Struct, frozen=True):
    """A figure and the bounds of its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        digits = 0 if self.value is not None and self.value >= 100 else 2 if self.value is not None and self.value < 10 else 1
        if self.low is None:
            return cell(self.value, digits)
        return f"{cell(self.value, digits)} [{cell(self.low, digits)}, {cell(self.high, digits)}]"


class Pair(msgspec.Struct, frozen=True):
    """A triple under an arm, beside the same alone, or under another."""

    run: Run
    alone: Run


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """An arm."""

    arm: str
    triples: int
    survived: Figure
    """Per cent of all tasks; Wilson's interval."""
    high_survived: Figure
    high_p50_ms: Figure
    """For one MB, all of the HIGH ones' together; those that were killed count until then."""
    high_p95_ms: Figure
    high_p99_ms: Figure
    """Up to p95 it is mostly the sharing of one processor; waiting for memory is seen here."""
    high_unserved: Figure
    """Per cent of the MB that the HIGH ones had alone and never had here: who is killed early has the easy ones in its p95."""
    high_seconds: Figure
    """Mean of those that completed."""
    high_slowdown: Figure
    """Median; as a multiple of the same task alone."""
    low_slowdown: Figure
    """Median of those that completed."""
    ends: dict[str, int]
    """How those ended that did not complete."""


def wilson(successes: int, count: int) -> Figure:
    """Wilson's score interval for a share, in per cent."""
    if not count:
        return Figure(None)
    share, z2 = successes / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / count / 4)
    return Figure(100 * share, 100 * max(0.0, middle - half), 100 * min(1.0, middle + half))


def bootstrap(pairs: Sequence[Pair], statistic: Callable[[Sequence[Pair]], float | None], seed: int) -> Figure:
    """The percentile interval of a statistic over triples drawn again with replacement: tasks of a triple stay together."""
    value = statistic(pairs)
    if value is None or len(pairs) < 2:
        return Figure(value)
    rng = random.Random(seed)
    drawn = [statistic(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)]
    found = sorted(one for one in drawn if one is not None)
    return Figure(value, quantile(found, 0.025), quantile(found, 0.975))


def _tenants(pairs: Sequence[Pair], *, high: bool) -> list[tuple[Tenant, Tenant]]:
    return [
        (tenant, alone)
        for pair in pairs
        for tenant, alone in zip(pair.run.tenants, pair.alone.tenants, strict=True)
        if tenant.high == high
    ]


def latency(share: float) -> Callable[[Sequence[Pair]], float | None]:
    def statistic(pairs: Sequence[Pair]) -> float | None:
        found = sorted(us for tenant, _ in _tenants(pairs, high=True) for us in tenant.latencies_us)
        return quantile(found, share) / 1000 if found else None

    return statistic


def unserved(pairs: Sequence[Pair]) -> float | None:
    both = [(len(tenant.latencies_us), len(alone.latencies_us)) for tenant, alone in _tenants(pairs, high=True)]
    wanted = sum(most for _, most in both)
    return 100 * (1 - sum(min(had, most) for had, most in both) / wanted) if wanted else None


def high_seconds(pairs: Sequence[Pair]) -> float | None:
    found = [tenant.seconds for tenant, _ in _tenants(pairs, high=True) if tenant.seconds is not None]
    return fmean(found) if found else None


def slowdown(*, high: bool) -> Callable[[Sequence[Pair]], float | None]:
    def statistic(pairs: Sequence[Pair]) -> float | None:
        both = [(tenant.seconds, alone.seconds) for tenant, alone in _tenants(pairs, high=high)]
        found = [seconds / alone for seconds, alone in both if seconds is not None and alone]
        return median(found) if found else None

    return statistic


def row(arm: str, pairs: Sequence[Pair], seed: int) -> Row:
    everyone = [tenant for pair in pairs for tenant in pair.run.tenants]
    highs = [tenant for tenant in everyone if tenant.high]
    return Row(
        arm=arm,
        triples=len(pairs),
        survived=wilson(sum(tenant.seconds is not None for tenant in everyone), len(everyone)),
        high_survived=wilson(sum(tenant.seconds is not None for tenant in highs), len(highs)),
        high_p50_ms=bootstrap(pairs, latency(0.50), seed),
        high_p95_ms=bootstrap(pairs, latency(0.95), seed),
        high_p99_ms=bootstrap(pairs, latency(0.99), seed),
        high_unserved=bootstrap(pairs, unserved, seed),
        high_seconds=bootstrap(pairs, high_seconds, seed),
        high_slowdown=bootstrap(pairs, slowdown(high=True), seed),
        low_slowdown=bootstrap(pairs, slowdown(high=False), seed),
        ends=Counter(f"{'HIGH' if one.high else 'LOW'} {one.how}" for one in everyone if one.seconds is None),
    )


def rows(runs: Sequence[Run], arms: Sequence[str], seed: int) -> list[Row]:
    """A row for each arm that ran; an arm that could not run at all has none."""
    alone = {run.triple: run for run in runs if run.arm == ALONE}
    found = []
    for arm in [ALONE, *arms]:
        pairs = [Pair(run, alone[run.triple]) for run in runs if run.arm == arm and not run.error]
        if pairs:
            found.append(row(arm, pairs, seed))
    return found


class Against(msgspec.Struct, frozen=True):
    """An arm beside agentrun in the same triples: much narrower than the difference of two intervals."""

    arm: str
    survived: Figure
    """Percentage points that agentrun has more."""
    high_p95: Figure
    """The arm's p95 latency of the HIGH ones, as a multiple of agentrun's: of the MB that both of them had."""


def against(runs: Sequence[Run], arms: Sequence[str], seed: int, base: str = "agentrun") -> list[Against]:
    """Every other arm, if the `base` has run."""
    ours = {run.triple: run for run in runs if run.arm == base and not run.error}
    found = []
    for arm in arms:
        pairs = [Pair(run, ours[run.triple]) for run in runs if run.arm == arm and not run.error and run.triple in ours]
        if pairs and arm != base:
            found.append(Against(arm, bootstrap(pairs, _survived_more, seed), bootstrap(pairs, _p95_ratio, seed)))
    return found


def _survived_more(pairs: Sequence[Pair]) -> float | None:
    both = [*_tenants(pairs, high=True), *_tenants(pairs, high=False)]
    return 100 * fmean((ours.seconds is not None) - (theirs.seconds is not None) for theirs, ours in both)


def _p95_ratio(pairs: Sequence[Pair]) -> float | None:
    theirs, ours = [], []
    for their, our in _tenants(pairs, high=True):
        both = min(len(their.latencies_us), len(our.latencies_us))
        theirs += their.latencies_us[:both]
        ours += our.latencies_us[:both]
    return quantile(sorted(theirs), 0.95) / quantile(sorted(ours), 0.95) if theirs else None


def print_against(found: Sequence[Against], report: Report) -> None:
    if found:
        report.say()
        report.table(
            ["beside agentrun", "it survives, points more", "HIGH p95 x agentrun's"],
            [[one.arm, str(one.survived), str(one.high_p95)] for one in found],
        )


def print_rows(found: Sequence[Row], report: Report) -> None:
    head = [
        "arm",
        "n",
        "survived %",
        "HIGH %",
        "HIGH p50 ms/MB",
        "p95",
        "p99",
        "unserved %",
        "HIGH s",
        "HIGH x alone",
        "LOW x alone",
    ]
    figures = [
        (
            *(one.survived, one.high_survived, one.high_p50_ms, one.high_p95_ms, one.high_p99_ms),
            *(one.high_unserved, one.high_seconds, one.high_slowdown, one.low_slowdown),
        )
        for one in found
    ]
    report.table(head, [[one.arm, str(one.triples), *map(str, cells)] for one, cells in zip(found, figures, strict=True)])
    for one in found:
        if one.ends:
            report.say(f"{one.arm}, not completed: " + ", ".join(f"{count} x {how}" for how, count in sorted(one.ends.items())))
