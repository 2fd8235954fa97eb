"""Parse what a leaf tells about itself: bytes in, numbers out."""

from __future__ import annotations


def parse_flat(text: bytes) -> dict[str, int]:
    """A flat-keyed file such as cpu.stat or memory.events: one ``key value`` pair a line."""
    words = text.split()
    return {key.decode(): int(value) for key, value in zip(words[::2], words[1::2], strict=False) if value.isdigit()}


def parse_cpu(text: bytes) -> tuple[float, float, float | None]:
    """cpu.stat → seconds of user, system and throttled time; the last is there with the cpu controller only.

    usage, user and system are the first three lines on every kernel that has the file (cpu_stat_show, since 4.15).
    """
    words = text.split(None, 6)
    at = text.find(b"throttled_usec ")
    throttled = None if at < 0 else int(text[at + 15 :].split(None, 1)[0]) / 1e6
    return int(words[3]) / 1e6, int(words[5]) / 1e6, throttled


def parse_io(text: bytes) -> tuple[int, int]:
    """io.stat → (bytes read, bytes written) over all devices."""
    read = written = 0
    for line in text.splitlines():
        for field in line.split()[1:]:
            key, _, value = field.partition(b"=")
            if key == b"rbytes":
                read += int(value)
            elif key == b"wbytes":
                written += int(value)
    return read, written


def parse_pressure(text: bytes | None) -> float | None:
    """A PSI file → ``avg10`` of its ``some`` line, percent; None where the kernel has no PSI (Documentation/accounting/psi)."""
    for line in (text or b"").splitlines():
        words = line.split()
        if words[:1] == [b"some"] and words[1].startswith(b"avg10="):
            return float(words[1][6:])
    return None


def parse_number(text: bytes | None) -> int | None:
    """A single-value file; ``None`` for a missing file and for ``max``."""
    return int(text) if text and text.strip().isdigit() else None
