"""One call in one slot: dispatch, watch, and say how it ended. The pool and the queue are the executor's business."""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Sequence
from time import monotonic

import trio

from agentrun import denials
from agentrun.burst.entry import ABOVE_LIMIT
from agentrun.burst.governor import Governor
from agentrun.burst.ladder import Mode
from agentrun.burst.watch import Record
from agentrun.cgroup.leaf import LeafStats
from agentrun.deadlines import Deadlines
from agentrun.egress.ledger import Denial
from agentrun.errors import HostError, SandboxError, UsageError
from agentrun.policy import HOST
from agentrun.request import Request
from agentrun.slot import Slot
from agentrun.stdio import Stdio
from agentrun.types import Denied, Outcome, Result, Timings, Unenforced, Usage, Verdict
from agentrun.zygote import step_name
from agentrun_shim.plan import Event, PlanError, RunFlag, Step, pack_run

_KILLED_BY_FILTER = Verdict(
    reason="syscall",
    message="killed for a system call that its seccomp profile answers with death",
    advice="a 32-bit program, or one that needs another policy",
)
_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)


class SlotDied(HostError):
    """The sandbox was killed from outside before the tool could start; nothing has been run."""

    def __init__(self) -> None:
        super().__init__("the sandbox was killed before the tool could start; nothing was run, try again")


class Call:
    """A tool call from lease to result."""

    def __init__(self, request: Request, stdio: Stdio, mount_fd: int) -> None:
        self.request = request
        self.stdio = stdio
        self.slot: Slot | None = None
        self.started = monotonic()
        self.queued = self.leased = self.dispatched = 0.0
        self.warm = False
        self.cancelled = False
        self._signalled = self._timed_out = False
        self._mount_fd = mount_fd

    def pack(self) -> tuple[bytes, list[int]]:
        """The RUN message and its descriptors.

        Raises:
            UsageError: the command line and environment are longer than any kernel takes.
        """
        flags = int(RunFlag.TERMINAL) if self.stdio.terminal else 0
        fds = list(self.stdio.child)
        if self._mount_fd >= 0:
            flags |= RunFlag.ATTACH
            fds.append(self._mount_fd)
        request, terms = self.request, self.request.terms
        try:
            message = pack_run(
                request.argv, request.env, cwd=request.cwd, flags=flags, umask=terms.policy.process.umask, nproc=terms.nproc,
                attach=request.workspace_path.encode("utf-8", "surrogateescape"), nfds=len(fds),
            )  # fmt: skip
        except PlanError as error:
            raise UsageError(str(error)) from error
        return message, fds

    async def dispatch(self, slot: Slot, message: bytes, fds: list[int]) -> None:
        """Send the request into a slot; from here on the tool runs.

        Raises:
            BrokenPipeError: the slot died while it waited.
        """
        self.dispatched = monotonic()
        sent = slot.send(message, fds)
        self.slot = slot
        if sent < len(message):
            await slot.send_rest(message[sent:])
        self.stdio.close_child()

    def kill(self) -> None:
        """End the call now: everything in its leaf dies; the outcome is ``cancelled``."""
        self.cancelled = True
        if self.slot is not None:
            self.slot.leaf.kill()

    def send_signal(self, number: int) -> None:
        """Signal the tool's process group."""
        if self.slot is not None:
            self._signalled = True
            self.slot.signal_group(number)

    def describe(self) -> dict[str, object]:
        """One line of ``agentrun ps``."""
        argv = [argument.decode("utf-8", "replace") for argument in self.request.argv]
        return {"id": self.slot.id if self.slot else None, "tenant": self.request.tenant, "argv": argv,
                "seconds": monotonic() - self.started, "policy": self.request.terms.policy.name}  # fmt: skip

    def _expire(self) -> None:
        self._timed_out = True
        if self.slot is not None:
            self.slot.leaf.kill()

    async def finish(self, deadlines: Deadlines, refusals: denials.Denials, governor: Governor) -> Result:
        """Wait for the end, or make it at the deadline; then collect and account.

        On cancellation the leaf is killed and waited for before ``trio.Cancelled`` goes on.

        Raises:
            SandboxError: the sandbox failed before the tool could start.
            SlotDied: it was killed before.
        """
        slot = self.slot
        assert slot is not None
        if self.cancelled:
            slot.leaf.kill()
        timeout = self.request.timeout
        watch = None if timeout is None else deadlines.add(trio.current_time() + timeout, self._expire)
        try:
            await _wait_exit(slot.runner_pidfd, self.stdio)
        except trio.Cancelled:
            slot.leaf.kill()
            with trio.CancelScope(shield=True):
                await slot.wait_dead()
            raise
        finally:
            if watch is not None:
                watch.cancel()
        status, rss = slot.reap_nowait() or await slot.reap()
        ended = monotonic()
        if self.cancelled or self._timed_out or slot.leftovers():
            slot.leaf.kill()
            with trio.CancelScope(shield=True):
                await slot.wait_dead()
        self.stdio.finish()
        refused = [_denied_call(call) for call in refusals.take(slot.id)]
        if slot.network is not None:
            refused += [_denied_target(target) for target in slot.network.denied()]
        return self._result(status, ended, slot.leaf.stats(), rss, refused, governor.end(slot.leaf), *slot.report())

    def _result(
        self,
        status: int,
        ended: float,
        stats: LeafStats,
        rss: int,
        refused: Sequence[Denied],
        memory: Record,
        first_exec: float | None,
        failed: Event | None,
    ) -> Result:
        outcome, exit_code, number, verdict = self._outcome(status, stats, failed, memory)
        if outcome is Outcome.SIGNALED and first_exec is None and not self._signalled:
            raise SlotDied
        peak, source = stats.memory_peak, "memory.peak"
        if peak is None:
            peak, source = (rss, "rusage") if memory.peak is None else (memory.peak, "bpf")
        captures, begun = self.stdio.captures, self.started
        return Result(
            id=self.slot.id if self.slot else "",
            outcome=outcome,
            exit_code=exit_code,
            signal=number,
            stdout=captures["stdout"].content() if "stdout" in captures else None,
            stderr=captures["stderr"].content() if "stderr" in captures else None,
            truncated=any(capture.truncated for capture in captures.values()),
            usage=Usage(
                wall=round(ended - (first_exec or self.dispatched), 6),
                cpu_user=stats.cpu_user,
                cpu_system=stats.cpu_system,
                memory_peak=peak,
                memory_source=source,
                io_read=stats.io_read,
                io_written=stats.io_written,
                pids_peak=stats.pids_peak,
                throttled=stats.throttled,
            ),
            timings=Timings(
                queued=round(self.queued - begun, 6),
                leased=round(self.leased - begun, 6),
                dispatched=round(self.dispatched - begun, 6),
                first_exec=None if first_exec is None else round(first_exec - begun, 6),
                total=round(monotonic() - begun, 6),
            ),
            warm=self.warm,
            verdict=verdict,
            unenforced=self._unenforced(memory),
            denied=tuple(refused),
            hint=self.request.hint,
            memory_mode=memory.mode.value,
            bursts=tuple(memory.steps),
        )

    def _unenforced(self, memory: Record) -> tuple[Unenforced, ...]:
        """What the host could not enforce, or for a part of the call only."""
        terms = self.request.terms
        if not memory.lost or memory.mode is not Mode.NONE:
            return terms.unenforced
        limits = (("memory.max", terms.plan.limits.memory_max), ("memory.high", terms.plan.limits.memory_high))
        known = {item.limit for item in terms.unenforced}
        reason = "the probes process was away while the call ran"
        return terms.unenforced + tuple(Unenforced(name, reason) for name, size in limits if size and name not in known)

    def _outcome(
        self, status: int, stats: LeafStats, failed: Event | None, memory: Record
    ) -> tuple[Outcome, int | None, int | None, Verdict | None]:
        code = os.waitstatus_to_exitcode(status)
        exit_code, number = (code, None) if code >= 0 else (None, -code)
        if failed is not None:
            return Outcome.FAILED_TO_START, _start_code(failed), None, _start_verdict(failed, self.request)
        if memory.killed:
            return Outcome.MEMORY_KILLED, None, signal.SIGKILL, self._burst_verdict(memory)
        if stats.oom_kills:
            return Outcome.MEMORY_KILLED, None, signal.SIGKILL, self._memory_verdict(stats)
        if self._timed_out:
            message = f"killed after {self.request.timeout:g} s"
            advice = "give it more time, or do less in one call; run long-lived servers outside a tool call"
            return Outcome.TIMED_OUT, None, number, Verdict(reason="timeout", message=message, advice=advice)
        if self.cancelled:
            verdict = Verdict(reason="cancelled", message="killed on request", advice="run it again if it is still wanted")
            return Outcome.CANCELLED, None, number, verdict
        filtered = _KILLED_BY_FILTER if number == signal.SIGSYS and not self._signalled else None
        return (Outcome.SIGNALED if number else Outcome.EXITED), exit_code, number, filtered

    def _burst_verdict(self, memory: Record) -> Verdict:
        limits = self.request.terms.plan.limits
        high, burst, peak = limits.memory_high, limits.memory_burst, memory.peak
        if high is None or memory.killed == ABOVE_LIMIT:
            high, burst = limits.memory_max, None
        budget = f"{high} bytes"
        if burst:
            budget += f", and {burst} more for {limits.burst_seconds:g} s"
        used = "" if peak is None else f"; this call's peak was {peak} bytes"
        advice = "ask for more memory (--hint memory=high, another policy), or do the work in smaller pieces"
        return Verdict(reason="memory", message=f"killed: {memory.killed} ({budget}){used}", advice=advice)

    def _memory_verdict(self, stats: LeafStats) -> Verdict:
        peak = "" if stats.memory_peak is None else f"; this call's peak was {stats.memory_peak} bytes"
        if stats.ooms:
            message = f"killed at its memory limit, {self.request.terms.policy.limits.memory_max} bytes{peak}"
            advice = "ask for more memory, or do the work in smaller pieces (fewer parallel jobs, part of the data)"
        else:
            message = f"killed because the tenant's memory budget, or the host's memory, ran out{peak}"
            advice = "run fewer calls at once; this one may not be the one that used the most"
        return Verdict(reason="memory", message=message, advice=advice)


def _denied_call(call: denials.Denied) -> Denied:
    reason = "logged" if call.errno is None else errno.errorcode.get(call.errno, str(call.errno))
    return Denied(kind="syscall", what=call.syscall, reason=reason, count=call.count)


def _denied_target(target: Denial) -> Denied:
    return Denied(kind="network", what=target.target, reason=target.reason, count=target.count)


async def _wait_exit(pidfd: int, stdio: Stdio) -> None:
    """Wait until the tool has exited, reading what it writes meanwhile: one epoll, one task, however many streams."""
    epoll = stdio.epoll
    if epoll is None:
        await trio.lowlevel.wait_readable(pidfd)
        return
    by_fd = {capture.fd: capture for capture in stdio.captures.values()}
    epoll.register(pidfd, select.EPOLLIN)
    while True:
        await trio.lowlevel.wait_readable(epoll.fileno())
        ready = [fd for fd, _ in epoll.poll(0)]
        for fd in ready:
            if fd != pidfd:
                by_fd[fd].drain()
        if pidfd in ready:
            return


def _start_code(event: Event) -> int:
    return 127 if event.step is Step.EXEC and event.error in _NOT_FOUND else 126


def _start_verdict(event: Event, request: Request) -> Verdict:
    """Words for a tool that never started.

    Raises:
        SandboxError: it was not the command's or the working directory's fault.
    """
    reason = os.strerror(event.error)
    if event.step is Step.EXEC:
        name = request.argv[0].decode("utf-8", "replace")
        advice = (
            "is it installed in the image, and on PATH?" if event.error in _NOT_FOUND else "is it an executable for this machine?"
        )
        if event.error == errno.E2BIG:
            advice = "the kernel takes 2 MiB of arguments and environment, 128 KiB in one of them: pass the data in a file"
        return Verdict(reason="start", message=f"{name}: {reason}", advice=advice)
    if event.step is Step.WORKING_DIRECTORY:
        path = request.cwd.decode("utf-8", "replace")
        return Verdict(reason="start", message=f"working directory {path}: {reason}", advice="name a directory of the sandbox")
    detail = ""
    if event.step is Step.WORKSPACE:
        detail = request.workspace_path
        if event.error in (*_NOT_FOUND, errno.EROFS):
            if request.terms.policy.fs.image == HOST:
                detail += (
                    " is not in the sandbox's view of the host; if it, or its file system, is newer than agentrun, restart that"
                )
            else:
                detail += " cannot be in this image, which is read-only and has something else of its own there"
    raise SandboxError(step_name(event.step), event.error, detail)
