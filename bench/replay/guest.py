# SPDX-License-Identifier: Apache-2.0
"""Run in a guest by ``python -m bench.replay``: each triple under each arm, and a JSON line for each of them."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from bench.replay.arms import ALONE, ARMS, MB, Arm, Ended, Setting, Workload, arm_alone
from bench.replay.tasks import Triple

SCRATCH = Path("/tmp/replay")
GATE_TIMEOUT = 15.0
"""Seconds after which the gate opens although one of them has not come to it: limits may keep it from ever doing so."""
PATIENCE = 10.0
"""Deadline, as a multiple of what the slowest of the three takes alone."""
ENDED = 0xFFFFFFFF
PROGRAM = "allocate"


class Batch(msgspec.Struct, frozen=True):
    """What a guest is to do."""

    speed: float
    arms: list[str]
    triples: list[Triple]


class Tenant(msgspec.Struct, frozen=True):
    """What came of one workload."""

    name: str
    high: bool
    how: str
    seconds: float | None
    """From the gate to the end; None if it did not complete."""
    latencies_us: list[int]
    """Of each MB after the gate."""
    peak: int | None


class Run(msgspec.Struct, frozen=True):
    """What came of one triple under one arm."""

    triple: int
    arm: str
    tenants: list[Tenant]
    deadline: float
    took: float
    error: str = ""


def read_out(path: Path) -> tuple[bool, list[int], float | None]:
    """What a workload noted: whether it came to the gate, its latencies, and its seconds if it completed."""
    data = path.read_bytes() if path.exists() else b""
    words = list(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
    if len(words) >= 3 and words[-2] == ENDED:
        return True, words[1:-2], words[-1] / 1000
    return bool(words), words[1:], None


class Stage:
    """The files of one run: the gate, and for each workload its steps and what it notes."""

    def __init__(self, triple: Triple, program: Path) -> None:
        self.directory = SCRATCH / "run"
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        shutil.copy(program, self.directory / PROGRAM)
        self._gate = self.directory / "gate"
        self._gate.touch()
        self.workloads: list[Workload] = []
        for at, line in enumerate(triple.lines):
            name = "high" if line.high else f"low{at}"
            steps = self.directory / f"{name}.steps"
            steps.write_text("".join(f"{ms} {mb}\n" for ms, mb in line.steps))
            argv = [self.directory / PROGRAM, steps, self._gate, self._out(name)]
            self.workloads.append(Workload(name, line.high, [str(word) for word in argv]))

    def _out(self, name: str) -> Path:
        return self.directory / f"{name}.out"

    def outs(self) -> list[tuple[bool, list[int], float | None]]:
        return [read_out(self._out(workload.name)) for workload in self.workloads]

    @contextmanager
    def closed(self) -> Iterator[int]:
        """The gate, shut until the descriptor is unlocked."""
        fd = os.open(self._gate, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    async def run(self, arm: Arm, setting: Setting, *, gate: bool) -> list[Ended]:
        """Run the workloads; with a gate, they start when all have come to it."""
        if not gate:
            return await arm(self.workloads, setting)
        with self.closed() as fd:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._open, fd)
                ended = await arm(self.workloads, setting)
                nursery.cancel_scope.cancel()
        return ended

    async def _open(self, fd: int) -> None:
        with trio.move_on_after(GATE_TIMEOUT):
            while not all(ready for ready, _, _ in self.outs()):
                await trio.sleep(0.03)
            await trio.sleep(0.1)  # let the last one fall asleep at it
        fcntl.flock(fd, fcntl.LOCK_UN)


async def run_arm(triple: Triple, name: str, speed: float, deadline: float, program: Path) -> Run:
    stage = Stage(triple, program)
    setting = Setting(triple.budget_mb * MB, deadline + GATE_TIMEOUT, speed, stage.directory)
    arm, began, error = arm_alone if name == ALONE else ARMS[name], time.monotonic(), ""
    try:
        ended = await stage.run(arm, setting, gate=name != ALONE)
    except* Exception as errors:  # noqa: BLE001 - what is wrong with one arm is to be no other's loss
        error = "; ".join(f"{type(one).__name__}: {one}" for one in _leaves(errors))
        ended = [Ended("error") for _ in stage.workloads]
    tenants = [
        Tenant(workload.name, workload.high, end.how, seconds, latencies, end.peak)
        for workload, end, (_, latencies, seconds) in zip(stage.workloads, ended, stage.outs(), strict=True)
    ]
    return Run(triple.number, name, tenants, deadline, time.monotonic() - began, error)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for one in group.exceptions:
        if isinstance(one, BaseExceptionGroup):
            yield from _leaves(one)
        else:
            yield one


def touch_all_memory(program: Path, megabytes: int) -> None:
    """The emulator has the guest's memory from its host at the first touch, three times slower than ever after."""
    SCRATCH.mkdir(exist_ok=True)
    (SCRATCH / "steps").write_text(f"0 {megabytes}\n")
    (SCRATCH / "gate").touch()
    subprocess.run([program, SCRATCH / "steps", SCRATCH / "gate", SCRATCH / "out"], check=True)


async def main(batch: Batch, program: Path) -> None:
    touch_all_memory(program, 3 * max(triple.budget_mb for triple in batch.triples) // 2)
    for triple in batch.triples:
        alone = await run_arm(triple, ALONE, batch.speed, 300.0, program)
        print(msgspec.json.encode(alone).decode(), flush=True)
        deadline = PATIENCE * max((tenant.seconds or 0.0) for tenant in alone.tenants)
        for name in random.Random(triple.number).sample(batch.arms, len(batch.arms)):
            run = await run_arm(triple, name, batch.speed, deadline, program)
            print(msgspec.json.encode(run).decode(), flush=True)


def entry(arguments: Sequence[str]) -> None:
    spec, program = map(Path, arguments)
    trio.run(main, msgspec.json.decode(spec.read_bytes(), type=Batch), program)


if __name__ == "__main__":
    entry(sys.argv[1:])
