"""Histograms of durations: percentiles, differences, and how they are printed.

Buckets are eighths of an octave: an eighth of a microsecond wide below one, then eight equal parts of each doubling, as
``bpf/phases.c`` counts. They nest in powers of two, so what is shown is the log2 histogram that BCC's tools show; percentiles are
taken from the buckets themselves, whose edges are at most an eighth apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

Bucket = tuple[float, float, int]
"""From, up to (microseconds), and how many."""
STARS = 40
_MICRO = 1e-6


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of one phase."""

    phase: str
    """See ``enum phase`` in ``bpf/phases.h``."""
    shape: str
    """Which sandboxes: network and seccomp profile, or the name with which another runtime's containers were registered."""
    kind: str
    """``warm``, ``cold`` (a call waited for it) or ``template`` (done once by a zygote, for all its sandboxes)."""
    count: int
    sum: float
    """Seconds."""
    p50: float | None
    """Seconds; see ``percentile``."""
    p95: float | None
    p99: float | None
    buckets: tuple[Bucket, ...]
    """In order; empty ones are left out."""

    @classmethod
    def of(cls, phase: str, shape: str, kind: str, total: float, buckets: Sequence[Bucket]) -> Histogram:
        """From its buckets; ``total`` is the sum, seconds."""
        p50, p95, p99 = (percentile(buckets, rank) for rank in (0.5, 0.95, 0.99))
        return cls(
            phase=phase, shape=shape, kind=kind, count=sum(number for _, _, number in buckets), sum=round(total, 9),
            p50=p50, p95=p95, p99=p99, buckets=tuple(buckets),
        )  # fmt: skip

    @property
    def name(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.phase, self.shape, self.kind


def bounds(slot: int) -> tuple[float, float]:
    """Where a slot of ``bpf/phases.c`` begins and ends, microseconds."""
    if slot < 8:
        return slot / 8, (slot + 1) / 8
    width = 2.0 ** (slot // 8 - 4)
    return (8 + slot % 8) * width, (9 + slot % 8) * width


def percentile(buckets: Sequence[Bucket], rank: float) -> float | None:
    """Seconds below which ``rank`` of the values are, as if those of a bucket lay evenly in it; None if there are none."""
    wanted = rank * sum(number for _, _, number in buckets)
    passed = 0
    for low, high, number in buckets:
        if number and passed + number >= wanted:
            return round((low + (high - low) * (wanted - passed) / number) * _MICRO, 9)
        passed += number
    return None


def merge(histograms: Sequence[Histogram], shape: str, kind: str) -> Histogram:
    """Several of one phase as one; there must be one at least."""
    numbers: dict[tuple[float, float], int] = {}
    for histogram in histograms:
        for low, high, number in histogram.buckets:
            numbers[low, high] = numbers.get((low, high), 0) + number
    buckets = [(low, high, number) for (low, high), number in sorted(numbers.items())]
    return Histogram.of(histograms[0].phase, shape, kind, sum(one.sum for one in histograms), buckets)


def since(now: Sequence[Histogram], before: Sequence[Histogram]) -> list[Histogram]:
    """What has been added between two looks; histograms to which nothing was are left out.

    Where there is less than before, counting has begun anew, and all of it is new.
    """
    known = {one.name: one for one in before}
    found = []
    for one in now:
        old = known.get(one.name)
        if old is None or old.count > one.count:
            found.append(one)
        elif old.count < one.count:
            had = {low: number for low, _, number in old.buckets}
            buckets = [(low, high, number - had.get(low, 0)) for low, high, number in one.buckets if number > had.get(low, 0)]
            found.append(Histogram.of(*one.name, one.sum - old.sum, buckets))
    return found


def rows(buckets: Sequence[Bucket], *, milliseconds: bool = False) -> list[int]:
    """Counts by powers of two, as BCC's ``bpf_log2l`` has them: 0 and 1, 2 and 3, 4 to 7, ... whole units.

    A bucket that a row's edge divides, as happens with milliseconds, goes where its middle is.
    """
    unit = 1000.0 if milliseconds else 1.0
    counts: dict[int, int] = {}
    for low, high, number in buckets:
        row = max(0, int((low + high) / 2 / unit).bit_length() - 1)
        counts[row] = counts.get(row, 0) + number
    return [counts.get(row, 0) for row in range(max(counts, default=-1) + 1)]


def draw(buckets: Sequence[Bucket], *, milliseconds: bool = False) -> Iterator[str]:
    """Lines as BCC's ``print_log2_hist`` prints them."""
    counts = rows(buckets, milliseconds=milliseconds)
    if counts:
        yield f"     {'msecs' if milliseconds else 'usecs':<19} : count     distribution"
    for row, number in enumerate(counts):
        low, high = (1 << row if row else 0), (2 << row) - 1
        bar = "*" * (STARS * number // max(counts))
        yield f"{low:>10} -> {high:<10} : {number:<8} |{bar:<{STARS}}|"
