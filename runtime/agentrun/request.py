"""One tool call, checked and resolved: everything the executor needs to know, and nothing it has to doubt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from agentrun.errors import UsageError
from agentrun.terms import Terms
from agentrun.types import Hint
from agentrun.workspace import Mode

Text = str | bytes | os.PathLike[str]

TENANT_MAX = 64


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved tool call. Its descriptors belong to whoever made it."""

    argv: tuple[bytes, ...]
    env: tuple[bytes, ...]
    cwd: bytes
    terms: Terms
    timeout: float | None
    """Seconds; the caller's own, else the policy's."""
    tenant: str
    workspace_fd: int = -1
    workspace_path: str = ""
    workspace_mode: Mode = "rw"
    caller: tuple[int, int] = (0, 0)
    """The uid and gid whose rights the workspace is used with."""
    session: str = ""
    """The key of its session, if it has one."""
    hint: Hint | None = None
    timings: bool = False
    """The result is to have its phases."""


def encode_argv(argv: Sequence[Text]) -> tuple[bytes, ...]:
    """The command as the kernel takes it.

    Raises:
        UsageError: it is empty, a single string, or an argument is no text or contains a NUL.
    """
    if isinstance(argv, (str, bytes)):
        raise UsageError("argv is a list of arguments, not one string; for a shell say ['sh', '-c', ...]")
    # What os.fsencode does, without a call for each string: this is on the way of every call.
    try:
        result = tuple([a.encode("utf-8", "surrogateescape") if type(a) is str else os.fsencode(a) for a in argv])
    except (TypeError, UnicodeEncodeError) as error:
        raise UsageError(f"argv is a list of texts, bytes or paths: {error}") from None
    if not result or not result[0]:
        raise UsageError("there is no command to run")
    if b"\0" in b"".join(result):
        number, argument = next((n, text) for n, text in enumerate(result) if b"\0" in text)
        raise UsageError(f"argument {number} contains a NUL byte: {argument[:40]!r}")
    return result


@lru_cache(1024)
def check_tenant(name: str) -> str:
    """A tenant's name as a cgroup directory can carry it.

    Raises:
        UsageError: it is empty, too long, or has other characters than letters, digits, ``-``, ``_`` and ``.``.
    """
    if not 0 < len(name) <= TENANT_MAX or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or name[0] == ".":
        raise UsageError(f"tenant: {name!r} is no name (letters, digits, '-', '_', '.'; at most {TENANT_MAX})")
    return name
