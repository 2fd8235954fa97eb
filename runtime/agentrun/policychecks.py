"""What a policy must not say though its types allow it: contradictions, and paths that would open the wall.

Every check raises ``UsageError`` with the key, the value and what would be right. What only the host knows (does a source
exist, is it a socket, where does a link lead) is checked when a sandbox is built.
"""

from __future__ import annotations

import os
import re
import resource

from agentrun import policy as p
from agentrun.egress.rules import parse_rule, parse_rules
from agentrun.errors import UsageError
from agentrun.policytables import CpuTable, HintsTable, MemoryTable, ProcessTable
from agentrun.tomltext import show, show_key
from agentrun.units import MIB, show_size

RLIMITS = {
    name[len("RLIMIT_") :].lower(): getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")
} | {"locks": 10}  # fmt: skip
"""Name as in getrlimit(2), small and without RLIMIT_ → number."""
RLIMITS.pop("ofile", None)  # BSD's name for nofile

_NEVER_SOURCES = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot")
"""Host directories that would hand out the kernel's interfaces, the host's sockets, or its kernel."""
_SECRETS = ("/etc/shadow", "/etc/gshadow", "/etc/ssh", "/etc/ssl/private", "/root/.ssh")
"""Nor these, nor a directory that has them in it."""
_SYSTEM = ("/bin", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr")
"""Host directories that no tool may write to."""
_STANDS_ON = ("/proc", "/sys", "/dev", "/run/agentrun")
"""What a sandbox itself needs to see."""
_HOSTNAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_LONGEST_RULE = 512
"""Characters of a host name, which has 253, and its ports."""
_LEAST = MIB
"""Bytes below which a sandbox cannot even start."""
_LEAST_RLIMITS = {"as": MIB, "data": MIB, "nofile": 16, "stack": 64 << 10}
"""The same for limits of a process; tried out."""


def check_memory(limits: p.Limits, said: MemoryTable) -> None:
    """Memory limits that contradict each other, or that nothing could live in."""
    top, high, burst = limits.memory_max, limits.memory_high, limits.memory_burst
    # What the file did not say is the built-in default's.
    top_said, high_said = show(said.max or show_size(top or 0)), show(said.high)
    for key, size, text in (("memory.max", top, top_said), ("memory.high", high, high_said)):
        if size is not None and size < _LEAST:
            raise UsageError(f"{key}: {text} is less than a sandbox itself needs, 1M")
    if high is not None and top is not None and high > top:
        raise UsageError(f"memory.high: {high_said} is above memory.max, {top_said}; high is the steady part of max")
    if burst is None:
        if limits.burst_seconds is not None:
            raise UsageError(f"memory.burst_seconds: {limits.burst_seconds:g} needs memory.burst, how much it may be")
        return
    if high is None:
        raise UsageError(f"memory.burst: {show(said.burst)} is what may be used above memory.high, which is not set")
    if limits.burst_seconds is None:
        raise UsageError(f"memory.burst: {show(said.burst)} needs memory.burst_seconds, how long it may last")
    if top is not None and high + burst > top:
        raise UsageError(f"memory.burst: {show(said.burst)} above memory.high, {high_said}, is more than memory.max, {top_said}")


def check_cpu(limits: p.Limits, said: CpuTable) -> None:
    """A burst of processor time that the kernel would refuse."""
    if limits.cpu_burst is None:
        return
    if limits.cpus is None:
        raise UsageError(f'cpu.burst: {show(said.burst)} is saved up below cpu.max, which is not set (say burst = "none")')
    # In microseconds of a period of 100 ms, as cgroup.limits writes them.
    quota = max(1000, round(limits.cpus * 100_000))
    if round(limits.cpu_burst * 1e6) > quota:
        # tg_set_cfs_bandwidth, kernel/sched/core.c: the burst may not exceed the quota of one period.
        raise UsageError(f"cpu.burst: {show(said.burst)} is more than cpu.max, {show(said.max)}, gives in 0.1 s: {quota / 1e6:g}")


def check_hints(hints: p.Hints, said: HintsTable) -> None:
    """The words of a memory hint, in order."""
    for less, more in (("low", "medium"), ("medium", "high")):
        if getattr(hints, less) <= getattr(hints, more):
            continue
        # Complain about what the file says; the other may be the built-in default's.
        key, other, relation = (less, more, "above") if getattr(said, less) else (more, less, "below")
        bound = getattr(said, other) or show_size(getattr(hints, other))
        raise UsageError(f"hints.{key}: {show(getattr(said, key))} is {relation} hints.{other}, {show(bound)}")


def check_path(path: str, key: str) -> str:
    """An absolute, plain path inside the sandbox."""
    # normpath keeps a double slash at the front.
    plain = path.startswith("/") and path == os.path.normpath(path) and path[1:2] not in ("", "/")
    if not plain or "\0" in path or len(os.fsencode(path)) > 1024:
        raise UsageError(f"{key}: {show(path)} is not a plain absolute path below / (no '..', no '//', no '/' at the end)")
    return path


def check_hidden(paths: tuple[str, ...], key: str, *, masked: bool) -> None:
    """Paths that are made empty, or read-only: not what the sandbox itself stands on."""
    for number, path in enumerate(paths):
        check_path(path, f"{key}[{number}]")
        bad = _above_any(path, _STANDS_ON if masked else _STANDS_ON[-1:]) or _below_any(path, _STANDS_ON[-1:])
        if bad:
            raise UsageError(f"{key}[{number}]: {show(path)} would take away the sandbox's own {bad}; name something else")


def check_bind(bind: p.Bind, key: str, others: tuple[p.Bind, ...]) -> None:
    """A bind that may be made, after ``others``: it shows nothing that must not be shown, and hides neither them nor what a
    sandbox stands on.
    """
    check_path(bind.source, f"{key}.source")
    check_path(bind.target, f"{key}.target")
    if bad := _below_any(bind.source, _NEVER_SOURCES + _SECRETS) or _above_any(bind.source, _SECRETS):
        raise UsageError(f"{key}.source: {show(bind.source)} is never shown to a tool ({bad} is the host's own); bind another")
    if bind.mode == "rw" and (bad := _below_any(bind.source, _SYSTEM)):
        raise UsageError(f"{key}.source: {show(bind.source)} is never written by a tool ({bad} is the host's own); bind it ro")
    if bad := _below_any(bind.target, _STANDS_ON) or _above_any(bind.target, _STANDS_ON):
        raise UsageError(f"{key}.target: {show(bind.target)} would hide the sandbox's own {bad}; choose another place")
    for other in others:
        if bind.target == other.target:
            raise UsageError(f"{key}.target: {show(bind.target)} is bound twice; take one out")
        if _below_any(other.target, (bind.target,)):
            raise UsageError(
                f"{key}.target: {show(bind.target)} would hide {show(other.target)}, bound before; change their order"
            )


def _below_any(path: str, tops: tuple[str, ...]) -> str | None:
    """The one that ``path`` is, or is below."""
    return next((top for top in tops if path == top or path.startswith(top + "/")), None)


def _above_any(path: str, places: tuple[str, ...]) -> str | None:
    """The one that is ``path``, or is below it."""
    return next((place for place in places if _below_any(place, (path,))), None)


def check_env_name(name: str, key: str, *, wild: bool) -> None:
    """The name of a variable, where ``wild`` perhaps with a ``*`` for any rest."""
    plain = name[:-1] if wild and name.endswith("*") else name
    if (not plain and name != "*") or any(c in plain for c in "*=\0"):
        ending = ", perhaps with a * at its end" if wild else ""
        raise UsageError(f"{key}: {show(name)} is not the name of a variable (no '=', no NUL{ending})")


def check_env_value(value: str, key: str) -> None:
    """What a variable can be set to."""
    if "\0" in value:
        raise UsageError(f"{key}: {show(value)} contains a NUL, which no variable can")


def check_hostname(name: str) -> str:
    """A host name the kernel takes: at most 64 characters, labels of letters, digits and hyphens."""
    if len(name) > 64 or not _HOSTNAME.fullmatch(name):
        raise UsageError(f"process.hostname: {show(name)} is no host name (letters, digits, '-' and '.', at most 64)")
    return name


def check_rlimits(rlimits: tuple[p.Rlimit, ...], said: ProcessTable, file_size: int | None, cpu: int | None) -> None:
    """Limits something can live in, no soft limit above its hard one, and nothing said in two places."""
    for limit in rlimits:
        key = f"process.rlimits.{limit.name}"
        value = show(getattr(said.rlimits, "as_" if limit.name == "as" else limit.name))
        if limit.soft is not None and limit.soft < _LEAST_RLIMITS.get(limit.name, 0):
            raise UsageError(f"{key}: {value} is less than a sandbox itself needs, {_LEAST_RLIMITS[limit.name]}")
        if limit.hard is not None and (limit.soft is None or limit.soft > limit.hard):
            raise UsageError(f"{key}: {value} has its soft limit above the hard one; say [soft, hard]")
        if limit.name == "fsize" and file_size is not None:
            raise UsageError(f"{key}: {value} says again what fs.file_size says, {show_size(file_size)}; take one out")
        if limit.name == "cpu" and cpu is not None:
            raise UsageError(f"{key}: {value} says again what time.cpu says, {cpu}; take one out")


def check_egress(mode: p.Network, allow: list[str], hosts: dict[str, str]) -> None:
    """Names to reach, exactly where there is a way to reach names."""
    if mode != "egress":
        for key, given, nothing in (("net.allow", allow, "[]"), ("net.hosts", hosts, "{}")):
            if given:
                raise UsageError(f'{key}: {show(given)} needs net.mode = "egress", which is {show(mode)} (or say {nothing})')
    elif not allow:
        raise UsageError('net.allow: [] names nothing to reach; say allow = ["pkg.test:443"], or net.mode = "none"')
    for number, rule in enumerate(allow):
        if len(rule) > _LONGEST_RULE:
            raise UsageError(f"net.allow[{number}]: {show(rule)} is longer than a rule can be ({_LONGEST_RULE} characters)")
        parse_rule(rule, f"net.allow[{number}]")
    for name, address in hosts.items():
        key = f"net.hosts.{show_key(name)}"
        if len(name) + len(address) > _LONGEST_RULE:
            raise UsageError(f"{key}: {show(address)} belongs to a name longer than there can be one")
        parse_rules((), {name: address}, key)


def check_profile(profile: str) -> str:
    """A seccomp profile by name, or by a plain path; whether it is there is seen when it is loaded."""
    return check_path(profile, "seccomp.profile") if profile.startswith("/") else profile
