"""One tool call, checked and resolved: everything the executor needs to know, and nothing it has to doubt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from agentrun import rootfs
from agentrun.errors import LimitError, UsageError
from agentrun.policy import Policy
from agentrun.types import Unenforced
from agentrun.workspace import Mode

Text = str | bytes | os.PathLike[str]

BASE_ENV = {
    b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    b"HOME": rootfs.HOME.encode(),
    b"USER": rootfs.USER.encode(),
    b"LOGNAME": rootfs.USER.encode(),
    b"SHELL": b"/bin/sh",
    b"LANG": b"C.UTF-8",
}
"""The environment of every call; nothing of the daemon's or the caller's is in it unless named."""

_BASE_ENTRIES = tuple(key + b"=" + value for key, value in BASE_ENV.items())
TENANT_MAX = 64


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved tool call. Its descriptors belong to whoever made it."""

    argv: tuple[bytes, ...]
    env: tuple[bytes, ...]
    cwd: bytes
    policy: Policy
    timeout: float | None
    """Seconds; the caller's own, else the policy's."""
    tenant: str
    workspace_fd: int = -1
    workspace_path: str = ""
    workspace_mode: Mode = "rw"
    caller: tuple[int, int] = (0, 0)
    """The uid and gid whose rights the workspace is used with."""
    umask: int = 0o022


def encode_argv(argv: Sequence[Text]) -> tuple[bytes, ...]:
    """The command as the kernel takes it.

    Raises:
        UsageError: it is empty, a single string, or an argument contains a NUL.
    """
    if isinstance(argv, (str, bytes)):
        raise UsageError("argv is a list of arguments, not one string; for a shell say ['sh', '-c', ...]")
    # What os.fsencode does, without a call for each string: this is on the way of every call.
    result = tuple([a.encode("utf-8", "surrogateescape") if type(a) is str else os.fsencode(a) for a in argv])
    if not result or not result[0]:
        raise UsageError("there is no command to run")
    if b"\0" in b"".join(result):
        number, argument = next((n, text) for n, text in enumerate(result) if b"\0" in text)
        raise UsageError(f"argument {number} contains a NUL byte: {argument[:40]!r}")
    return result


def encode_env(overrides: Mapping[str, str] | Sequence[bytes] | None) -> tuple[bytes, ...]:
    """``BASE_ENV`` with the caller's variables laid over it.

    Raises:
        UsageError: a name is empty or contains ``=`` or NUL, or a value contains NUL.
    """
    if not overrides:
        return _BASE_ENTRIES
    env = dict(BASE_ENV)
    if isinstance(overrides, Mapping):
        pairs = [(os.fsencode(key), os.fsencode(value)) for key, value in overrides.items()]
    else:
        pairs = [(key, value) for key, _, value in (entry.partition(b"=") for entry in overrides)]
    for key, value in pairs:
        if not key or b"=" in key or b"\0" in key or b"\0" in value:
            raise UsageError(f"environment variable {key[:40]!r}: a name is not empty, without '=', and nothing has a NUL")
        env[key] = value
    return tuple(key + b"=" + value for key, value in env.items())


@lru_cache(1024)
def check_tenant(name: str) -> str:
    """A tenant's name as a cgroup directory can carry it.

    Raises:
        UsageError: it is empty, too long, or has other characters than letters, digits, ``-``, ``_`` and ``.``.
    """
    if not 0 < len(name) <= TENANT_MAX or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or name[0] == ".":
        raise UsageError(f"tenant: {name!r} is no name (letters, digits, '-', '_', '.'; at most {TENANT_MAX})")
    return name


def check_enforced(missing: tuple[Unenforced, ...], policy: Policy, defaults: Policy) -> None:
    """A limit the caller asked for that cannot be enforced is a refusal, unless it asked for best effort.

    Raises:
        LimitError: naming the limit, the reason and the way out.
    """
    if policy.best_effort or policy.limits == defaults.limits:
        return
    asked = {
        name for name, field in LIMIT_FIELDS.items() if getattr(policy.limits, field) != getattr(defaults.limits, field)
    }  # fmt: skip
    for item in missing:
        if item.limit in asked:
            raise LimitError(f"{item.limit} cannot be enforced here: {item.reason}; --best-effort runs without it")


LIMIT_FIELDS = {"memory.max": "memory_max", "cpu.max": "cpus", "cpu.weight": "cpu_weight", "pids.max": "pids_max"}
