"""From the tables of a policy file to a ``Policy``: units become numbers, and what must not be is refused."""

from __future__ import annotations

import re
from typing import Literal, TypeVar

from msgspec import UNSET, UnsetType

from agentrun import policy as p
from agentrun.errors import UsageError
from agentrun.policychecks import (
    check_bind,
    check_cpu,
    check_egress,
    check_env_name,
    check_env_value,
    check_hidden,
    check_hints,
    check_hostname,
    check_memory,
    check_profile,
    check_rlimits,
)
from agentrun.policytables import FsTable, HintsTable, PolicyTables, ProcessTable, RlimitsTable, TimeTable
from agentrun.tomltext import printable, show, show_key
from agentrun.units import MIB, parse_size

_Value = TypeVar("_Value")
_NOTHING = re.compile(r"0+(\.0+)?\D*")


def resolve(tables: PolicyTables, where: str) -> p.Policy:
    """The policy that complete tables mean; what they leave open is the built-in default's.

    Raises:
        UsageError: a contradiction, or something that must not be; names ``where``, the key, the value and what would be right.
    """
    try:
        return _resolve(tables)
    except UsageError as error:
        raise UsageError(f"{where}: {printable(str(error))}") from None


def _resolve(t: PolicyTables) -> p.Policy:
    base = p.DEFAULT
    net = _given(t.net.mode, base.net)
    allow, hosts = _given(t.net.allow, []), _given(t.net.hosts, {})
    check_egress(net, allow, hosts)
    return p.Policy(
        name=t.name,
        description=t.description,
        limits=_limits(t),
        timeout=_or_none(t.time.timeout, base.timeout),
        net=net,
        egress=p.Egress(allow=tuple(allow), hosts=tuple(sorted(hosts.items()))),
        scratch_size=_scratch(t.fs.scratch, base.scratch_size),
        fs=_filesystem(t.fs),
        process=_process(t.process, t.time, _size(t.fs.file_size, "fs.file_size", None)),
        seccomp=check_profile(_given(t.seccomp.profile, base.seccomp)),
        hints=_hints(t.hints),
        best_effort=_given(t.best_effort, base.best_effort),
    )


def _limits(t: PolicyTables) -> p.Limits:
    base = p.DEFAULT.limits
    limits = p.Limits(
        memory_max=_size(t.memory.max, "memory.max", base.memory_max),
        memory_high=_size(t.memory.high, "memory.high", base.memory_high),
        memory_swap_max=_swap(t.memory.swap, base.memory_swap_max),
        memory_burst=_size(t.memory.burst, "memory.burst", base.memory_burst),
        # Whoever takes back a burst that was inherited takes back its time too.
        burst_seconds=None if t.memory.burst == "none" else _given(t.memory.burst_seconds, base.burst_seconds),
        on_exhausted=_given(t.memory.on_exhausted, base.on_exhausted),
        throttle_seconds=_given(t.memory.throttle_seconds, base.throttle_seconds),
        freeze_seconds=_given(t.memory.freeze_seconds, base.freeze_seconds),
        pids_max=_or_none(t.pids.max, base.pids_max),
        cpus=_or_none(t.cpu.max, base.cpus),
        cpu_burst=_or_none(t.cpu.burst, base.cpu_burst),
        cpu_weight=_or_none(t.cpu.weight, base.cpu_weight),
        io_weight=_or_none(t.io.weight, base.io_weight),
    )
    check_memory(limits, t.memory)
    check_cpu(limits, t.cpu)
    return limits


def _filesystem(t: FsTable) -> p.Filesystem:
    base = p.DEFAULT.fs
    masked, read_only = tuple(_given(t.masked, list(base.masked))), tuple(_given(t.read_only, list(base.read_only)))
    check_hidden(masked, "fs.masked", masked=True)
    check_hidden(read_only, "fs.read_only", masked=False)
    binds = tuple(p.Bind(b.source, _given(b.target, b.source), _given(b.mode, "ro")) for b in _given(t.binds, []))
    for number, bind in enumerate(binds):
        check_bind(bind, f"fs.binds[{number}]", binds[:number])
    return p.Filesystem(
        image=_given(t.image, base.image),
        root=_given(t.root, base.root),
        workspace=_given(t.workspace, base.workspace),
        binds=binds,
        masked=masked,
        read_only=read_only,
        file_size=_size(t.file_size, "fs.file_size", base.file_size),
        landlock=_given(t.landlock, base.landlock),
    )


def _process(t: ProcessTable, time: TimeTable, file_size: int | None) -> p.Process:
    base = p.DEFAULT.process
    passed, settings, forbidden = _given(t.env.pass_, []), _given(t.env.set, {}), _given(t.env.forbid, [])
    for number, name in enumerate(passed):
        check_env_name(name, f"process.env.pass[{number}]", wild=False)
    for number, name in enumerate(forbidden):
        check_env_name(name, f"process.env.forbid[{number}]", wild=True)
    for name, value in settings.items():
        check_env_name(name, "process.env.set", wild=False)
        check_env_value(value, f"process.env.set.{show_key(name)}")
    cpu_seconds = _or_none(time.cpu, base.cpu_seconds)
    rlimits = _rlimits(t.rlimits)
    check_rlimits(rlimits, t, file_size, cpu_seconds)
    return p.Process(
        uid=_given(t.user, base.uid),
        gid=_given(t.group, base.gid),
        groups=tuple(_given(t.groups, [])),
        hostname=check_hostname(_given(t.hostname, base.hostname)),
        umask=base.umask if t.umask is UNSET else int(t.umask, 8),
        oom_score_adj=_given(t.oom_score_adj, base.oom_score_adj),
        rlimits=rlimits,
        cpu_seconds=cpu_seconds,
        env_pass=tuple(passed),
        env_set=tuple(sorted(settings.items())),
        env_forbid=tuple(forbidden),
    )


def _rlimits(t: RlimitsTable) -> tuple[p.Rlimit, ...]:
    given = {name.rstrip("_"): getattr(t, name) for name in t.__struct_fields__}
    return tuple(_rlimit(name, value) for name, value in sorted(given.items()) if value is not UNSET)


def _rlimit(name: str, value: int | str | list[int | Literal["none"]]) -> p.Rlimit:
    soft, hard = value if isinstance(value, list) else (value, value)
    return p.Rlimit(name, *(None if isinstance(number, str) else number for number in (soft, hard)))


def _hints(t: HintsTable) -> p.Hints:
    given = {name: getattr(t, name) for name in t.__struct_fields__}
    hints = p.Hints(**{name: parse_size(text, f"hints.{name}") for name, text in given.items() if text is not UNSET})
    check_hints(hints, t)
    return hints


def _given(value: _Value | UnsetType, default: _Value) -> _Value:
    return default if isinstance(value, UnsetType) else value


def _or_none(value: _Value | Literal["none"] | UnsetType, default: _Value | None) -> _Value | None:
    if isinstance(value, UnsetType):
        return default
    return None if value == "none" else value


def _size(text: str | UnsetType, key: str, default: int | None) -> int | None:
    if isinstance(text, UnsetType):
        return default
    return None if text == "none" else parse_size(text, key)


def _swap(text: str | UnsetType, default: int | None) -> int | None:
    if isinstance(text, str) and _NOTHING.fullmatch(text):
        return 0
    return _size(text, "memory.swap", default)


def _scratch(text: str | UnsetType, default: int) -> int:
    if isinstance(text, UnsetType):
        return default
    size = parse_size(text, "fs.scratch")
    if size < MIB:
        raise UsageError(f"fs.scratch: {show(text)} is less than the sandbox's own directories need, 1M")
    return size
