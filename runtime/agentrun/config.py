"""The daemon's configuration: /etc/agentrun/config.toml. Every key has a default, and an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from agentrun.errors import UsageError
from agentrun.executorconfig import ExecutorConfig
from agentrun.metrics import parse_address
from agentrun.policy import Limits
from agentrun.request import check_tenant
from agentrun.units import parse_size

DEFAULT_PATH = Path("/etc/agentrun/config.toml")
DEFAULT_SOCKET = "/run/agentrun/agentrun.sock"


class TenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tenant's budget, and who may call in its name."""

    memory: str | None = None
    """Bytes all its calls may use together, such as ``4G``."""
    pids: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """Processes and threads all its calls may have together; every warm sandbox has two."""
    cpus: Annotated[float, msgspec.Meta(ge=0.01, le=4096)] | None = None
    cpu_weight: Annotated[int, msgspec.Meta(ge=1, le=10000)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    """Whose bursts are granted first: what calls of a higher one may still take is set aside."""
    uids: list[int] = []
    """Users other than root who may name this tenant."""


class DaemonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    socket: str = DEFAULT_SOCKET
    group: str | None = None
    """A group whose members may connect (mode 0660); without it only root may (0600)."""
    max_running: Annotated[int, msgspec.Meta(ge=1)] = 64
    max_queued: Annotated[int, msgspec.Meta(ge=0)] = 1024
    pool_least: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Warm sandboxes kept for the default policy and tenant; other pairs that are in use keep at most one."""
    pool_most: Annotated[int, msgspec.Meta(ge=1)] = 32
    metrics: str | None = None
    """Where Prometheus finds us: ``127.0.0.1:9464``, or the path of a unix socket; nowhere unless it is set."""
    probes: bool = True
    """Run the probes process: programs in the kernel that see memory charged and time set-up. Without BCC it says so and ends."""
    phases: bool = True
    """Let it record the phases of sandboxes for ``agentrun lat``; a system call of anybody's takes 40 ns longer then."""
    sched: bool = False
    """Let it schedule short calls before long ones, where the kernel has sched_ext."""
    memory_budget: str | None = None
    """Bytes for all calls together, such as ``16G``; bursts are granted out of it."""
    tenants: dict[str, TenantConfig] = {}


def load_config(path: Path | None) -> DaemonConfig:
    """Read a file; without one, /etc/agentrun/config.toml if it exists.

    Raises:
        UsageError: it cannot be read, or a key or value is wrong; the message names file and key.
    """
    chosen = path or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    if chosen is None:
        return DaemonConfig()
    try:
        config = msgspec.toml.decode(chosen.read_bytes(), type=DaemonConfig)
        for name, tenant in config.tenants.items():
            check_tenant(name)
            _budget(name, tenant)
        if config.memory_budget is not None:
            parse_size(config.memory_budget, "memory_budget")
        if config.pool_least > config.pool_most:
            raise UsageError(f"pool_least ({config.pool_least}) is more than pool_most ({config.pool_most})")
        if config.metrics is not None:
            parse_address(config.metrics)
    except OSError as error:
        raise UsageError(f"{chosen}: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{chosen}: {error}") from error
    return config


def executor_config(config: DaemonConfig, name: str) -> ExecutorConfig:
    """What the daemon's executor is opened with."""
    return ExecutorConfig(
        name=name, max_running=config.max_running, max_queued=config.max_queued, pool_least=min(1, config.pool_least),
        pool_most=config.pool_most, tenant_limits={name: _budget(name, tenant) for name, tenant in config.tenants.items()},
        probes=config.probes,
        phases=config.phases,
        sched=config.sched,
        memory_budget=parse_size(config.memory_budget, "memory_budget") if config.memory_budget else None,
        tenant_priorities={name: tenant.priority for name, tenant in config.tenants.items() if tenant.priority},
    )  # fmt: skip


def _budget(name: str, tenant: TenantConfig) -> Limits:
    return Limits(
        memory_max=parse_size(tenant.memory, f"tenants.{name}.memory") if tenant.memory else None,
        memory_swap_max=None,
        pids_max=tenant.pids,
        cpus=tenant.cpus,
        cpu_weight=tenant.cpu_weight,
    )
