"""A terminal for who calls the runtime by hand: no engine holds its other end, so this process does, and passes bytes on."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import sys
import termios

_CHUNK = 65536


class Relay:
    """A console socket of our own, and what comes of it."""

    def __init__(self, root: str) -> None:
        """Listen, in the directory of all containers: it is nobody else's."""
        os.makedirs(root, 0o700, exist_ok=True)
        self.path = f"{root}/.console-{os.getpid()}"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(1)
        self.master = -1

    def receive(self) -> None:
        """The container has sent its terminal: take it, with the size of ours."""
        connection, _ = self._server.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 256, 1)
        self.master = fds[0]
        self.close()
        self._resize()

    def close(self) -> None:
        """Stop listening."""
        self._server.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def pump(self, pid: int) -> None:
        """Pass everything on until the program has ended, and what it said last."""
        before = None
        if os.isatty(0):
            before = termios.tcgetattr(0)
            raw = termios.tcgetattr(0)
            raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
            raw[1] &= ~termios.OPOST
            raw[2] = raw[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
            termios.tcsetattr(0, termios.TCSAFLUSH, raw)
        signal.signal(signal.SIGWINCH, lambda _number, _frame: self._resize())
        pidfd = os.pidfd_open(pid)
        try:
            self._pump(pidfd)
        finally:
            os.close(pidfd)
            if before is not None:
                termios.tcsetattr(0, termios.TCSAFLUSH, before)

    def _pump(self, pidfd: int) -> None:
        sources = [0, self.master, pidfd]
        while True:
            # What it has left behind may keep the terminal open: after its end, only what is there already is read.
            ready = select.select(sources, [], [], None if pidfd in sources else 0)[0]
            if not ready:
                return
            for fd in ready:
                if fd == pidfd:
                    sources = [self.master]
                    continue
                try:
                    data = os.read(fd, _CHUNK)
                except OSError:  # EIO: nobody has the other end any more
                    data = b""
                if data:
                    self._write(1 if fd == self.master else self.master, data)
                elif fd == self.master:
                    return
                else:
                    sources = [source for source in sources if source != 0]

    @staticmethod
    def _write(fd: int, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except OSError:
                return

    @staticmethod
    def size() -> tuple[int, int]:
        """Rows and columns of our own terminal; 0 and 0 without one."""
        for fd in (0, 1, 2):
            if os.isatty(fd):
                columns, rows = os.get_terminal_size(fd)
                return rows, columns
        return 0, 0

    def _resize(self) -> None:
        for fd in (0, 1, 2):
            if os.isatty(fd):
                try:
                    fcntl.ioctl(self.master, termios.TIOCSWINSZ, fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
                except OSError as error:
                    sys.stderr.write(f"warning: the terminal's size: {error.strerror}\n")
                return
