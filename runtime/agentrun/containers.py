"""Containers of other runtimes, whose OCI hook asks for control: governed, recorded, listed, let go of.

A record of each is kept beside the socket, so that the next daemon takes over what this one held (``containerrecords``): it finds
the cgroup by path and inode, and does not touch what is another one by now. A hook that found no daemon leaves one, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from time import monotonic, time
from typing import Any

import msgspec
import trio

from agentrun.burst.ladder import Mode, Rung
from agentrun.cgroup.foreign import Foreign
from agentrun.containerrecords import Record, Records
from agentrun.errors import AgentrunError, HostError, LimitError, UsageError
from agentrun.executor import Executor
from agentrun.hints import apply_hint
from agentrun.hookpolicy import container_files, governed, insisted, is_open
from agentrun.policy import Policy
from agentrun.protocol import Register
from agentrun.request import check_tenant
from agentrun.types import Unenforced
from agentrun_shim.hook_cgroup import HARMLESS, Merged, read_files, why_missing

LOOK = 1.0
"""Seconds between two looks at whether they are still there: a runtime that dies runs no poststop hook."""
MOST, MOST_OF_ONE = 4096, 256
_NAME = re.compile(r"[A-Za-z0-9_.+:-]{1,1024}")
_COUNTED = frozenset({"memory.max", "memory.high"})
_TOO_MANY = "programs in the kernel watch cgroups at four levels of the tree, and there are some at so many"
_log = logging.getLogger("agentrun")


class Container:
    """One that is under control."""

    def __init__(self, leaf: Foreign, record: Record, policy: Policy) -> None:
        self.leaf, self.record, self.policy = leaf, record, policy
        self.since = monotonic()
        self.unenforced: tuple[Unenforced, ...] = ()
        self.notes: list[str] = []
        self.limits = policy.limits
        """What the governor holds it to."""
        self.told = False
        """That it was killed."""


class Containers:
    """All of them, by the id of their cgroup."""

    def __init__(self, executor: Executor, socket: str) -> None:
        self._executor = executor
        self._records = Records(socket)
        self._known: dict[int, Container] = {}

    def __len__(self) -> int:
        return len(self._known)

    # ------------------------------------------------------------------ coming and going

    def register(self, request: Register, policy: Policy, tenant: str, uid: int, pid: int) -> dict[str, Any]:
        """Take control of a container; what the hook has to write to its cgroup.

        Raises:
            UsageError: it is none, or not the caller's.
            LimitError: a limit of its policy cannot be enforced here, and its policy or it wants that.
        """
        if not _NAME.fullmatch(request.id):
            raise UsageError(f"id: {request.id[:60]!r} is none")
        check_tenant(tenant)
        known = self._known.get(request.inode)
        if known is not None and (known.record.id, known.record.bundle) != (request.id, request.bundle):
            known = None
        if known is not None and request.started:
            self._check_owner(known.leaf, uid)
            return {"known": True, "open": is_open(known.policy, request.fail), "write": {}, "kept": {}, "unenforced": [],
                    "notes": []}  # fmt: skip
        if uid != 0 and sum(one.record.uid == uid for one in self._known.values()) >= MOST_OF_ONE:
            raise UsageError(f"user {uid} has {MOST_OF_ONE} containers registered, which is as many as one user may have")
        leaf = Foreign(request.cgroup, request.inode, request.id)
        try:
            self._check_owner(leaf, uid)
            self._check_place(leaf, pid)
            policy = self._hinted(policy, request.hint, tenant)
            before = known.record if known is not None else self._records.find(request.id, request.bundle, request.inode)
            if known is not None:
                self._drop(known)  # and what it had been granted is taken back
            wanted = container_files(policy.limits)
            found = read_files(leaf.fd, list(wanted))
            if (
                before is not None
            ):  # a cgroup that is used again, or a hook that did not wait: what we wrote is not the engine's word
                found |= {
                    name: before.found[name] for name, text in wanted.items() if name in before.found and found[name] == text
                }
            record = Record(
                id=request.id, bundle=request.bundle, cgroup=request.cgroup, inode=leaf.id, policy=request.policy, tenant=tenant,
                hint=request.hint, fail=request.fail, uid=uid, found=found,
            )  # fmt: skip
            container, merged = self._take(leaf, record, policy)
        except BaseException:
            leaf.close()
            raise
        if not request.started:
            self._executor.latency.register(leaf.id, f"container/{policy.name}")
        self._records.save(record)
        return {
            "known": False, "open": is_open(policy, request.fail), "write": merged.write, "kept": merged.kept,
            "unenforced": [[item.limit, item.reason] for item in container.unenforced], "notes": container.notes,
            "mode": self._executor.memory.governor.mode.value,
        }  # fmt: skip

    def _take(self, leaf: Foreign, record: Record, policy: Policy) -> tuple[Container, Merged]:
        governor = self._executor.memory.governor
        merged = Merged(record.found, container_files(policy.limits))
        counted = governor.mode is Mode.BPF
        unenforced = tuple(
            Unenforced(name, why_missing(leaf.fd, name))
            for name in merged.missing
            if name not in HARMLESS and not (counted and name in _COUNTED)
        )
        wanted = insisted(policy, record.fail)
        for item in unenforced:
            if item.limit in wanted:
                raise LimitError(f"policy {policy.name}: {item.limit} cannot be enforced: {item.reason}")
        if len(self._known) >= MOST:
            raise UsageError(f"{MOST} containers are registered, which is as many as can be")
        for other in list(self._known.values()):
            if other.leaf.id == leaf.id or (other.record.id, other.record.bundle) == (record.id, record.bundle):
                self._drop(other)
        container = Container(leaf, record, policy)
        container.limits, container.notes = governed(policy.limits, merged, record.found, counted=counted)
        if not governor.adopt(leaf, record.tenant, container.limits):
            if counted and _COUNTED & wanted:
                governor.forget(leaf)
                raise LimitError(f"policy {policy.name}: memory.max cannot be enforced: {_TOO_MANY}")
            if counted:
                unenforced += (Unenforced("memory.max", _TOO_MANY),)
            elif container.limits.memory_high is not None:
                container.notes.append(f"memory: the controller alone holds it: {_TOO_MANY}")
        container.unenforced = unenforced
        self._known[leaf.id] = container
        return container, merged

    def _hinted(self, policy: Policy, hint: str | None, tenant: str) -> Policy:
        if not hint:
            return policy
        budget = self._executor.config.tenant_limits.get(tenant)
        return apply_hint(policy, hint, budget.memory_max if budget else None)[0]

    def _check_owner(self, leaf: Foreign, uid: int) -> None:
        if uid not in (0, leaf.owner):
            raise UsageError(f"cgroup: {leaf.path} belongs to user {leaf.owner}, not to {uid}")

    def _check_place(self, leaf: Foreign, pid: int) -> None:
        """Neither a leaf of ours nor one that others are in: limits meant for a container would be a session's."""
        if leaf.path.is_relative_to(self._executor.tree.path) or self._executor.tree.path.is_relative_to(leaf.path):
            raise UsageError(f"cgroup: {leaf.path} is the daemon's own")
        for who in (pid, os.getpid()):
            if (cgroup := _cgroup_of(who)) is not None and leaf.contains(cgroup):
                raise UsageError(f"cgroup: {leaf.path} is not the container's alone: process {who} is in it")

    def unregister(self, name: str, bundle: str, uid: int) -> bool:
        """A container is gone, says its hook; whether it was known."""
        gone = [one for one in self._known.values() if (one.record.id, one.record.bundle) == (name, bundle)]
        for one in gone:
            if uid not in (0, one.record.uid):
                raise UsageError(f"container {name} was registered by user {one.record.uid}, not by {uid}")
            self._drop(one)
        return bool(gone)

    def _drop(self, container: Container) -> None:
        self._tell(container)
        del self._known[container.leaf.id]
        self._executor.memory.governor.release(container.leaf)
        self._executor.latency.forget(container.leaf.id)
        container.leaf.close()
        self._records.drop(container.record)

    def _tell(self, container: Container) -> None:
        reason = self._executor.memory.governor.killed(container.leaf)
        if reason and not container.told:
            container.told = True
            _log.warning("container %s (policy %s) was killed: %s", container.record.id, container.policy.name, reason)

    # ------------------------------------------------------------------ living

    async def run(self) -> None:
        """Take over what an earlier daemon or a hook without one left, then let go of what is gone, until cancelled."""
        self._adopt_all()
        self._executor.memory.governor.listeners.add(self._heard)
        try:
            while True:
                await trio.sleep(LOOK)
                for container in list(self._known.values()):
                    self._tell(container)
                    if container.leaf.is_gone():
                        self._drop(container)
        finally:
            # They go on without us, held to their limits; their records stay for the next daemon.
            self._executor.memory.governor.listeners.discard(self._heard)
            for container in self._known.values():
                self._executor.memory.governor.release(container.leaf)
                self._note_frozen(container, frozen=False)
                container.leaf.close()
            self._known.clear()
            self._records.close()

    def _heard(self, news: dict[str, Any]) -> None:
        """A step of memory control: what is frozen has to be known to whoever comes after us."""
        for container in self._known.values() if news["event"] == "step" else ():
            if container.record.id == news["call"]:
                self._note_frozen(container, frozen=news["rung"] == Rung.FROZEN)

    def _note_frozen(self, container: Container, *, frozen: bool) -> None:
        if container.record.frozen != frozen:
            container.record = msgspec.structs.replace(container.record, frozen=frozen)
            self._records.save(container.record)

    def _adopt_all(self) -> None:
        for record in self._records.all():
            try:
                self._adopt(record)
            except UsageError as error:
                if str(error).startswith("cgroup:"):
                    self._records.drop(record)  # it is gone, or another one has its place
                else:
                    _log.warning("container %s is not taken over: %s", record.id, error)
            except AgentrunError as error:
                _log.warning("container %s is not taken over: %s", record.id, error)

    def _adopt(self, record: Record) -> None:
        leaf = Foreign(record.cgroup, record.inode, record.id)
        try:
            self._check_owner(leaf, record.uid)
            self._check_place(leaf, 0)
            policy = self._hinted(self._executor.policies.find(record.policy), record.hint, record.tenant)
            container, _ = self._take(leaf, record, policy)
        except BaseException:
            leaf.close()
            raise
        # A daemon that was killed may have left it frozen, or with the memory it had been granted.
        if record.frozen:
            leaf.thaw()
            self._note_frozen(container, frozen=False)
        if container.limits.memory_high is not None and "memory" in leaf.controllers:
            with contextlib.suppress(HostError):
                leaf.write({"memory.high": str(container.limits.memory_high)})

    # ------------------------------------------------------------------ telling

    def _of(self, uid: int) -> list[Container]:
        return [one for one in self._known.values() if uid in (0, one.record.uid)]

    def rows(self, uid: int) -> list[dict[str, Any]]:
        """For ``agentrun ps``: those of a user; root sees all."""
        governor, latency = self._executor.memory.governor, self._executor.latency
        return [
            {
                "id": one.record.id, "tenant": one.record.tenant, "policy": one.policy.name, "cgroup": str(one.leaf.path),
                "seconds": monotonic() - one.since, "since": time() - (monotonic() - one.since),
                "unenforced": [{"limit": item.limit, "reason": item.reason} for item in one.unenforced], "notes": one.notes,
                "memory_mode": governor.mode.value, "killed": governor.killed(one.leaf) or None,
                "phases": latency.phases(one.leaf.id),
            }
            for one in self._of(uid)
        ]  # fmt: skip

    def usage(self, uid: int) -> list[dict[str, Any]]:
        """For ``agentrun top``."""
        rows = []
        for one in self._of(uid):
            memory = self._executor.memory.governor.row(one.leaf)
            if memory is not None and not one.leaf.is_gone():
                with contextlib.suppress(IndexError, ValueError, OSError):  # it went just now
                    name, tenant, policy = one.record.id, one.record.tenant, one.policy.name
                    rows.append({"call": name, "tenant": tenant, "policy": policy, "argv": ["container", policy],
                                 "seconds": monotonic() - one.since, **memory, **one.leaf.load()})  # fmt: skip
        return rows


def _cgroup_of(pid: int) -> str | None:
    try:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:]
    except OSError:
        pass
    return None
