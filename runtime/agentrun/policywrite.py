"""A resolved policy back in the words of a file: every key spelled out, so that it loads to an equal policy by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET

from agentrun.policy import Policy, Rlimit
from agentrun.policytables import (
    BindTable,
    CpuTable,
    EnvTable,
    FsTable,
    HintsTable,
    IoTable,
    MemoryTable,
    NetTable,
    PidsTable,
    PolicyTables,
    ProcessTable,
    RlimitsTable,
    SeccompTable,
    TimeTable,
)
from agentrun.tomltext import write_document, write_key, write_value
from agentrun.units import show_size

_Value = TypeVar("_Value")


def write_policy(policy: Policy) -> str:
    """The policy as a TOML file. Under the policy's name it loads as an equal one, whatever else there is."""
    return write_document(_tree(policy))


def differences(old: Policy, new: Policy) -> list[tuple[str, str | None, str | None]]:
    """Key, value in ``old`` and value in ``new``, as TOML, where they differ; None where a free key is missing.

    Names and descriptions are left out: they do nothing.
    """
    first, second = dict(_flat(_tree(old), "")), dict(_flat(_tree(new), ""))
    keys = [*first, *(key for key in second if key not in first)]
    return [
        (key, first.get(key), second.get(key))
        for key in keys
        if key not in ("name", "description") and first.get(key) != second.get(key)
    ]


def _flat(tables: Mapping[str, Any], key: str) -> Iterator[tuple[str, str]]:
    for name, value in tables.items():
        path = f"{key}.{write_key(name)}" if key else write_key(name)
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        else:
            yield path, write_value(value)


def _tree(policy: Policy) -> dict[str, Any]:
    tree: dict[str, Any] = msgspec.to_builtins(tables_of(policy))
    return tree


def tables_of(policy: Policy) -> PolicyTables:
    """The complete tables of a policy: ``resolve`` makes them an equal policy, without regard to any default."""
    limits = policy.limits
    return PolicyTables(
        name=policy.name,
        description=policy.description,
        best_effort=policy.best_effort,
        memory=_memory(policy),
        cpu=CpuTable(max=_none(_whole(limits.cpus)), burst=_none(_whole(limits.cpu_burst)), weight=_none(limits.cpu_weight)),
        io=IoTable(weight=_none(limits.io_weight)),
        pids=PidsTable(max=_none(limits.pids_max)),
        time=TimeTable(timeout=_none(_whole(policy.timeout)), cpu=_none(policy.process.cpu_seconds)),
        fs=_filesystem(policy),
        net=NetTable(mode=policy.net, allow=list(policy.egress.allow), hosts=dict(policy.egress.hosts)),
        process=_process(policy),
        seccomp=SeccompTable(profile=policy.seccomp),
        hints=HintsTable(**{name: show_size(getattr(policy.hints, name)) for name in policy.hints.__struct_fields__}),
    )


def _memory(policy: Policy) -> MemoryTable:
    limits = policy.limits
    return MemoryTable(
        max=_size(limits.memory_max),
        high=_size(limits.memory_high),
        swap="0" if limits.memory_swap_max == 0 else _size(limits.memory_swap_max),
        burst=_size(limits.memory_burst),
        # There is no "none": it goes with the burst.
        burst_seconds=UNSET if limits.burst_seconds is None else _whole(limits.burst_seconds) or UNSET,
        on_exhausted=limits.on_exhausted,
        throttle_seconds=_whole(limits.throttle_seconds) or 0,
        freeze_seconds=_whole(limits.freeze_seconds) or 0,
    )


def _filesystem(policy: Policy) -> FsTable:
    fs = policy.fs
    return FsTable(
        image=fs.image,
        root=fs.root,
        workspace=fs.workspace,
        binds=[BindTable(source=bind.source, target=bind.target, mode=bind.mode) for bind in fs.binds],
        masked=list(fs.masked),
        read_only=list(fs.read_only),
        scratch=show_size(policy.scratch_size),
        file_size=_size(fs.file_size),
        landlock=fs.landlock,
    )


def _process(policy: Policy) -> ProcessTable:
    process = policy.process
    return ProcessTable(
        user=process.uid,
        group=process.gid,
        groups=list(process.groups),
        hostname=process.hostname,
        umask=f"{process.umask:03o}",
        oom_score_adj=process.oom_score_adj,
        rlimits=RlimitsTable(**{"as_" if limit.name == "as" else limit.name: _rlimit(limit) for limit in process.rlimits}),
        env=EnvTable(pass_=list(process.env_pass), set=dict(process.env_set), forbid=list(process.env_forbid)),
    )


def _rlimit(limit: Rlimit) -> int | Literal["none"] | list[int | Literal["none"]]:
    return _none(limit.soft) if limit.soft == limit.hard else [_none(limit.soft), _none(limit.hard)]


def _size(size: int | None) -> str:
    return "none" if size is None else show_size(size)


def _none(value: _Value | None) -> _Value | Literal["none"]:
    return "none" if value is None else value


def _whole(number: float | None) -> float | None:
    """600 rather than 600.0."""
    return int(number) if number is not None and number == int(number) else number
