# SPDX-License-Identifier: Apache-2.0
"""hog.c: compiled once, started with one of its modes, and watched through its progress file."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

SOURCE = Path(__file__).with_name("hog.c")

GROWING = ("anon", "huge", "populate", "mappopulate", "tmpfs", "tmpfsmap", "private", "shared", "fork", "read")
"""Modes that take TOTAL_MB as fast as they can, in one way each."""
BOUNDED = ("cow", "churn")
"""Modes that never hold more than an eighth of TOTAL_MB."""
MODES = (*GROWING, *BOUNDED, "hold")
"""All but ``ramp:MB_PER_SECOND``."""

PAGE = 4096
FIELDS = ("start", "bytes", "last_write", "crossed", "end")


@cache
def compile_hog(directory: Path) -> Path:
    """The program in `directory`, static where there is a static libc: it then starts in any root."""
    target = directory / "hog"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(target), str(SOURCE)]
    if subprocess.run([*command, "-static"], capture_output=True, check=False).returncode:
        subprocess.run(command, check=True)
    return target


@cache
def shared_hog() -> Path:
    """The program for whoever has no directory for it: in one of this process, which outlives it in /tmp."""
    return compile_hog(Path(tempfile.mkdtemp(prefix="agentrun-hog-")))


class Progress:
    """What a hog has done so far, read while it runs and when it is dead. Times are CLOCK_MONOTONIC, in ns; 0 is never.

    The file is made here, so that its page is not the hog's memory. It wants to be on a file system with shared
    mappings, so not on 9p.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("wb+") as file:
            file.write(bytes(PAGE))
            file.flush()
            self._map = mmap.mmap(file.fileno(), PAGE)
        self._words = memoryview(self._map).cast("Q")

    def argv(self, hog: Path, mode: str, total_mb: float, limit_mb: float | None = None) -> list[str]:
        """The command whose progress this is."""
        return [str(hog), mode, f"{total_mb:g}", str(self.path), *([] if limit_mb is None else [f"{limit_mb:g}"])]

    @property
    def start_ns(self) -> int:
        return self._words[0]

    @property
    def bytes(self) -> int:
        """Taken so far, by all of its processes together; `churn` gives back as well."""
        return self._words[1]

    @property
    def last_write_ns(self) -> int:
        return self._words[2]

    @property
    def crossed_ns(self) -> int:
        """When `bytes` passed the limit."""
        return self._words[3]

    @property
    def end_ns(self) -> int:
        return self._words[4]

    @property
    def reaction_ns(self) -> int | None:
        """How long it went on writing above the limit; None if it never was above."""
        return self.last_write_ns - self.crossed_ns if self.crossed_ns else None

    def overshoot(self, limit_mb: float) -> int:
        """Bytes above the limit when it was last heard of."""
        return max(0, self.bytes - int(limit_mb * (1 << 20)))

    def reset(self) -> None:
        """For the next hog."""
        for word in range(len(FIELDS)):
            self._words[word] = 0

    def close(self) -> None:
        self._words.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Progress({', '.join(f'{name}={self._words[word]}' for word, name in enumerate(FIELDS))})"


def resident_bytes(pid: int) -> int:
    """What a process has in memory now, for a hog that was stopped in the middle of a system call."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def available(modes: Sequence[str] = MODES) -> list[str]:
    """The modes this machine can do: hugepages may be switched off."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    huge = setting.exists() and "[never]" not in setting.read_text()
    return [mode for mode in modes if huge or mode != "huge"]


def remove(hog: Path) -> None:
    """The directory of `shared_hog`."""
    shutil.rmtree(hog.parent, ignore_errors=True)
