"""Tenants: the host ids that a tenant's tools have, and what all its calls may use together."""

from __future__ import annotations

from agentrun.errors import HostError
from agentrun.executorconfig import FleetConfig
from agentrun.policy import NO_LIMITS, Limits, Policy
from agentrun.shape import ID_RANGE

_ID_END = 1 << 32


class Tenants:
    """The tenants of one executor. Who has called once keeps its range of ids for as long as the executor lives."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._numbers: dict[str, int] = {}
        """Of their ranges; 0 is that of strangers in workspaces."""

    def id_base(self, tenant: str) -> int:
        """The first host id of a tenant's range.

        Raises:
            HostError: there are more tenants than ranges.
        """
        base = self._config.id_base + self._numbers.setdefault(tenant, len(self._numbers) + 1) * ID_RANGE
        if base + ID_RANGE > _ID_END:
            raise HostError(f"no range of user ids is left for tenant {tenant!r} ({len(self._numbers)} have one)")
        return base

    def owner(self, tenant: str, policy: Policy) -> tuple[int, int]:
        """The tool's uid and gid as the host sees them."""
        base = self.id_base(tenant)
        return base + policy.process.uid, base + policy.process.gid

    def owns(self, uid: int) -> bool:
        """Whether a host uid is one of those that tools have, or strangers in their workspaces."""
        return 0 <= uid - self._config.id_base < (len(self._numbers) + 1) * ID_RANGE

    def budget(self, tenant: str) -> Limits:
        """What all calls of a tenant may use together."""
        return self._config.tenant_limits.get(tenant, NO_LIMITS)
