# SPDX-License-Identifier: Apache-2.0
"""The escape suite: out through the workspace, and the host's sockets and pipes. See wall.py; docs/security.md has the table."""

import contextlib
import ctypes
import os
import socket
import stat
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from agentrun import HostError, UsageError
from agentrun.config import DEFAULT_SOCKET
from agentrun_shim import landlock
from tests.kernel.attacker import AT_FDCWD, MS_BIND, Said, libc
from tests.kernel.wall import (
    as_nobody,
    attackers_inside,
    compare,
    hole,
    in_this_process,
    maps_owners,
    public_directory,
    token,
)

pytestmark = pytest.mark.host

# ---------------------------------------------------------------- links and races


def follow_links(a, directory):
    os.chdir(directory)
    for name in sorted(os.listdir()):
        a.step(name, lambda name: os.close(os.open(name, os.O_RDONLY)), name)
        a.step(f"{name} for writing", lambda name: os.close(os.open(name, os.O_WRONLY | os.O_APPEND)), name)


def test_symbolic_links_in_the_workspace(walls, workspace):
    """a workspace prepared with links to the host's files — CVE-2018-15664 (docker cp), CVE-2023-0778 (podman)"""
    with public_directory() as other, tempfile.NamedTemporaryFile(dir="/root") as hidden:
        (other / "closed").write_text("x")
        (other / "closed").chmod(0o600)
        links = {"secret": other / "closed", "hidden": hidden.name, "by proc": f"/proc/1/root{other}/closed",
                 "relative": "../" * 20 + f"{other}/closed"[1:], "shadow": "/etc/shadow"}  # fmt: skip
        for name, target in links.items():
            (workspace / name).symlink_to(target)
        (workspace / "by proc").unlink()
        (workspace / "by proc").symlink_to(f"/proc/{os.getpid()}/root{other}/closed")
        without = walls.outside.attack(follow_links, directory=str(workspace))
        within = walls.alone(follow_links, params={"directory": str(workspace)}, workspace=str(workspace))
    refused = {"secret": "EACCES", "hidden": "ENOENT", "by proc": "ENOENT", "relative": "EACCES", "shadow": "EACCES"}
    expected = {name: ("ok", refused[name]) for name in links}
    compare(without, within, expected | {f"{name} for writing": outcome for name, outcome in expected.items()})


def exchange(one: Path, other: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE: at no time is there nothing."""
    if libc.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), 2) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def check_then_use(a, path, swapped, decoy):
    """What a careless runtime does, with the exchange where it hurts."""
    os.makedirs("/dev/shm/mnt", exist_ok=True)
    a.step("check", lambda: Said("a system directory" if os.path.realpath(path) == "/etc" else "fine"))
    a.sys("renameat2", AT_FDCWD, swapped.encode(), AT_FDCWD, decoy.encode(), 2)
    a.mount(path, "/dev/shm/mnt", "", MS_BIND)
    a.step("use", lambda: Said("a system directory" if os.path.exists("/dev/shm/mnt/passwd") else "fine"))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: nothing races")
@pytest.mark.parametrize("what", ["itself", "its parent"])
def test_a_workspace_that_is_swapped(walls, workspace, what):
    """a directory exchanged for a link while a call attaches it — CVE-2021-30465, CVE-2024-23651, symlink races

    Whatever the thread outside does: nothing but the directory that was opened is ever there with the caller's rights.
    """
    parent, decoy = workspace / "parent", workspace / "decoy"
    path = parent / "etc"
    path.mkdir(parents=True)
    (path / "mine").touch()
    swapped = path if what == "itself" else parent
    decoy.symlink_to("/etc" if what == "itself" else "/")
    without = walls.outside.attack(check_then_use, path=str(path), swapped=str(swapped), decoy=str(decoy))
    assert without == {"check": "fine", "use": "a system directory"}
    exchange(swapped, decoy)

    stop = threading.Event()

    def swap() -> None:
        while not stop.wait(0.0002):  # mostly it is what it should be, or every call would be refused
            exchange(swapped, decoy)
            exchange(swapped, decoy)

    thread = threading.Thread(target=swap)
    thread.start()
    script = "ls; touch probe 2>/dev/null && rm probe && echo wrote; cat shadow >/dev/null 2>&1 && echo leaked; exit 0"
    ran = 0
    try:
        for _ in range(40):  # how many of them meet the exchange is up to the scheduler
            with contextlib.suppress(UsageError, HostError):
                said = walls.executor.sh(script, workspace=str(path)).stdout.split()
                ran += said == [b"mine", b"wrote"]
                assert b"leaked" not in said
                assert b"mine" in said or b"wrote" not in said
    finally:
        stop.set()
        thread.join()
    assert ran
    assert not Path("/etc/probe").exists()


def leave_upwards(a):
    a.step("list", os.listdir, "..")
    a.step("write", lambda: os.close(os.open("../written", os.O_CREAT | os.O_WRONLY, 0o644)))
    a.step("cwd", os.getcwd)


def enter(a, directory):
    os.chdir(directory)


def test_a_directory_moved_out_of_the_workspace(walls, workspace):
    """``..`` in a directory that was moved to where the mount does not reach — CVE-2015-2925

    Outside there is no mount whose root could be left, so ``..`` is simply what it says.
    """
    with public_directory(str(workspace.parent)) as other:
        inside = attackers_inside(walls.executor, workspace=str(workspace))
        try:
            found = []
            for name, attackers in (("without", walls.outside), ("within", inside)):
                (workspace / name).mkdir()
                attackers.attack(enter, stay=True, directory=str(workspace / name))
                (workspace / name).rename(other / name)
                found.append(attackers.attack(leave_upwards))
                assert (other / "written").exists() == (name == "without")
                (other / "written").unlink(missing_ok=True)
        finally:
            inside.close()
            walls.outside.attack(enter, stay=True, directory="/")
    compare(*found, {"list": ("ok", "ENOENT"), "write": ("ok", "ENOENT"), "cwd": ("ok", "ok|ENOENT")})


# ---------------------------------------------------------------- rights left behind


def leave_rights(a, directory):
    """Programs that are the caller's on the host and take on its rights: for an accomplice outside to run."""
    os.umask(0)
    setuid = 0o4755

    def copy(name):
        path = f"{directory}/{name}"
        with open("/bin/cat", "rb") as cat, open(path, "wb") as program:
            program.write(cat.read())
        os.chmod(path, 0o755)
        return path

    a.step("chmod", os.chmod, copy("chmod"), setuid)
    a.step("setgid", os.chmod, copy("setgid"), 0o2755)
    a.step("fchmod", lambda fd: os.fchmod(fd, setuid), os.open(copy("fchmod"), os.O_RDONLY))
    a.call("fchmodat", AT_FDCWD, copy("fchmodat").encode(), setuid)
    a.call("fchmodat2", AT_FDCWD, copy("fchmodat2").encode(), setuid, 0)
    # Empty ones, to be filled by whoever outside thinks that they are harmless.
    a.step("open", os.open, f"{directory}/open", os.O_CREAT | os.O_WRONLY, setuid)
    a.call("openat2", AT_FDCWD, f"{directory}/openat2".encode(), struct.pack("QQQ", os.O_CREAT | os.O_WRONLY, setuid, 0), 24)
    a.step("mknod", os.mknod, f"{directory}/mknod", stat.S_IFREG | setuid)


def test_setuid_left_behind(walls, workspace):
    """a setuid-root program made in a root caller's workspace, run outside by anybody — systemd.exec(5), RestrictSUIDSGID="""
    for name in ("without", "within"):
        (workspace / name).mkdir()
    without = walls.outside.attack(leave_rights, directory=str(workspace / "without"))
    for name in ("chmod", "fchmod", "fchmodat"):
        command = as_nobody(str(workspace / "without" / name), "/proc/self/status")
        assert "\nUid:\t54321\t0\t" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = str(workspace / "within")
    within = walls.alone(leave_rights, params={"directory": ours}, workspace=ours)
    ways = ("chmod", "setgid", "fchmod", "fchmodat", "open", "openat2", "mknod")
    expected = dict.fromkeys(ways, ("ok", "EPERM|ENOSYS")) | {"fchmodat2": ("ok|ENOSYS", "EPERM|ENOSYS")}  # since Linux 6.6
    compare(without, within, expected)


# ---------------------------------------------------------------- the host's sockets and pipes


def connect_to(a, paths):
    import socket

    for name, path in paths.items():
        with socket.socket(socket.AF_UNIX) as sock:
            a.step(name, sock.connect, path)


@contextlib.contextmanager
def listening(parents):
    """A socket that everybody may connect to, in a directory that everybody may enter, in each of the places."""
    with contextlib.ExitStack() as stack:
        paths = {}
        for parent in parents:
            path = str(stack.enter_context(public_directory(parent)) / "agentrun.sock")
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            os.chmod(path, 0o666)
            listener.listen()
            paths[parent] = path
        yield paths


def test_control_sockets(walls):
    """the daemon's socket, Docker's, D-Bus, the system's log: all below /run — unix(7), docker.sock, CVE-2020-15257 (abstract)"""
    name = f"\0{token()}"
    with listening(["/run", "/tmp", "/dev/shm", "/home", "/root"]) as paths, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(name)
        abstract.listen()
        places = {**paths, "abstract": name}
        without = in_this_process(connect_to, paths=places)
        within = walls.inside.attack(connect_to, paths={**places, "agentrun": DEFAULT_SOCKET})
    expected = dict.fromkeys(paths, ("ok", "ENOENT")) | {"abstract": ("ok", "ECONNREFUSED"), "agentrun": ("-", "ENOENT")}
    compare(without, within, expected)
    assert set(walls.executor.text("ls -A /run").split()) == {"agentrun"}


SERVED = ("/opt", "/var/lib", "/srv")


@hole(
    "where a file system cannot map owners, nothing keeps a tool from the sockets on it", where=not all(map(maps_owners, SERVED))
)
def test_sockets_elsewhere_on_the_host(walls):
    """a service that listens in /var/lib or /opt for every local user — unix(7): connecting needs permission, not a mount"""
    with listening(SERVED) as paths:
        without = in_this_process(connect_to, paths=paths)
        within = walls.inside.attack(connect_to, paths=paths)
    compare(without, within, dict.fromkeys(paths, ("ok", "EACCES|ECONNREFUSED|ENOENT")))


def write_to_pipe(a, path):
    a.step("open", os.open, path, os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.skipif(not landlock.version(), reason="no Landlock here: nothing else keeps a tool from writing to a host's pipe")
def test_named_pipes_of_the_host(walls):
    """a service's named pipe on a read-only mount — fifo(7): opening one for writing writes nothing to the file system"""
    with public_directory() as directory:
        path = str(directory / "pipe")
        os.mkfifo(path)
        os.chmod(path, 0o666)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            walls.check(write_to_pipe, {"open": ("ok", "EACCES")}, outside={"path": path}, inside={"path": path})
        finally:
            os.close(reader)
