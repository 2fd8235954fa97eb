"""A call's one pass: what a resolved request goes through until it has its result.

::

    turn     a place among the running calls, or in the bounded queue (``turns``)
    lease    a warm slot of (tenant, shape) (``fleet``); a cold one is built and the result says so
    leaf     the limits that differ from the shape's
    call     one message into the slot; wait for its pidfd, its streams, the deadline (``call``)
    end      kill what outlived the tool, read the leaf once, answer; the slot is taken down in the background

Nearly everything here is on the way of every call, and paid for by it.
"""

from __future__ import annotations

import os
from time import monotonic

import msgspec

from agentrun.call import Call, SlotDied
from agentrun.changes.keeping import Drafts, Keeping
from agentrun.deadlines import Deadlines
from agentrun.errors import HostError
from agentrun.fleet import Fleet
from agentrun.latency import Latency
from agentrun.request import Request
from agentrun.running import Running
from agentrun.stdio import Stdio
from agentrun.turns import Turns
from agentrun.types import Result


class Performer:
    """Carries out the requests of one executor."""

    def __init__(self, turns: Turns, fleet: Fleet, latency: Latency) -> None:
        self.turns = turns
        self.calls: dict[str, Call] = {}
        """Those that are in a slot, by its id."""
        self.deadlines = Deadlines()
        self._fleet, self._latency = fleet, latency
        self._governor, self._denials = fleet.governor, fleet.denials
        self._drafts = Drafts()

    async def perform(
        self, request: Request, stdio: Stdio, running: Running | None = None, *, begun: float | None = None
    ) -> Result:
        """Carry out a resolved request. ``begun`` is when the call was made; else now."""
        started = begun if begun is not None else monotonic()
        turns = self.turns
        if turns.running < turns.most:
            turns.running += 1
        else:
            await turns.wait()
        try:
            queued = monotonic()
            self._denials.running = turns.running
            if request.workspace_mode == "cow":
                async with self._drafts.keep(request) as keeping:
                    return await keeping.seal(await self._in_workspace(request, stdio, running, started, queued, keeping))
            return await self._in_workspace(request, stdio, running, started, queued)
        finally:
            turns.leave()
            self._denials.running = turns.running

    async def _in_workspace(
        self,
        request: Request,
        stdio: Stdio,
        running: Running | None,
        started: float,
        queued: float,
        keeping: Keeping | None = None,
    ) -> Result:
        mount_fd = -1 if request.workspace_fd < 0 else await self._mount(request, keeping)
        try:
            call = Call(request, stdio, mount_fd)
            call.started, call.queued = started, queued
            return await self._in_slot(call, running)
        finally:
            if mount_fd >= 0:
                os.close(mount_fd)

    async def _mount(self, request: Request, keeping: Keeping | None) -> int:
        mount_fd = await self._fleet.mount_workspace(
            request.workspace_fd, request.workspace_path, request.workspace_mode,
            owner=request.terms.owner, caller=request.caller, kept=-1 if keeping is None else keeping.fd,
        )  # fmt: skip
        if keeping is not None:
            await keeping.start()
        return mount_fd

    async def _in_slot(self, call: Call, running: Running | None) -> Result:
        message, fds = call.pack()
        terms = call.request.terms
        pool, plan = terms.pool, terms.plan
        if pool.closed:  # while this call waited for its turn, nobody used it
            pool = self._fleet.pool(call.request.tenant, terms.policy)
        while True:
            if call.request.session:
                pool, slot, call.warm = await self._fleet.lease_session(call.request.session, call.request.tenant, terms.policy)
            else:
                slot, call.warm = await pool.lease()
            call.leased = monotonic()
            if not call.warm:
                self._latency.cold(slot.leaf.id)
            try:
                if self.turns.closed:
                    raise HostError("the executor is closing")
                self.calls[slot.id] = call  # before it is sent: whoever closes the executor ends what is in here
                if slot.plan is not plan:
                    self._fleet.adjust(slot, plan)
                    pool.plan = plan
                self._governor.begin(slot.leaf, plan.limits)
                self._latency.used(slot.leaf.id)
                try:
                    await call.dispatch(slot, message, fds)
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it died while it waited, say by the tenant's memory limit: the next one
                if running is not None:
                    running.started(call)
                try:
                    result = await call.finish(self.deadlines, self._denials, self._governor)
                    if call.request.timings:
                        result = msgspec.structs.replace(result, phases=self._latency.phases(slot.leaf.id))
                    return result
                except SlotDied:
                    if running is not None:
                        raise  # its descriptors are not ours any more
            finally:
                self.calls.pop(slot.id, None)
                if call.request.session and not slot.leftovers():
                    slot.held.pop()()  # nothing writes to it any more: no need to wait until init is gone as well
                pool.release(slot)

    async def aclose(self) -> None:
        """End every call, and refuse those that wait or come."""
        self.turns.close()
        for call in self.calls.values():
            call.kill()
        await self.turns.wait_none()
