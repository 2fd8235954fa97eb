"""What a tool call may do: the resolved, frozen form of a policy.

Files become these types in ``policyfile``, names are looked up in ``policystore``; docs/policies.md is the description.
Nothing here touches the host. Sizes are bytes and times seconds; ``None`` is no limit.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agentrun.errors import UsageError
from agentrun.units import GIB, MIB

Network = Literal["none", "host", "egress"]
NETWORKS = ("none", "host", "egress")
Exhausted = Literal["kill", "stop", "throttle", "notify"]

MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list", "/proc/timer_stats",
)  # fmt: skip
"""Paths that show nothing: what the container engines mask of a /proc; there is no /sys in a sandbox but /sys/fs/cgroup."""
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a policy that a cgroup holds a call to."""

    memory_max: int | None = 2 * GIB
    """The leaf is killed as a whole beyond it."""
    memory_high: int | None = None
    """The steady budget: what is above it is a burst."""
    memory_swap_max: int | None = 0
    memory_burst: int | None = None
    """Bytes above ``memory_high`` that a call may use for ``burst_seconds``."""
    burst_seconds: float | None = None
    on_exhausted: Exhausted = "kill"
    """What happens when a burst has used up its allowance."""
    throttle_seconds: float = 2.0
    """How long a call may be throttled before it is frozen."""
    freeze_seconds: float = 10.0
    """How long it may be frozen before it is killed."""
    pids_max: int | None = 512
    """Processes and threads of one call."""
    cpus: float | None = None
    """Processors' worth of time, over periods of 100 ms."""
    cpu_burst: float | None = None
    """Seconds of processor time that may be saved up and spent above ``cpus``: cpu.max.burst."""
    cpu_weight: int | None = None
    """1 to 10000; 100 is the kernel's default."""
    io_weight: int | None = None
    """1 to 10000; 100 is the kernel's default."""


class Bind(msgspec.Struct, frozen=True):
    """A host directory or file that a sandbox shows besides its image."""

    source: str
    target: str
    mode: Literal["ro", "rw"] = "ro"


HOST = "host"


class Filesystem(msgspec.Struct, frozen=True, kw_only=True):
    """What a call sees and may write."""

    image: str = HOST
    """What the root is made of: ``host``, or an image of the store by its name or id."""
    root: Literal["ro", "scratch"] = "ro"
    """``scratch``: an image's root can be written to, ``scratch_size`` bytes; what is written is gone with the call."""
    workdir: str = ""
    """Where a call starts that has neither a workspace nor said where: the image's own word, as is the next."""
    entrypoint: tuple[str, ...] = ()
    """What stands before every command."""
    session: str = ""
    """The key of the session whose root and workspace a call has, if any: agentrun.session."""
    owners: tuple[int, int] = (0, 0)
    """The uid and gid that have in the sandbox what is root's in the image, which has theirs. No tool is root: the one that would
    be by its image's word owns what root would."""
    workspace: Literal["rw", "ro", "none"] = "rw"
    """The most a call may ask for."""
    binds: tuple[Bind, ...] = ()
    masked: tuple[str, ...] = MASKED
    """Files that read as empty, directories that are."""
    read_only: tuple[str, ...] = READ_ONLY
    file_size: int | None = None
    """The largest file a tool may write: RLIMIT_FSIZE."""
    landlock: bool = True
    """A second wall where the kernel has it: no writing but to the call's own directories and its workspace."""


class Egress(msgspec.Struct, frozen=True, kw_only=True):
    """The names a call may reach with the network ``egress``."""

    allow: tuple[str, ...] = ()
    """``host:port[,port]``, where the host may begin with ``*.``"""
    hosts: tuple[tuple[str, str], ...] = ()
    """Names with the address to take for them, instead of asking the host's resolver."""


class Rlimit(msgspec.Struct, frozen=True):
    """One resource limit, by its name in getrlimit(2) without RLIMIT_, small."""

    name: str
    soft: int | None
    hard: int | None


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """Who the tool is, and what it starts with."""

    uid: int = 1000
    gid: int = 1000
    groups: tuple[int, ...] = ()
    hostname: str = "sandbox"
    umask: int = 0o022
    oom_score_adj: int = 200
    """Above the host's own services, which get 0: a tool goes first. proc(5)."""
    rlimits: tuple[Rlimit, ...] = ()
    """Besides core 0 and nofile 1024:524288, and instead of those."""
    cpu_seconds: int | None = None
    """Processor time of each process: RLIMIT_CPU."""
    env_pass: tuple[str, ...] = ()
    """Variables copied from the environment of the daemon, or of the embedding program."""
    env_set: tuple[tuple[str, str], ...] = ()
    env_forbid: tuple[str, ...] = ()
    """Variables a caller may not set; a trailing ``*`` stands for any rest."""


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What the words of a memory hint stand for, in bytes."""

    low: int = 256 * MIB
    medium: int = GIB
    high: int = 8 * GIB


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool call may do."""

    name: str = "default"
    description: str = ""
    limits: Limits = Limits()
    timeout: float | None = 600.0
    """Seconds a call may take."""
    net: Network = "none"
    """``none``: a network of its own, only loopback. ``host``: the host's. ``egress``: the named hosts and nothing else."""
    egress: Egress = Egress()
    scratch_size: int = 512 * MIB
    """Bytes the call may write to its private /tmp, /home and /dev/shm together."""
    fs: Filesystem = Filesystem()
    process: Process = Process()
    seccomp: str = "default"
    """A shipped profile's name, or the path of one in OCI format."""
    hints: Hints = Hints()
    best_effort: bool = False
    """Run although a limit of this policy cannot be enforced; the result lists it."""
    insist: tuple[str, ...] = ()
    """Control files of limits the caller asked for besides, such as ``memory.max``: enforced, or the call is refused."""
    lenient: bool = False
    """Not refused: the caller said best effort as well. The policy's own word does not stand in for the caller's."""


NO_LIMITS = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
DEFAULT = Policy(description="Any tool, no network: what a call gets when nothing else is said.")


def parse_net(text: str) -> Network:
    """``none``, ``host`` or ``egress``.

    Raises:
        UsageError: anything else.
    """
    for known in NETWORKS:
        if text == known:
            return known  # type: ignore[return-value]
    raise UsageError(f"net: {text!r} is not known ({', '.join(NETWORKS[:-1])} or {NETWORKS[-1]})")
