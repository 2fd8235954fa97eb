# SPDX-License-Identifier: Apache-2.0
"""The attacker: a program that tries attacks and says how far each got. Nothing but the standard library; see wall.py.

The system's own Python runs it, inside a sandbox and outside, and it is the same in both places. An attack is a function of
a test file, sent as source text; it runs in a process of its own and has the names of this module. What it says are lines of
Python literals, by which an attack that was refused, one that was killed and one that is broken are told apart:

    ("begin", step)   ("end", step, outcome)   ("broken", traceback)   ("done", wait status)
"""

import ctypes
import errno
import fcntl
import os
import signal
import stat  # noqa: F401 - the attacks use it
import struct
import sys

NR: dict[str, int] = {}
"""System calls by name: agentrun_shim's table, which a test holds against the kernel's header."""
PATIENCE = 30
"""Seconds after which an attack that hangs is ended by SIGALRM, and its verdict says so."""
AT_FDCWD = -100
CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWUTS = 0x08000000, 0x40000000, 0x00020000, 0x10000000, 0x04000000
MS_BIND, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT, MNT_DETACH = 4096, 1 << 18, 1, 16384, 32, 2

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Said(str):
    """What a step returns to have an outcome of its own words instead of ``ok``."""


class Attacker:
    """What an attack gets: the steps it takes are recorded in the order in which they are begun."""

    ok = False
    """The last step worked."""

    def say(self, *words):
        os.write(1, repr(words).encode() + b"\n")

    def step(self, name, function, *args):
        """Try one thing; its outcome is ``ok``, the name of an errno, or what it said. Returns the value, None if it failed."""
        self.say("begin", name)
        try:
            value = function(*args)
        except OSError as error:
            self.ok = False
            self.say("end", name, errno.errorcode.get(error.errno, str(error.errno)))
            return None
        self.ok = True
        self.say("end", name, str(value) if isinstance(value, Said) else "ok")
        return value

    def sys(self, name, *args):
        """One raw system call: the C library's wrappers check and change arguments, or do not exist."""
        result = libc.syscall(ctypes.c_long(NR[name]), *[ctypes.c_long(x) if isinstance(x, int) else x for x in args])
        if result == -1:
            raise OSError(ctypes.get_errno(), name)
        return result

    def call(self, name, *args):
        """A step that is one raw system call of the same name."""
        return self.step(name, self.sys, name, *args)

    def open(self, path, flags=os.O_RDONLY):
        """A step that opens a file and closes it again; ``null`` if it is a /dev/null put there to hide something."""

        def attempt():
            fd = os.open(path, flags | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
            null = os.fstat(fd).st_rdev == os.makedev(1, 3)
            os.close(fd)
            return Said("null" if null else "ok")

        return self.step(path, attempt)

    def read(self, path, name=""):
        """A step that reads the beginning of a file, or lists a directory; ``empty`` if there is nothing in it."""

        def attempt():
            if os.path.isdir(path):
                return Said("ok" if os.listdir(path) else "empty")
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return Said("ok" if os.read(fd, 4096) else "empty")
            finally:
                os.close(fd)

        return self.step(name or path, attempt)

    def put(self, path, text):
        """Write to a file that is there; raises OSError."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def mount(self, source, target, kind, flags=0, data=""):
        """mount(2); raises OSError."""
        self.sys("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())

    def unshare(self, flags):
        """unshare(2), and with a mount namespace nothing of it is seen outside; raises OSError."""
        self.sys("unshare", flags)
        if flags & CLONE_NEWNS:
            self.mount("none", "/", "", MS_REC | MS_PRIVATE)


def run(source, name, params):
    """One attack, in this process."""
    space = dict(globals())
    try:
        exec(source, space)
        space[name](Attacker(), **params)
    except BaseException:  # noqa: BLE001 - whatever it is, the attack is broken, and the test has to say so
        import traceback  # here and where sockets are needed: it takes an emulated machine as long as all the rest

        Attacker().say("broken", traceback.format_exc())


def serve(outside):
    """Attacks from stdin, one a line, each in a process of its own unless it asks to stay in this one."""
    for line in sys.stdin:
        source, name, params, stay = eval(line)
        if stay:
            run(source, name, params)
            Attacker().say("done", 0)
            continue
        pid = os.fork()
        if pid == 0:
            signal.alarm(PATIENCE)
            if outside:
                Attacker().unshare(CLONE_NEWNS)
            run(source, name, params)
            os._exit(0)
        Attacker().say("done", os.waitpid(pid, 0)[1])


def leave_the_host():
    """Outside, we are the host's root without any wall; but what we do is to vanish with us, and to harm nobody."""
    a = Attacker()
    a.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUTS)
    a.mount("tmpfs", "/dev/shm", "tmpfs")
    a.sys("keyctl", 1, 0)  # KEYCTL_JOIN_SESSION_KEYRING: a new one
    import socket

    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, b"lo".ljust(16, b"\0") + struct.pack("h", 1) + bytes(22))  # SIOCSIFFLAGS, IFF_UP


if __name__ == "__main__":
    how, where = sys.argv[1].split()
    NR.update(eval(sys.argv[2]))
    if where == "outside":
        leave_the_host()
    if how == "serve":
        serve(where == "outside")
    else:
        run(*eval(sys.argv[3]))
