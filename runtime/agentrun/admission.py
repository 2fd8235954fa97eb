"""Admission: what a client of the daemon may ask for, by who he is, and what his request comes to.

The daemon is root, and whoever may connect is mostly not. The kernel says who he is; from that follow his tenant, the policies
and sessions he may name, and the rights his workspace is used with.
"""

from __future__ import annotations

import msgspec

from agentrun.config import DaemonConfig
from agentrun.errors import UsageError
from agentrun.executor import Executor
from agentrun.hints import with_memory
from agentrun.policy import Policy, parse_net
from agentrun.policystore import is_path
from agentrun.protocol import Exec, Options
from agentrun.request import Request
from agentrun.units import parse_number, parse_size
from agentrun.unixsocket import Peer


class Admission:
    """Judges requests for one executor."""

    def __init__(self, executor: Executor, config: DaemonConfig, *, private: bool) -> None:
        """``private``: there is one client, who started us where he is, for a single call."""
        self._executor, self._config, self._private = executor, config, private

    def check(self, peer: Peer) -> None:
        """Nobody who is a tool may ask for anything.

        Raises:
            UsageError: he is one.
        """
        if self._executor.owns(peer.uid):
            # It found our socket in its workspace. With another policy it would have what its own keeps from it.
            raise UsageError("a tool call may not ask for tool calls")

    def resolve(self, request: Exec, workspace_fd: int, peer: Peer) -> Request:
        """A client's call as the executor takes it.

        Raises:
            UsageError: it may not be, or cannot be.
        """
        options = request.options
        if options.session is not None and peer.uid != 0:
            raise UsageError("session: only root may use sessions, which are root's")
        return self._executor.resolver.resolve(
            request.argv,
            policy=apply_options(self.policy(options.policy, peer.uid), options),
            tenant=self.tenant(options.tenant, peer.uid),
            workspace_fd=workspace_fd,
            workspace_mode=options.workspace or "rw",
            cwd=options.cwd,
            env=request.env,
            hint=options.hint,
            image=options.image,
            session=options.session,
            timings=bool(options.timings),
            caller=(peer.uid, peer.gid),
        )

    def policy(self, name: str, uid: int) -> Policy:
        """A policy by name; by path only for root, because it is read with the daemon's rights.

        Raises:
            UsageError: there is none, or he may not name it so.
        """
        if uid != 0 and is_path(name):
            raise UsageError(f"policy: only root may name a file ({name}); a policy in /etc/agentrun/policies has a name")
        if not self._private and is_path(name) and not name.startswith("/"):
            raise UsageError(f"policy: {name} is a relative path, and the daemon is somewhere else; give the whole path")
        return self._executor.policies.find(name)

    def tenant(self, named: str | None, uid: int) -> str:
        """Root calls for any tenant; others for their own, ``uid-<number>``, and for those that list them.

        Raises:
            UsageError: he may not call for this one.
        """
        if uid == 0:
            return "default" if named is None else named
        own = own_tenant(uid)
        if named in (None, own):
            return own
        tenant = self._config.tenants.get(str(named))
        if tenant is None or uid not in tenant.uids:
            raise UsageError(f"tenant: user {uid} may not call for {named!r} (yours is {own})")
        return str(named)


def own_tenant(uid: int) -> str:
    """The tenant that a user other than root is."""
    return f"uid-{uid}"


def apply_options(policy: Policy, options: Options) -> Policy:
    """A policy with the command line's numbers laid over it.

    Raises:
        UsageError: naming the option and what would be right.
    """
    changes: dict[str, object] = {}
    limits: dict[str, object] = {}
    given = {"memory.max": options.memory, "cpu.max": options.cpus, "pids.max": options.pids}
    if options.memory is not None:
        policy = msgspec.structs.replace(policy, limits=with_memory(policy.limits, parse_size(options.memory, "--memory")))
    if options.cpus is not None:
        limits["cpus"] = parse_number(options.cpus, "--cpus", least=0.01, most=4096)
    if options.pids is not None:
        limits["pids_max"] = int(parse_number(options.pids, "--pids", least=1, most=4194304, whole=True))
    if options.timeout is not None:
        changes["timeout"] = parse_number(options.timeout, "--timeout", least=0.001, most=1e9)
    if options.net is not None:
        changes["net"] = net = parse_net(options.net)
        if net == "egress" and not policy.egress.allow:
            raise UsageError(f"--net: policy {policy.name} names no hosts for egress to reach (net.allow)")
    if insist := tuple(name for name, value in given.items() if value is not None):
        changes["insist"] = insist
    if options.best_effort:
        changes |= {"best_effort": True, "lenient": True}
    if limits:
        changes["limits"] = msgspec.structs.replace(policy.limits, **limits)
    return msgspec.structs.replace(policy, **changes) if changes else policy
