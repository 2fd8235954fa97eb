# SPDX-License-Identifier: Apache-2.0
"""From recordings to what is replayed: three tasks, each the stretch around its peak, scaled together to one budget."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from bench.traces import read_tasks

BEFORE, AFTER = 50.0, 30.0
"""Recorded seconds before and after a task's peak that are replayed."""
JITTER = 5.0
"""The peaks of the LOW ones come up to so many recorded seconds before or after the HIGH one's."""
GRID = 0.25
"""Recorded seconds between two looks at a time line; between two samples (about 1 s) it is drawn straight."""
LEAST_RISE = 90.0
"""MB by which an interesting task rises above where its stretch begins."""
OVER = 1.12
"""The demand of the three, as a multiple of the budget: 1233 of 1100 MB in AgentCgroup's evaluation."""
ATTEMPTS = 50
"""Draws of LOW tasks for one HIGH one."""
OWN = 1.0
"""MB that a tenant has besides its time line: program, page tables, perhaps a sandbox."""


class Task(msgspec.Struct, frozen=True):
    """One recording."""

    name: str
    times: list[float]
    sizes: list[float]

    def at(self, second: float) -> float:
        """MB at a time; before its first sample what it usually has."""
        after = bisect_right(self.times, second)
        if after == 0:
            return median(self.sizes)
        if after == len(self.times):
            return self.sizes[-1]
        t0, t1, s0, s1 = self.times[after - 1], self.times[after], self.sizes[after - 1], self.sizes[after]
        return s0 + (s1 - s0) * (second - t0) / (t1 - t0)

    def stretch(self, shift: float = 0.0) -> list[float]:
        """MB at each point of the grid around the peak, which comes `shift` seconds late."""
        peak = self.times[max(range(len(self.sizes)), key=self.sizes.__getitem__)]
        return [self.at(peak - BEFORE - shift + point * GRID) for point in range(int((BEFORE + AFTER) / GRID) + 1)]


class Line(msgspec.Struct, frozen=True):
    """What one tenant replays."""

    name: str
    high: bool
    steps: list[tuple[float, int]]
    """(ms, MB), only where the MB change; then the end."""


class Triple(msgspec.Struct, frozen=True):
    """One HIGH and two LOW tenants."""

    number: int
    scale: float
    budget_mb: int
    lines: list[Line]


def interesting(path: Path) -> list[Task]:
    """The tasks of a file whose memory moves."""
    tasks = []
    for raw in read_tasks(path):
        usual = median(mb for _, mb in raw["mem"])
        samples = [(ms, mb) for ms, mb in raw["mem"] if mb > usual / 2]  # less is a container that is made or taken down
        task = Task(f"{raw['run']} {raw['model']}", [ms / 1000 for ms, _ in samples], [mb for _, mb in samples])
        stretch = task.stretch()
        if max(stretch) - stretch[0] >= LEAST_RISE:
            tasks.append(task)
    return tasks


def draw(tasks: Sequence[Task], count: int, seed: int, demand_mb: float, speed: float) -> tuple[list[Triple], int]:
    """`count` triples, and how many draws were put back because no order of things could have saved all three.

    Every task is the HIGH one once, if there are LOW ones beside which it can be saved, before any is again.
    """
    rng = random.Random(seed)
    triples: list[Triple] = []
    put_back = 0
    highs: list[Task] = []
    while len(triples) < count:
        highs = highs or rng.sample(tasks, len(tasks))
        high = highs.pop()
        for _ in range(ATTEMPTS):
            lows = rng.sample([task for task in tasks if task is not high], 2)
            triple = _scaled(len(triples), [high, *lows], rng, demand_mb, speed)
            if triple is not None:
                triples.append(triple)
                break
            put_back += 1
    return triples, put_back


def _scaled(number: int, tasks: Sequence[Task], rng: random.Random, demand_mb: float, speed: float) -> Triple | None:
    stretches = [task.stretch(rng.uniform(-JITTER, JITTER) if at else 0.0) for at, task in enumerate(tasks)]
    scale = demand_mb / max(map(sum, zip(*stretches, strict=True)))
    scaled = [[size * scale for size in stretch] for stretch in stretches]
    if not can_be_saved(scaled, demand_mb / OVER):
        return None
    lines = [Line(task.name, at == 0, to_steps(scaled[at], speed)) for at, task in enumerate(tasks)]
    return Triple(number, scale, round(demand_mb / OVER), lines)


def can_be_saved(stretches: Sequence[Sequence[float]], budget: float) -> bool:
    """All would fit if each rose only while the others are still where they began."""
    starts = sum(stretch[0] for stretch in stretches)
    return all(starts - stretch[0] + max(stretch) + OWN * len(stretches) <= budget for stretch in stretches)


def to_steps(stretch: Sequence[float], speed: float) -> list[tuple[float, int]]:
    """Compressed in time, in whole MB."""
    steps: list[tuple[float, int]] = []
    for point, size in enumerate(stretch):
        if not steps or round(size) != steps[-1][1] or point == len(stretch) - 1:
            steps.append((round(point * GRID * 1000 / speed, 3), round(size)))
    return steps
