"""Quantiles, ratios and the tables they are printed in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

Samples = list[float | None]
"""Milliseconds, one per round; ``None`` where the call failed, so that rounds stay comparable."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The distribution of one row, milliseconds."""

    count: int
    failed: int
    min: float
    p50: float
    p95: float
    p99: float
    max: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of a sorted sample lies, interpolated between neighbours."""
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarize(samples: Sequence[float | None], failed: int | None = None) -> Summary | None:
    """The summary of what succeeded; None if nothing did."""
    good = sorted(sample for sample in samples if sample is not None)
    if not good:
        return None
    return Summary(
        count=len(good),
        failed=len(samples) - len(good) if failed is None else failed,
        min=good[0],
        p50=quantile(good, 0.50),
        p95=quantile(good, 0.95),
        p99=quantile(good, 0.99),
        max=good[-1],
    )


def ratio(samples: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """The median of the ratios within each round: a slow moment of the machine slows both and cancels out."""
    pairs = [one / other for one, other in zip(samples, base, strict=True) if one is not None and other is not None]
    return median(pairs) if pairs else None


def cell(value: float | None, digits: int = 2) -> str:
    """A number for a table, ``-`` for none."""
    return "-" if value is None else f"{value:.{digits}f}"


class Report:
    """What is printed, and kept to be written to a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        """Print a line now."""
        print(text, flush=True)
        self.lines.append(text)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.say()
        self.say(f"## {text}")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table (Markdown, aligned); the first column is words, the others are numbers."""
        widths = [max(3, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
        rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        for row in (head, rule, *rows):
            cells = [text.ljust(widths[0]) if column == 0 else text.rjust(widths[column]) for column, text in enumerate(row)]
            self.say("| " + " | ".join(cells) + " |")

    def write(self, path: Path) -> None:
        """Keep what was printed."""
        path.write_text("\n".join(self.lines) + "\n")
