"""The environment of a tool call: what every call gets, and variables as callers give them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from agentrun import rootfs
from agentrun.errors import UsageError

BASE_ENV = {
    b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    b"HOME": rootfs.HOME.encode(),
    b"USER": rootfs.USER.encode(),
    b"LOGNAME": rootfs.USER.encode(),
    b"SHELL": b"/bin/sh",
    b"LANG": b"C.UTF-8",
}
"""The environment of every call; nothing of the daemon's or the caller's is in it unless named."""


def encode(text: object, what: str) -> bytes:
    """Text or a path as the kernel takes it.

    Raises:
        UsageError: it is neither, or has letters that have no bytes.
    """
    try:
        return os.fsencode(text)  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        raise UsageError(f"{what}: {text!r} is no text") from None


def env_pairs(given: Mapping[str, str] | Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """A caller's variables, as names and values: from a mapping, or from ``NAME=VALUE`` entries.

    Raises:
        UsageError: one is no text, a name is empty or contains ``=`` or NUL, or a value contains NUL.
    """
    if isinstance(given, Mapping):
        pairs = [(encode(key, "env"), encode(value, f"env: {key}")) for key, value in given.items()]
    else:
        pairs = [(key, value) if sign else (b"", entry) for entry in given for key, sign, value in (entry.partition(b"="),)]
    for key, value in pairs:
        if not key or b"=" in key or b"\0" in key or b"\0" in value:
            raise UsageError(f"environment variable {key[:40]!r}: a name is not empty, without '=', and nothing has a NUL")
    return pairs
