"""The tool's stdin, stdout and stderr: given descriptors, or pipes of ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
from typing import Final, Literal

from agentrun.capture import Capture
from agentrun.errors import UsageError

PIPE: Final = "pipe"
NULL: Final = "null"
Input = bytes | int | Literal["pipe"] | None
Output = int | Literal["pipe", "null"] | None


_OWNERS = 16
"""Owners whose next call finds a kit: those that called last."""


class Kit:
    """Two pipes for captured streams, and an epoll that watches their read ends. Whoever takes one closes what it took."""

    __slots__ = ("epoll", "pipes")

    def __init__(self, owner: tuple[int, int]) -> None:
        self.pipes: list[tuple[int, int]] = []
        self.epoll = select.epoll()
        try:
            for _ in range(2):
                read, write = _make_pipe(owner)
                self.pipes.append((read, write))
                self.epoll.register(read, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close everything in it."""
        self.epoll.close()
        for pair in self.pipes:
            for fd in pair:
                os.close(fd)


class Kits:
    """One kit ready for each of the last owners, made while nobody waits: its system calls are a twentieth of a short call.

    And one /dev/null, opened anew for every call: who shares an open file shares its flags and its owner, a channel.
    """

    def __init__(self) -> None:
        self._ready: dict[tuple[int, int], Kit] = {}
        self._null = -1
        self._closed = False

    def take(self, owner: tuple[int, int]) -> Kit:
        """A kit whose pipes belong to ``owner``, the tool's uid and gid as the host sees them."""
        return self._ready.pop(owner, None) or Kit(owner)

    def take_null(self) -> int:
        """A /dev/null that nobody else has; the caller closes it."""
        fd, self._null = self._null, -1
        return fd if fd >= 0 else open_null()

    def refill(self, owner: tuple[int, int] | None) -> None:
        """Have what the next call takes: a /dev/null, and a kit for ``owner`` if one was taken."""
        if self._closed:
            return
        with contextlib.suppress(OSError):  # out of descriptors: whoever needs one is told
            if self._null < 0:
                self._null = open_null()
            if owner is not None and owner not in self._ready:
                self._ready[owner] = Kit(owner)
                while len(self._ready) > _OWNERS:
                    self._ready.pop(next(iter(self._ready))).close()

    def forget(self) -> None:
        """Close the kits: some of their owners may not call again."""
        while self._ready:
            self._ready.popitem()[1].close()

    def close(self) -> None:
        """Close what nobody took, and keep nothing ready any more."""
        self._closed = True
        if self._null >= 0:
            os.close(self._null)
            self._null = -1
        self.forget()


def open_null() -> int:
    """/dev/null, for reading and writing."""
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def _make_pipe(owner: tuple[int, int]) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(read, False)
        os.fchown(write, *owner)
    except BaseException:
        os.close(read)
        os.close(write)
        raise
    return read, write


class Stdio:
    """What one call's descriptors are. ``child`` go to the tool; ``close_child`` after they were sent, ``close`` at the end."""

    __slots__ = ("_kit", "_kits", "_null", "_owned", "_owner", "_tool_ends", "captures", "child", "parent", "terminal")

    def __init__(self, owner: tuple[int, int] = (0, 0), kits: Kits | None = None) -> None:
        self._owner, self._kits = owner, kits
        self._kit: Kit | None = None
        self._null = -1
        self.child: list[int] = []
        self.parent: dict[str, int] = {}
        """Our ends of PIPE streams: ``stdin``, ``stdout``, ``stderr``."""
        self.captures: dict[str, Capture] = {}
        self.terminal = False
        self._owned: list[int] = []
        self._tool_ends: list[int] = []

    @classmethod
    def for_run(
        cls,
        stdin: Input,
        stdout: Output,
        stderr: Output,
        owner: tuple[int, int],
        bound: int,
        kits: Kits | None = None,
    ) -> Stdio:
        """stdin, and outputs that are captured (``None``) or given.

        ``owner`` is the tool's uid and gid as the host sees them: it may reopen /dev/stdout only if the pipe is its own.

        Raises:
            UsageError: a given descriptor is not open, or stdin is a stream.
        """
        self = cls(owner, kits)
        try:
            self.child.append(self._take_null() if stdin is None else self._input(stdin))
            if stdout is None or stderr is None:
                self._kit = kits.take(owner) if kits is not None else Kit(owner)
            for number, (name, given) in enumerate((("stdout", stdout), ("stderr", stderr))):
                if given is None:
                    # Our copy of the write end stays open until the call has ended: the pipe then never reports its end of
                    # file, and an exit is one wake-up instead of three.
                    assert self._kit is not None
                    read, write = self._kit.pipes[number]
                    self.captures[name] = Capture(read, bound)
                    self.child.append(write)
                else:
                    self.child.append(self._stream(name, given))
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

    def _take_null(self) -> int:
        if self._null < 0:
            self._null = self._kits.take_null() if self._kits is not None else open_null()
            self._owned.append(self._null)
        return self._null

    def _input(self, stdin: bytes | int | Literal["pipe"]) -> int:
        if isinstance(stdin, bytes):
            # A file in memory instead of a pipe: no task has to feed it, and there is no size at which it would block.
            fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
            self._owned.append(fd)
            with open(fd, "wb", closefd=False) as file:
                file.write(stdin)
            os.lseek(fd, 0, os.SEEK_SET)
            return fd
        if stdin == PIPE:
            read, write = self._pipe()
            os.set_blocking(read, True)
            self.parent["stdin"] = write
            self._tool_ends.append(read)
            return read
        return self._given("stdin", stdin)

    def _stream(self, name: str, given: int | Literal["pipe", "null"]) -> int:
        if given == NULL:
            return self._take_null()
        if given == PIPE:
            read, write = self._pipe()
            self.parent[name] = read
            self._tool_ends.append(write)
            return write
        return self._given(name, given)

    def _given(self, name: str, fd: int) -> int:
        check_stream(name, fd)
        return fd

    def _pipe(self) -> tuple[int, int]:
        pair = _make_pipe(self._owner)
        self._owned += pair
        return pair

    @property
    def epoll(self) -> select.epoll | None:
        """Watches the captured streams, if there are any."""
        return None if self._kit is None else self._kit.epoll

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

    def finish(self) -> None:
        """Take what is still in the captured streams; every writer is dead."""
        if self._kit is not None:
            # One system call says that nothing is there, as it mostly is; two reads would say so with an exception each.
            ready = [fd for fd, _ in self._kit.epoll.poll(0)]
            for capture in self.captures.values():
                if capture.fd in ready:
                    capture.finish()

    def close(self) -> None:
        """Close everything that is still ours, and have the pipes of the next call made."""
        while self._owned:
            os.close(self._owned.pop())
        kit, self._kit = self._kit, None
        if kit is not None:
            kit.close()
        if self._kits is not None:
            self._kits.refill(None if kit is None else self._owner)


def check_stream(name: str, fd: int) -> None:
    """A descriptor that a tool may have: not a directory, through which it would see the host's tree, nor a bare O_PATH.

    Raises:
        UsageError: it is one of those, or not open, or no number.
    """
    try:
        mode = os.fstat(fd).st_mode
        only_path = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
    except (OSError, OverflowError) as error:
        raise UsageError(f"{name}: descriptor {fd} is not open") from error
    except TypeError:
        raise UsageError(f"{name}: {fd!r} is neither a descriptor nor what can be sent") from None
    if stat.S_ISDIR(mode) or only_path:
        raise UsageError(f"{name}: descriptor {fd} is a directory or a bare path; a tool gets files, pipes, sockets, terminals")


def own_pipe(fd: int, owner: tuple[int, int]) -> None:
    """Let the tool reopen a passed pipe through /dev/stdout; other files keep their owner (runc and crun do the same)."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, *owner)
