# SPDX-License-Identifier: Apache-2.0
"""Guests that run one long command each, for test files that look at what it said: one boot for each kernel, all at once."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.requirements import lacking
from tests.vm import kernels, run

ROOT = Path(__file__).resolve().parents[2]
KERNELS = os.environ.get("KERNELS", "6.1 6.12").split()


class Guest(NamedTuple):
    """A guest that was started."""

    process: subprocess.Popen[bytes]
    timeout: int
    stdout: Path
    stderr: Path

    def finish(self) -> tuple[int, str, str]:
        """Its command's status and what it said; an error with the console's last words if the guest was lost."""
        status = self.process.wait(self.timeout + 30)
        stdout, stderr = self.stdout.read_text(), self.stderr.read_text()
        if status == run.EXIT_TIMED_OUT:
            raise run.TimedOut(f"{stderr}\n{stdout}")
        if status == run.EXIT_NO_VERDICT:
            raise run.LostVM(f"{stderr}\n{stdout}")
        return status, stdout, stderr


@contextmanager
def started(directories: pytest.TempPathFactory, timeout: int, command: Sequence[str]) -> Iterator[dict[str, Guest]]:
    """A running guest for each kernel. Emulation has one busy thread, so they do not wait for each other."""
    if missing := run.missing_requirements(ext4=True):
        lacking("; ".join(missing))
    guests: dict[str, Guest] = {}
    try:
        for kernel in KERNELS:
            kernels.ensure(kernel)  # a download is not to count
            directory = directories.mktemp(f"guest-{kernel}")
            stdout, stderr = directory / "stdout", directory / "stderr"
            argv = [sys.executable, "-m", run.__name__, "--ext4", "--timeout", str(timeout), kernel, "--", *command]
            with stdout.open("wb") as out, stderr.open("wb") as err:
                process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            guests[kernel] = Guest(process, timeout, stdout, stderr)
        yield guests
    finally:
        for guest in guests.values():
            guest.process.terminate()
            guest.process.wait()
