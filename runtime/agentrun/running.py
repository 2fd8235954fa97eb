"""A call that runs: its streams, signals and result, for those who do not just wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from agentrun.call import Call
from agentrun.errors import AgentrunError
from agentrun.nursery import open_plain_nursery
from agentrun.request import Request
from agentrun.stdio import Stdio
from agentrun.types import Result

Perform = Callable[[Request, Stdio, "Running"], Awaitable[Result]]


class Running:
    """A call that runs. Its streams are trio's; ``None`` where the call has no pipe of that name."""

    def __init__(self) -> None:
        self.stdin: trio.abc.SendStream | None = None
        self.stdout: trio.abc.ReceiveStream | None = None
        self.stderr: trio.abc.ReceiveStream | None = None
        self._call: Call | None = None
        self.interrupted = 0
        """The signal that ended the call while it waited for its turn."""
        self._begun = trio.Event()
        self._ended = trio.Event()
        self._result: Result | None = None
        self._error: AgentrunError | None = None
        self.on_dispatched: Callable[[], None] | None = None
        """Called once the tool has its descriptors."""

    @property
    def id(self) -> str:
        """The call's name."""
        return self._call.slot.id if self._call and self._call.slot else ""

    async def wait(self) -> Result:
        """Wait for the call to end.

        Raises:
            HostError: the sandbox failed before the tool could start.
        """
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def send_signal(self, number: int) -> bool:
        """Signal the tool's process group; False if the call still waits for its turn. Nothing happens if it has ended."""
        if self._call is None:
            return False
        if not self._ended.is_set():
            self._call.send_signal(number)
        return True

    def kill(self) -> None:
        """End the call: everything in its leaf dies, the outcome is ``cancelled``. Nothing happens if it has ended."""
        if self._call is not None and not self._ended.is_set():
            self._call.kill()

    async def aclose(self) -> None:
        """Close the streams. Also where this is being cancelled: that must neither leave one open nor hide why."""
        with trio.CancelScope(shield=True):
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:
                    await trio.aclose_forcefully(stream)

    def started(self, call: Call) -> None:
        """The executor's word that the tool has its descriptors."""
        self._call = call
        if self.on_dispatched is not None:
            self.on_dispatched()
        self._begun.set()

    async def run(
        self, perform: Perform, request: Request, stdio: Stdio, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Carry the call out; ready when it has been dispatched."""
        async with open_plain_nursery() as nursery:
            nursery.start_soon(self._perform, perform, request, stdio)
            await self._begun.wait()
            if self._error is not None and self._call is None:
                raise self._error
            for name in tuple(stdio.parent):
                setattr(self, name, trio.lowlevel.FdStream(stdio.give_parent(name)))
            task_status.started()

    async def _perform(self, perform: Perform, request: Request, stdio: Stdio) -> None:
        try:
            self._result = await perform(request, stdio, self)
        except AgentrunError as error:
            self._error = error
        finally:
            self._ended.set()
            self._begun.set()
