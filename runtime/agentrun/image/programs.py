"""The programs that images need: zstd, which Python has no module for before 3.14; skopeo, which knows registries; mmdebstrap,
which knows Debian.

``posix_spawn`` only: this may run in a thread of the daemon, which never forks. A child has the descriptors that are named here,
and no others.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import threading
from collections.abc import Callable
from typing import Final

from agentrun.errors import HostError
from agentrun.tomltext import printable

_HINT: Final = {
    "zstd": "zstd-compressed layers need the zstd program; apt-get install zstd",
    "skopeo": "registries and containers-storage need skopeo; apt-get install skopeo",
    "mmdebstrap": "recipes are built by mmdebstrap; apt-get install mmdebstrap",
    "apt-config": "recipes take Debian's packages from where apt of this machine does, and it has no apt",
}
_LONGEST: Final = 2000
_MOST: Final = 1 << 20
"""Bytes of what a program says that are read."""
_EVERY: Final = 0.25
"""Seconds between two looks at how far a program has come."""


def find(name: str) -> str:
    """Where a program is.

    Raises:
        HostError: it is not installed; the message says how to.
    """
    path = shutil.which(name)
    if path is None:
        raise HostError(f"{name} is not installed: {_HINT.get(name, 'images need it')}")
    return path


def _spawn(argv: list[str], stdin: int, stdout: int, stderr: int, keep: int = -1) -> int:
    """Start a program. It inherits ``keep`` as descriptor 3: a lock that is held for as long as it runs, even without us."""
    actions: list[tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate((stdin, stdout, stderr))]
    if keep >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, keep, 3))
    # Python ignores SIGPIPE, and what is ignored stays so across an exec: a decoder would write on to nobody.
    return os.posix_spawn(find(argv[0]), argv, os.environ, file_actions=actions, setsigdef=[signal.SIGPIPE, signal.SIGINT])


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Unzstd:
    """``zstd -dc``, fed by a thread and read by us."""

    def __init__(self, feed: Callable[[int], bytes]) -> None:
        """``feed(n)`` gives up to n bytes, and none at the end; it is called in the thread."""
        self._feed = feed
        self._failed: BaseException | None = None
        self._status = 0
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        inner_in, self._in = os.pipe2(os.O_CLOEXEC)
        self._out, inner_out = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = _spawn(["zstd", "-dcq"], inner_in, inner_out, null)
        except BaseException:
            os.close(self._in)
            os.close(self._out)
            raise
        finally:
            for fd in (inner_in, inner_out, null):
                os.close(fd)
        self._thread = threading.Thread(target=self._pump, name="unzstd", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        try:
            while chunk := self._feed(1 << 18):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._in, view) :]
        except BrokenPipeError:
            pass  # zstd has ended; its exit status says more
        except BaseException as error:  # noqa: BLE001 - goes to whoever reads
            self._failed = error
        finally:
            os.close(self._in)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end, and after ``close``."""
        return os.read(self._out, size) if self._pid else b""

    def close(self) -> int:
        """End it; its exit status, 0 if it came to its end and found nothing wrong.

        Raises:
            BaseException: what ``feed`` raised.
        """
        if self._pid:
            os.close(self._out)  # and if it still writes, it gets a SIGPIPE
            self._thread.join()
            pid, self._pid = self._pid, 0
            self._status = _wait(pid)
        if self._failed is not None:
            raise self._failed
        return self._status


def run(argv: list[str], look: Callable[[], None] = lambda: None, keep: int = -1) -> str:
    """Run a program to its end; what it writes to stdout. ``look`` is called now and then meanwhile.

    What it writes to stderr is the reason if it fails.

    Raises:
        HostError: it is not there, or failed.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    out = os.memfd_create("stdout", os.MFD_CLOEXEC)
    words = os.memfd_create("stderr", os.MFD_CLOEXEC)
    try:
        pid = _spawn(argv, null, out, words, keep)
        pidfd = os.pidfd_open(pid)
        try:
            while not select.select([pidfd], [], [], _EVERY)[0]:
                look()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.close(pidfd)
            status = _wait(pid)
        printed, text = (os.pread(fd, _MOST, 0).decode(errors="replace") for fd in (out, words))
    finally:
        for fd in (out, words, null):
            os.close(fd)
    if status:
        reason = " ".join(text.split())[-_LONGEST:] or (f"signal {-status}" if status < 0 else f"exit status {status}")
        raise HostError(f"{' '.join(argv[:2])} failed: {printable(reason)}")
    return printed
