"""Sizes and numbers as people write them, on the command line and in files."""

from __future__ import annotations

import re
from decimal import Decimal

from agentrun.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNIT = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}


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
        # float() also takes 1_000 and digits of other scripts.
        value = float(text) if text.isascii() and "_" not in text else float("nan")
    except ValueError:
        value = float("nan")
    if not (least <= value <= most) or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise UsageError(f"{what}: {text!r} is not a {kind} from {least:.10g} to {most:.10g}")
    return value


def show_size(size: int) -> str:
    """Bytes as ``parse_size`` takes them, in the largest unit that is exact."""
    for unit, factor in (("T", 1 << 40), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
