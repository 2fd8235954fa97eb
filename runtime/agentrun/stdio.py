"""The tool's stdin, stdout and stderr: given descriptors, or pipes of ours."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final, Literal

from agentrun.capture import Capture
from agentrun.errors import UsageError

PIPE: Final = "pipe"
Input = bytes | int | Literal["pipe"] | None
Output = int | Literal["pipe"] | None

_PIPE_FLAGS = os.O_CLOEXEC


class Stdio:
    """What one call's descriptors are. ``child`` go to the tool; ``close_child`` after they were sent, ``close`` at the end."""

    __slots__ = ("_owned", "_tool_ends", "captures", "child", "parent", "terminal")

    def __init__(self) -> None:
        self.child: list[int] = []
        self.parent: dict[str, int] = {}
        """Our ends of PIPE streams: ``stdin``, ``stdout``, ``stderr``."""
        self.captures: dict[str, Capture] = {}
        self.terminal = False
        self._owned: list[int] = []
        self._tool_ends: list[int] = []

    @classmethod
    def for_run(cls, stdin: Input, stdout: Output, stderr: Output, owner: tuple[int, int], bound: int, null: int) -> Stdio:
        """stdin, and outputs that are captured (``None``) or given.

        ``owner`` is the tool's uid and gid as the host sees them: it may reopen /dev/stdout only if the pipe is its own.

        Raises:
            UsageError: a given descriptor is not open, or stdin is a stream.
        """
        self = cls()
        try:
            self.child.append(self._input(stdin, owner, null))
            for name, given in (("stdout", stdout), ("stderr", stderr)):
                if given is None:
                    read, write = self._pipe(owner)
                    # Our copy of the write end stays open until the call has ended: the pipe then never reports its end of
                    # file, and an exit is one wake-up instead of three.
                    self.captures[name] = Capture(read, bound)
                    self.child.append(write)
                else:
                    self.child.append(self._stream(name, given, owner))
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def for_terminal(cls, console: int) -> Stdio:
        """A terminal of the sandbox's own, whose master goes out through ``console``; takes no ownership of it."""
        self = cls()
        self.child = [console]
        self.terminal = True
        return self

    def _input(self, stdin: Input, owner: tuple[int, int], null: int) -> int:
        if stdin is None:
            return null
        if isinstance(stdin, bytes):
            # A file in memory instead of a pipe: no task has to feed it, and there is no size at which it would block.
            fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
            self._owned.append(fd)
            with open(fd, "wb", closefd=False) as file:
                file.write(stdin)
            os.lseek(fd, 0, os.SEEK_SET)
            return fd
        if stdin == PIPE:
            read, write = self._pipe(owner)
            os.set_blocking(read, True)
            self.parent["stdin"] = write
            self._tool_ends.append(read)
            return read
        return self._given("stdin", stdin)

    def _stream(self, name: str, given: int | Literal["pipe"], owner: tuple[int, int]) -> int:
        if given == PIPE:
            read, write = self._pipe(owner)
            self.parent[name] = read
            self._tool_ends.append(write)
            return write
        return self._given(name, given)

    def _given(self, name: str, fd: int) -> int:
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as error:
            raise UsageError(f"{name}: descriptor {fd} is not open") from error
        return fd

    def _pipe(self, owner: tuple[int, int]) -> tuple[int, int]:
        read, write = os.pipe2(_PIPE_FLAGS)
        self._owned += [read, write]
        os.set_blocking(read, False)
        os.fchown(write, *owner)
        return read, write

    def close_child(self) -> None:
        """Close our copies of the tool's ends of streams, so that whoever holds the other ends sees theirs."""
        while self._tool_ends:
            fd = self._tool_ends.pop()
            self._owned.remove(fd)
            os.close(fd)

    def give_parent(self, name: str) -> int:
        """Hand one of our ends over to the caller."""
        fd = self.parent.pop(name)
        self._owned.remove(fd)
        return fd

    def close(self) -> None:
        """Close everything that is still ours."""
        for capture in self.captures.values():
            if capture.fd in self._owned:
                self._owned.remove(capture.fd)
            capture.close()
        while self._owned:
            os.close(self._owned.pop())


def own_pipe(fd: int, owner: tuple[int, int]) -> None:
    """Let the tool reopen a passed pipe through /dev/stdout; other files keep their owner (runc and crun do the same)."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, *owner)
