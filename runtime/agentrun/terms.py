"""What a policy comes to for one tenant on this host: worked out on its first call, looked up on the others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from agentrun.burst.ladder import Mode
from agentrun.cgroup.limits import Plan
from agentrun.cgroup.tree import Tree
from agentrun.egress.rules import parse_rules
from agentrun.environment import BASE_ENV, env_pairs
from agentrun.errors import LimitError, UsageError
from agentrun.fleet import Fleet
from agentrun.hints import check_budget
from agentrun.policy import DEFAULT, Policy
from agentrun.pool import Pool
from agentrun.types import Unenforced

COUNTED = frozenset({"memory.max", "memory.high"})
"""What the programs in the kernel enforce where there is no memory controller."""
_KEPT = 1024
"""Pairs of policy and tenant that are remembered."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """A policy for a tenant, ready to be used."""

    policy: Policy
    plan: Plan
    """What its limits come to."""
    pool: Pool
    unenforced: tuple[Unenforced, ...]
    nproc: int
    """RLIMIT_NPROC; 0 is none. Each call brings its own: a slot that was built with one could be given less, but never more.

    Counted per user namespace since Linux 5.14 (commit 21d1c5e386bc), so it bounds this sandbox alone and holds where there is no
    pids controller.
    """
    owner: tuple[int, int]
    """The tool's uid and gid as the host sees them."""
    env: Mapping[bytes, bytes]
    entries: tuple[bytes, ...]
    """``env``, as execve takes it."""
    forbidden: tuple[bytes, ...]

    def environment(self, given: Mapping[str, str] | Sequence[bytes] | None) -> tuple[bytes, ...]:
        """The environment of a call: the policy's, with the caller's variables laid over it.

        Raises:
            UsageError: a variable that is none, or that the policy forbids.
        """
        if not given:
            return self.entries
        env = dict(self.env)
        for key, value in env_pairs(given):
            if self.forbidden and any(key == bad or (bad[-1:] == b"*" and key.startswith(bad[:-1])) for bad in self.forbidden):
                raise UsageError(f"environment variable {os.fsdecode(key)}: policy {self.policy.name} forbids to set it")
            env[key] = value
        return tuple(key + b"=" + value for key, value in env.items())


class TermsBook:
    """The terms of every policy and tenant that have met."""

    def __init__(self, tree: Tree, fleet: Fleet) -> None:
        self._tree, self._fleet = tree, fleet
        self._met: dict[tuple[int, str], Terms] = {}
        self._equal: dict[tuple[Policy, str, bool], Terms] = {}
        fleet.governor.on_mode = self.forget

    def forget(self) -> None:
        """What can be enforced has changed, or pools are gone."""
        self._met.clear()
        self._equal.clear()

    def find(self, policy: Policy, tenant: str, *, hinted: bool = False) -> Terms:
        """The terms of a policy for a tenant. A memory limit that comes from a hint is reported where it cannot be enforced,
        not refused: it was a hint.

        Raises:
            UsageError: the policy asks for more than the tenant has.
            LimitError: one of its limits cannot be enforced here.
            HostError: the tenant's cgroup could not be made.
        """
        # By identity first: hashing a policy takes longer than all the rest. The terms hold the policy, so its id stays its own.
        terms = self._met.get((id(policy), tenant))
        if terms is None or terms.policy is not policy:
            if len(self._equal) >= _KEPT:
                self.forget()
            terms = self._equal.get((policy, tenant, hinted))
            if terms is None:
                terms = self._equal[policy, tenant, hinted] = self._work_out(policy, tenant, hinted)
            if terms.policy is policy and not hinted:
                self._met[id(policy), tenant] = terms
        return terms

    def _work_out(self, policy: Policy, tenant: str, hinted: bool) -> Terms:
        limits = policy.limits
        plan = self._tree.plan(limits)
        missing = plan.missing
        if self._fleet.governor.mode is Mode.BPF:
            missing = tuple(item for item in missing if item.limit not in COUNTED)
        check_enforced(tuple(m for m in missing if not (hinted and m.limit.startswith("memory."))), policy, DEFAULT)
        check_budget(policy, DEFAULT, self._fleet.tenants.budget(tenant).memory_max, tenant)
        if policy.net == "egress":
            parse_rules(policy.egress.allow, policy.egress.hosts, f"policy {policy.name}: net.allow")
        env = _environment(policy)
        return Terms(
            policy=policy,
            plan=plan,
            pool=self._fleet.pool(tenant, policy),
            unenforced=missing,
            nproc=limits.pids_max or 0,
            owner=self._fleet.tenants.owner(tenant, policy),
            env=env,
            entries=tuple(key + b"=" + value for key, value in env.items()),
            forbidden=tuple(os.fsencode(name) for name in policy.process.env_forbid),
        )


def _environment(policy: Policy) -> dict[bytes, bytes]:
    process = policy.process
    env = dict(BASE_ENV)
    for name in process.env_pass:
        if name in os.environ:
            env[os.fsencode(name)] = os.environb[os.fsencode(name)]
    return env | {os.fsencode(key): os.fsencode(value) for key, value in process.env_set}


def check_enforced(missing: tuple[Unenforced, ...], policy: Policy, defaults: Policy) -> None:
    """A limit that was asked for and cannot be enforced is a refusal, unless the policy is best effort and only that asks for it.

    Raises:
        LimitError: naming the limit, the reason and the way out.
    """
    asked = set() if policy.lenient else set(policy.insist)
    if not policy.best_effort and policy.limits != defaults.limits:
        fields = LIMIT_FIELDS.items()
        asked |= {name for name, field in fields if getattr(policy.limits, field) != getattr(defaults.limits, field)}
    for item in missing:
        if item.limit in asked:
            raise LimitError(f"{item.limit} cannot be enforced here: {item.reason}; --best-effort runs without it")


LIMIT_FIELDS = {
    "memory.max": "memory_max", "cpu.max": "cpus", "cpu.max.burst": "cpu_burst", "cpu.weight": "cpu_weight",
    "io.weight": "io_weight", "pids.max": "pids_max", "memory.high": "memory_high", "memory.burst": "memory_burst",
}  # fmt: skip
