"""``python -m bench.sessions``: how long it takes to fork a session and to roll one back, beside podman and cp.

The image has 1 GB in 20,000 files, and a call has written 50 MB in 500 files above it. agentrun's figures end when the fork is
there, and when its first call has returned; podman's when ``podman commit`` and ``podman create`` have, which make another
container of one; cp's when all of it has been copied. Order drawn anew for each round; what was made is removed between two.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter

import msgspec
import trio

from agentrun import Executor, ExecutorConfig, open_executor
from agentrun.image.store import Store
from bench.images import call, podman, remove
from bench.machine import describe, wait_quiet
from bench.numbers import Report, cell, summarize
from tests.image.big import FILES, SIZE, write_tar

WRITE = "mkdir /new; for n in $(busybox seq 500); do busybox dd if=/dev/urandom of=/new/$n bs=100k count=1 2>/dev/null; done"
RARE = 4
"""Only every so many-th round has those that take seconds."""


class Lab:
    """A session in which a call has written, and the same as podman has it."""

    def __init__(self, scratch: Path, executor: Executor, has_podman: bool) -> None:
        self.scratch, self.executor, self.has_podman = scratch, executor, has_podman
        self.podman = podman(scratch)  # which takes no longer path than this
        self.session = ""
        self._number = 0

    async def prepare(self) -> None:
        """Take in the image, and write."""
        tar = self.scratch / "image.tar"
        write_tar(tar, FILES, SIZE)
        Store().import_image(str(tar), "big")
        self.session = self.executor.sessions.create(image="big").id
        result = await self.executor.run(["sh", "-c", WRITE], session=self.session)
        assert result.ok, result
        self.executor.sessions.snapshot(self.session)
        if self.has_podman:
            call([*self.podman, "import", "--quiet", str(tar), "localhost/big:1"])
            new = self.scratch / "new"
            new.mkdir()
            for number in range(500):
                (new / str(number)).write_bytes(os.urandom(100_000))
            call([*self.podman, "create", "--name", "base", "localhost/big:1", "sh"])
            call([*self.podman, "cp", str(new), "base:/new"])
        tar.unlink()

    async def first_call(self) -> float:
        """The first call a tenant makes with the image: nothing of it is warm."""
        self._number += 1
        started = perf_counter()
        result = await self.executor.run(["true"], image="big", tenant=f"t{self._number}")
        took = perf_counter() - started
        assert result.ok, result
        return took

    async def fork(self) -> float:
        """Fork, and remove it."""
        started = perf_counter()
        fork = self.executor.sessions.fork(self.session)
        took = perf_counter() - started
        self.executor.sessions.remove(fork.id)
        self.executor.sessions.prune()
        return took

    async def fork_and_call(self) -> float:
        """Fork, and a call in the fork."""
        started = perf_counter()
        fork = self.executor.sessions.fork(self.session)
        result = await self.executor.run(["ls", "/new/500"], session=fork.id)
        took = perf_counter() - started
        assert result.ok, result
        self.executor.sessions.remove(fork.id)
        self.executor.sessions.prune()
        return took

    async def rollback(self) -> float:
        """A call that writes and removes, and back to before it."""
        result = await self.executor.run(["sh", "-c", "rm -r /new; echo x > /bin/added"], session=self.session)
        assert result.ok, result
        started = perf_counter()
        self.executor.sessions.rollback(self.session)
        took = perf_counter() - started
        self.executor.sessions.prune()
        return took

    async def copy(self) -> float:
        """Copy what the session sees: the layers of the image and its own."""
        target = self.scratch / "copy"
        with Store().lease("big") as lease:
            session = self.executor.sessions.get(self.session)
            trees = [*lease.layers, *(self.executor.sessions.layer(name) / "root/upper" for name in session.layers)]
            target.mkdir()
            started = perf_counter()
            for tree in trees:
                await trio.to_thread.run_sync(functools.partial(call, ["cp", "-a", f"{tree}/.", str(target)]))
            took = perf_counter() - started
        await trio.to_thread.run_sync(remove, target)
        return took

    async def podman_fork(self) -> float:
        """podman: an image of the container, and a container of that."""
        started = perf_counter()
        for words in (["commit", "--quiet", "base", "localhost/forked"], ["create", "--name", "fork", "localhost/forked", "sh"]):
            await trio.to_thread.run_sync(functools.partial(call, [*self.podman, *words]))
        took = perf_counter() - started
        for words in (["rm", "fork"], ["rmi", "localhost/forked"]):
            await trio.to_thread.run_sync(functools.partial(call, [*self.podman, *words]))
        return took


async def measure(rounds: int, scratch: Path, report: Report, seed: int, has_podman: bool) -> dict[str, list[float | None]]:
    """Everybody, in turns."""
    async with open_executor(ExecutorConfig(pool_most=4)) as executor:
        lab = Lab(scratch, executor, has_podman)
        await lab.prepare()
        await executor.run(["true"])
        often: dict[str, Callable[[], Awaitable[float]]] = {
            "first call of a tenant with the image": lab.first_call,
            "session fork": lab.fork,
            "session fork, and a call in it": lab.fork_and_call,
            "session rollback": lab.rollback,
        }
        rare: dict[str, Callable[[], Awaitable[float]]] = {"cp -a": lab.copy}
        if has_podman:
            rare["podman commit and create"] = lab.podman_fork
        report.say(f"{FILES} files, {SIZE / 1e6:.0f} MB, and 50 MB written; {rounds} rounds; seed {seed}")
        order, samples = random.Random(seed), defaultdict[str, list[float | None]](list)
        for number in range(rounds):
            turn = list((often | rare if number % RARE == 0 else often).items())
            order.shuffle(turn)
            for name, subject in turn:
                samples[name].append(1000 * await subject())
        return samples


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sessions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="of what takes milliseconds (40)")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="a disk with 6 GB free (/var/tmp)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    report, machine = Report(), describe()
    report.say(f"# sessions, {machine.started}: Linux {machine.kernel}, {machine.processors} x {machine.model}")
    report.say(trio.run(wait_quiet, machine, "sessions"))
    has_podman = subprocess.run(["which", "podman"], check=False, capture_output=True).returncode == 0
    if not has_podman:
        report.say("LEFT OUT podman: not installed")
    with tempfile.TemporaryDirectory(prefix="agentrun-bench-sessions-", dir=options.scratch) as name:
        os.environ.update(AGENTRUN_IMAGES=f"{name}/images", AGENTRUN_SESSIONS=f"{name}/sessions")
        samples = trio.run(measure, options.rounds, Path(name), report, options.seed, has_podman)
        subprocess.run(["umount", "-q", f"{name}/storage/overlay"], check=False, capture_output=True)
    rows = []
    for subject, found in samples.items():
        summary = summarize(found)
        if summary is not None:
            rows.append([subject, str(summary.count), *(cell(value) for value in (summary.p50, summary.p99, summary.max))])
    report.say()
    report.table(["ms", "n", "p50", "p99", "max"], rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sessions.json").write_bytes(msgspec.json.encode({"machine": machine, "samples": samples}))
    report.write(options.out / "sessions.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
