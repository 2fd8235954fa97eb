"""create, start and delete of one container: three starts of a runtime, as an engine makes them, and the wait for its end.

The benchmark is the container's reaper, as conmon and containerd's shim are (PR_SET_CHILD_SUBREAPER); whoever is measured has the
same bundle, the same spawns and the same wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from agentrun_shim import native
from bench.bundle import make_bundle
from bench.contender import ENV, CallError, Contender
from bench.numbers import Report

OURS = "agentrun-oci create+start+delete"
_PR_SET_CHILD_SUBREAPER = 36
_numbers = itertools.count(1)


class Lifecycle(Contender):
    """A runtime by its path."""

    def __init__(self, name: str, program: str, scratch: Path, bundle: Path, options: Sequence[str] = ()) -> None:
        self.name = name
        self.note = "three processes, a fresh container for each call; no user namespace, no seccomp filter"
        if options:
            self.note += f"; {' '.join(options)}"
        self._front = [program, "--root", str(scratch / f"{Path(program).name}-life"), *options]
        self._bundle, self._pid_file = bundle, scratch / f"{Path(program).name}-pid"
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]

    async def call_alone(self) -> float:
        name = f"agentrun-bench-{os.getpid()}-{next(_numbers)}"
        started = perf_counter()
        self._verb("create", "--bundle", str(self._bundle), "--pid-file", str(self._pid_file), name)
        try:
            self._verb("start", name)
            os.waitpid(int(self._pid_file.read_text()), 0)
        finally:
            self._verb("delete", name)
        return perf_counter() - started

    def _verb(self, *arguments: str) -> None:
        argv = [*self._front, *arguments]
        pid = os.posix_spawn(argv[0], argv, ENV, file_actions=self._actions)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise CallError(f"{arguments[0]}: exit status {code}")


async def find_lifecycles(scratch: Path, report: Report) -> list[Contender]:
    """Ours, crun's and runc's, each tried once; the first way that works is measured, and said."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    bundle = make_bundle(scratch / "life")
    found: list[Contender] = []
    for name, program, ways in (
        (OURS, str(native.DIRECTORY / "agentrun-oci"), [()]),
        ("crun create+start+delete", shutil.which("crun"), [(), ("--cgroup-manager=disabled",)]),
        ("runc create+start+delete", shutil.which("runc"), [()]),
    ):
        error = "not installed"
        for options in ways if program and Path(program).exists() else []:
            contender = Lifecycle(name, str(program), scratch, bundle, options)
            try:
                await contender.call_alone()
            except (CallError, OSError, ValueError) as problem:
                error = str(problem)
                continue
            found.append(contender)
            break
        else:
            report.say(f"LEFT OUT {name}: {error}")
    with contextlib.suppress(ChildProcessError):  # what a failed trial left to us
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return found
