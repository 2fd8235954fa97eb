"""Limits and the policy that holds them. Parsing and checking only; nothing here touches the host."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

import msgspec

from agentrun.errors import UsageError

MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNIT = {"": 1, "k": 1 << 10, "m": MIB, "g": GIB, "t": 1 << 40}

Network = Literal["none", "host"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a policy. ``None`` is no limit."""

    memory_max: int | None = 2 * GIB
    """Bytes; the leaf is killed as a whole beyond it."""
    memory_swap_max: int | None = 0
    """Bytes of swap."""
    pids_max: int | None = 512
    """Processes and threads of one call."""
    cpus: float | None = None
    """Processors' worth of time, over periods of 100 ms."""
    cpu_weight: int | None = None
    """1 to 10000; 100 is the kernel's default."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a tool call may do."""

    name: str = "default"
    limits: Limits = Limits()
    timeout: float | None = 600.0
    """Seconds a call may take."""
    net: Network = "none"
    """``none``: a network of its own, only loopback. ``host``: the host's."""
    scratch_size: int = 512 * MIB
    """Bytes the call may write to its private /tmp, /home and /dev/shm together."""
    best_effort: bool = False
    """Run although a limit the caller asked for cannot be enforced; the result lists it."""


DEFAULT = Policy()
BUILT_IN = {DEFAULT.name: DEFAULT}


def parse_size(text: str, what: str) -> int:
    """``64M``, ``1.5g``, ``4096`` → bytes, at least 1.

    Raises:
        UsageError: it is not a size; the message shows ``what`` was being set.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(Decimal(match[1]) * _UNIT[match[2].lower()]) if match else 0
    if size < 1 or size >= 1 << 63:
        raise UsageError(f"{what}: {text!r} is not a size (say 512M or 2G)")
    return size


def parse_number(text: str, what: str, *, least: float, most: float, whole: bool = False) -> float:
    """A finite number within bounds.

    Raises:
        UsageError: it is none, or out of bounds.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (least <= value <= most) or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise UsageError(f"{what}: {text!r} is not a {kind} from {least:g} to {most:g}")
    return value


def parse_net(text: str) -> Network:
    """``none`` or ``host``.

    Raises:
        UsageError: anything else.
    """
    if text == "none":
        return "none"
    if text == "host":
        return "host"
    raise UsageError(f"net: {text!r} is not known (none or host)")


def find_policy(name: str) -> Policy:
    """The built-in policy of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in BUILT_IN:
        raise UsageError(f"policy: there is no policy {name!r} (known: {', '.join(BUILT_IN)})")
    return BUILT_IN[name]
