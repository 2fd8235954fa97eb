"""agentrun itself as contenders: the library with and without its warm pool, and ``agentrun exec`` with a daemon.

The library is timed around ``await executor.run(["/bin/true"])`` with its defaults: both streams captured, the account read.
Sandboxes are refilled and taken down after the result, off the caller's clock but on the machine's: ``settle`` waits for that, so
that it falls on nobody else's call; in the throughput figures nothing waits, and it is part of what is measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter

import trio

from agentrun import AgentrunError, Executor, Result
from agentrun.cgroup.tree import PREFIX, find_base
from agentrun_shim import native
from bench import ROOT
from bench.contender import ENV, CallError, Contender, Program
from bench.numbers import Report

LIBRARY = "agentrun library"
LIBRARY_NULL = "agentrun library, no capture"
LIBRARY_COLD = "agentrun library cold"
EXEC = "agentrun exec"
_SETTLE_LIMIT = 10.0
_STEPS = ("leased", "dispatched", "first_exec", "total")


class Library(Contender):
    """``Executor.run`` of an open executor."""

    def __init__(self, executor: Executor, name: str = LIBRARY, *, capture: bool = True, note: str = "") -> None:
        self.name, self.note = name, note
        self.executor = executor
        self.cold = 0
        """Calls that found no warm sandbox."""
        self.unsettled = 0
        """Times the background work had not ended within the limit."""
        self.steps: dict[str, list[float]] = {step: [] for step in _STEPS}
        """What ``Result.timings`` said, milliseconds."""
        self._out = None if capture else os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)

    async def call_alone(self) -> float:
        started = perf_counter()
        try:
            result = await self.executor.run(["/bin/true"], stdout=self._out, stderr=self._out, timeout=30)
        except AgentrunError as error:
            raise CallError(str(error)) from error
        elapsed = perf_counter() - started
        self._count(result)
        return elapsed

    def remarks(self, *, cold_expected: bool = False) -> list[str]:
        """What a reader of the figures must know."""
        remarks = []
        if self.unsettled:
            remarks.append(f"{self.name}: background work had not ended within {_SETTLE_LIMIT:g} s, {self.unsettled} times")
        if self.cold and not cold_expected:
            remarks.append(f"{self.name}: {self.cold} of {len(self.steps['total'])} calls found no warm sandbox")
        if stuck := self.executor.statistics().stuck:
            remarks.append(f"{self.name}: {stuck} sandboxes could not be removed")
        return remarks

    def _count(self, result: Result) -> None:
        if not result.ok:
            raise CallError(f"{result.outcome}, exit code {result.exit_code}: {result.verdict}")
        self.cold += not result.warm
        for step, values in self.steps.items():
            value: float | None = getattr(result.timings, step)
            if value is not None:
                values.append(value * 1e3)

    async def settle(self) -> None:
        """Until the pool is full, nothing is being built, and every used sandbox has been removed."""
        await self.wait_full(removed=True)

    async def wait_full(self, *, removed: bool) -> None:
        """Until the pool is full; with ``removed`` also until the used sandboxes are gone, for which the leaves are listed."""
        deadline = trio.current_time() + _SETTLE_LIMIT
        while True:
            pools = self.executor.statistics().pools.values()
            full = all(pool.idle >= pool.target and not pool.building and not pool.waiting for pool in pools)
            if full and (not removed or count_leaves(self.executor.tree.path) == sum(pool.idle for pool in pools)):
                return
            if trio.current_time() > deadline:
                self.unsettled += 1
                return
            await trio.sleep(0.001)


class Client(Program):
    """``agentrun exec -- /bin/true``: the native client, spawned like any other program; the daemon is another process."""

    def __init__(self, socket_path: str, tree: Path) -> None:
        argv = [str(native.DIRECTORY / "agentrun"), "exec", "--", "/bin/true"]
        super().__init__(
            EXEC, lambda: argv, env={**ENV, "AGENTRUN_SOCKET": socket_path}, note="the native client and a warm daemon"
        )
        self._tree = tree

    async def settle(self) -> None:
        """The daemon's pool from outside: as many leaves as one call at a time needs (its target is two), and no change.

        After a burst it keeps more for a while; then no change for 25 ms has to do.
        """
        deadline = trio.current_time() + _SETTLE_LIMIT
        before, since = -1, trio.current_time()
        while (now := trio.current_time()) < deadline:
            count = count_leaves(self._tree)
            if count != before:
                before, since = count, now
            if now - since > (0.003 if count <= 2 else 0.025):
                return
            await trio.sleep(0.001)


def count_leaves(tree: Path) -> int:
    """The calls' cgroups in an agentrun's tree: idle, running and dying sandboxes."""
    count = 0
    for tenant in tree.glob("tenant-*"):
        with contextlib.suppress(FileNotFoundError):
            count += sum(name.startswith("call-") for name in os.listdir(tenant))
    return count


@contextlib.asynccontextmanager
async def open_client(scratch: Path, report: Report) -> AsyncIterator[Client | None]:
    """A daemon of our own for the time of the block and a client that reaches it; None, with a line, if it does not come up."""
    if not (native.DIRECTORY / "agentrun").exists():
        report.say(f"LEFT OUT {EXEC}: the native client is not built (make, or python -m agentrun_shim.native)")
        yield None
        return
    directory = tempfile.mkdtemp(dir=scratch)
    where, name = f"{directory}/socket", f"bench-{os.getpid()}"
    # Whatever happens to us, no daemon is left behind.
    leash = [shutil.which("setpriv") or "", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    config = Path(directory, "daemon.toml")
    # Its programs in the kernel would slow everybody in this run; what they cost is bench.overhead's to say.
    config.write_text("probes = false\n")
    command = [*leash, sys.executable, "-m", "agentrun.cli", "daemon", "--config", str(config), "--socket", where, "--name", name]
    path = os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "shim"), os.environ.get("PYTHONPATH", "")])
    log_path = Path(directory, "log")
    with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "w") as log:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            error = await _wait_listening(daemon, where)
            if not error:
                client = Client(where, find_base().path / f"{PREFIX}{name}")
                error = client.try_once(scratch)
            if error:
                said = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
                report.say(f"LEFT OUT {EXEC}: {error}" + (f"; the daemon said: {said[-1]}" if said else ""))
            yield None if error else client
        finally:
            _stop(daemon, report)


async def _wait_listening(daemon: subprocess.Popen[bytes], where: str, patience: float = 10.0) -> str:
    deadline = trio.current_time() + patience
    while trio.current_time() < deadline:
        if daemon.poll() is not None:
            return f"the daemon ended with exit status {daemon.returncode}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(where)
                return ""
            except OSError:
                await trio.sleep(0.05)
    return f"the daemon did not accept on its socket within {patience:g} s"


def _stop(daemon: subprocess.Popen[bytes], report: Report) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            report.say("NOTE the daemon did not end within 10 s of SIGTERM; killed")
            daemon.kill()
            daemon.wait()
