"""Memory hints: what the agent says about a call's needs before it runs, in AgentCgroup's words (arXiv 2602.09345).

``memory:low``, ``memory:medium``, ``memory:high`` or ``memory:<N>g|m``, as ``AGENT_RESOURCE_HINT`` carries it; on the command
line also ``memory=high``. A hint asks; what the policy calls high, and the tenant's budget, are the most it gets.
"""

from __future__ import annotations

import msgspec

from agentrun.errors import UsageError
from agentrun.policy import Limits, Policy
from agentrun.types import Hint
from agentrun.units import parse_size, show_size


def apply_hint(policy: Policy, text: str, budget: int | None) -> tuple[Policy, Hint]:
    """The policy with the memory a hint asks for, at most ``budget`` bytes, the tenant's.

    Raises:
        UsageError: it is no hint.
    """
    kind, sign, value = text.strip().replace("=", ":", 1).partition(":")
    if kind != "memory" or not sign or not value:
        raise UsageError(f"hint: {text[:60]!r} is none (say memory:low, memory:medium, memory:high or memory:4g)")
    size = getattr(policy.hints, value) if value in ("low", "medium", "high") else parse_size(value, "hint: memory")
    bounds = {"policy": policy.hints.high, "tenant": budget}
    limit, clamped = min((most, who) for who, most in bounds.items() if most is not None)
    clamped_to = clamped if size > limit else None
    size = min(size, limit)
    hint = Hint(asked=f"memory:{value}", memory_max=size, clamped_to=clamped_to)
    return msgspec.structs.replace(policy, limits=with_memory(policy.limits, size)), hint


def with_memory(limits: Limits, size: int) -> Limits:
    """Limits with another ``memory_max``, bytes; the steady budget keeps its share of it, and the burst fits in the rest."""
    high = limits.memory_high
    if high is not None and limits.memory_max:
        high = max(1, size * high // limits.memory_max)
    burst = None if high is None or limits.memory_burst is None else min(limits.memory_burst, size - high) or None
    seconds = limits.burst_seconds if burst else None
    return msgspec.structs.replace(limits, memory_max=size, memory_high=high, memory_burst=burst, burst_seconds=seconds)


def check_budget(policy: Policy, default: Policy, budget: int | None, tenant: str) -> None:
    """A policy that asks for more memory than its tenant may use at all is an error. The built-in default asks for nothing, but
    who names its very number does.

    Raises:
        UsageError: naming both.
    """
    asked = policy.limits.memory_max
    if budget is None or asked is None or asked <= budget:
        return
    if asked == default.limits.memory_max and "memory.max" not in policy.insist:
        return
    raise UsageError(
        f"policy {policy.name}: memory.max: {show_size(asked)} is above the budget of tenant {tenant!r}, {show_size(budget)}"
    )
