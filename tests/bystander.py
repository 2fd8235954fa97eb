# SPDX-License-Identifier: Apache-2.0
"""Another processor that looks at memory while the daemon writes it, as the programs in the kernel do."""

import mmap
import os
import time
from collections.abc import Callable, Sequence

SECONDS = 1.0


def least_seen(fd: int, code: str, offsets: Sequence[int]) -> Callable[[], list[int]]:
    """A process that looks at these places of a file without end, for a second; what is returned gives the least it saw of each.

    ``code`` is I or Q. All places must have their values already.
    """
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        view = memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)).cast(code)
        at = [offset // view.itemsize for offset in offsets]
        least = [view[index] for index in at]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for _ in range(1000):
                for place, index in enumerate(at):
                    if (value := view[index]) < least[place]:
                        least[place] = value
        os.write(write, " ".join(map(str, least)).encode())
        os._exit(0)
    os.close(write)

    def stop() -> list[int]:
        with os.fdopen(read) as file:
            found = [int(word) for word in file.read().split()]
        os.waitpid(pid, 0)
        return found

    return stop


def for_a_second(what: Callable[[], object]) -> None:
    """Do it again and again while the other one looks."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        what()
