# SPDX-License-Identifier: Apache-2.0
"""The escape suite: mounts, descriptors, programs, devices, links. See wall.py; docs/security.md has the table."""

import ctypes
import errno
import hashlib
import os
import shutil
import signal
import stat
import struct
import subprocess

import pytest

from agentrun import Outcome
from agentrun_shim import native
from tests.kernel.attacker import AT_FDCWD, MNT_DETACH, MS_BIND, MS_RDONLY, MS_REMOUNT, Said
from tests.kernel.wall import NOBODY, as_nobody, compare, public_directory

pytestmark = pytest.mark.host


# ---------------------------------------------------------------- mounts


def change_mounts(a, directory):
    """``directory`` is where, outside, what the sandbox has is made first: a read-only mount and a covered file."""
    read_only, covered = "/usr", "/etc/passwd"
    if directory:
        read_only, covered = directory, directory + "/covered"
        os.close(os.open(covered, os.O_CREAT | os.O_WRONLY, 0o644))
        a.mount(directory, directory, "", MS_BIND)
        a.mount("", directory, "", MS_REMOUNT | MS_BIND | MS_RDONLY)
        a.mount("/etc/passwd", covered, "", MS_BIND)
    a.step("reveal what is covered", a.sys, "umount2", covered.encode(), MNT_DETACH)
    a.step("remount", a.mount, "", read_only, "", MS_REMOUNT | MS_BIND)
    a.step("write there", lambda: os.close(os.open(read_only + "/x", os.O_CREAT | os.O_WRONLY, 0o644)))
    a.call("mount_setattr", AT_FDCWD, read_only.encode(), 0, struct.pack("QQQQ", 0, 1, 0, 0), 32)  # clear MOUNT_ATTR_RDONLY
    a.step("mount", a.mount, "none", "/tmp", "tmpfs")
    a.call("fsopen", b"tmpfs", 0)
    a.call("fspick", AT_FDCWD, b"/tmp", 0)
    tree = a.call("open_tree", AT_FDCWD, b"/tmp", 1)  # OPEN_TREE_CLONE
    a.call("move_mount", -1 if tree is None else tree, b"", AT_FDCWD, b"/tmp", 4)  # MOVE_MOUNT_F_EMPTY_PATH
    a.call("pivot_root", b"/tmp", b"/tmp")
    a.call("chroot", b"/")


def test_mounts(walls, workspace):
    """remounting, covering and revealing — CVE-2022-0185, mount(2), umount2(2), move_mount(2), pivot_root(2), mount_setattr(2)"""
    names = ("reveal what is covered", "remount", "mount_setattr", "mount", "fsopen", "fspick", "open_tree", "move_mount",
             "pivot_root", "chroot")  # fmt: skip
    expected = dict.fromkeys(names, ("ok", "EPERM")) | {"write there": ("ok", "EROFS")}
    walls.check(change_mounts, expected, outside={"directory": str(workspace)}, inside={"directory": ""})


# ---------------------------------------------------------------- descriptors and the running program


def use_leaked_descriptors(a, prison, pid):
    """Outside, first the mistake: a chroot entered with a descriptor of the host's root still open."""
    if prison:
        os.mkdir(prison + "/proc")
        a.mount("/proc", prison + "/proc", "", MS_BIND)
        os.open("/", os.O_PATH)
        os.chroot(prison)
        os.chdir("/")

    def find():
        for number in range(1024):
            try:
                os.chdir(f"/proc/self/fd/{number}")
            except OSError:
                continue
            return Said("in the host" if os.path.isdir("etc") else f"at {number}")
        raise FileNotFoundError(errno.ENOENT, "no descriptor of a directory")

    a.step("chdir", find)
    for link in ("cwd", "root", "exe", "fd/0", "ns/mnt"):
        a.step(f"init's {link}", os.stat, f"/proc/{pid}/{link}")


def test_leaked_descriptors(walls, workspace):
    """a descriptor of a host directory left open in the sandbox — CVE-2024-21626 (runc), CVE-2016-9962"""
    expected = dict.fromkeys((f"init's {link}" for link in ("cwd", "root", "exe", "fd/0", "ns/mnt")), ("ok", "EACCES"))
    outside, inside = {"prison": str(workspace), "pid": os.getpid()}, {"prison": "", "pid": 1}
    walls.check(use_leaked_descriptors, expected | {"chdir": ("in the host", "ENOENT")}, outside=outside, inside=inside)


def test_a_working_directory_by_descriptor(walls, workspace):
    """the call's own cwd through the runner's descriptors — CVE-2024-21626, where it was /proc/self/fd/7

    Without the wall it is the test above; what is special here is that the runner, when it changes directory, still has
    descriptors of its own, the workspace's mount among them.
    """
    failures = []
    for number in range(16):
        result = walls.executor.sh("pwd -P", cwd=f"/proc/self/fd/{number}", workspace=str(workspace))
        if result.outcome is Outcome.FAILED_TO_START:
            failures.append(number)
        else:
            assert result.stdout == f"{workspace}\n".encode(), (number, result)
    assert len(failures) >= 15, failures


def overwrite_program(a, victim):
    """Hold the program of a running process, wait until nobody executes it, and write."""
    path = f"/proc/{victim}/exe"
    held = a.step("hold", os.open, path, os.O_PATH)
    if held is None:
        a.open(path, os.O_WRONLY)
        return
    os.kill(victim, signal.SIGKILL)
    while True:  # the exploits try again too: the file is busy while the process dies
        try:
            fd = os.open(f"/proc/self/fd/{held}", os.O_WRONLY)
            break
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
    a.step("overwrite", os.write, fd, b"owned")


def test_overwriting_init(walls, tmp_path):
    """writing to the runtime's own program through /proc/1/exe — CVE-2019-5736 (runc)"""
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as victim:
        walls.check(
            overwrite_program,
            {"hold": ("ok", "EACCES"), "overwrite": ("ok", "-"), "/proc/1/exe": ("-", "EACCES")},
            outside={"victim": victim.pid},
            inside={"victim": 1},
        )
    assert program.read_bytes().startswith(b"owned")


@pytest.mark.parametrize("how", ["argv", "interpreter"])
def test_running_the_runtime_itself(walls, workspace, how):
    """making the runtime execute its own program, to get hold of it — CVE-2019-5736: ``#!/proc/self/exe``

    Without the wall: overwriting a program that runs is shown above. Here the tool *is* the native slot; it has none of the
    descriptors that would make it a zygote, and the file is root's, who is nobody inside.
    """
    program = native.DIRECTORY / "agentrun-slot"
    before = hashlib.sha256(program.read_bytes()).digest()
    (workspace / "tool").write_text("#!/proc/self/exe\n")
    (workspace / "tool").chmod(0o755)
    result = walls.executor.run(["/proc/self/exe" if how == "argv" else "./tool"], workspace=str(workspace))
    assert (result.outcome, result.exit_code, result.stdout, result.stderr) == (Outcome.EXITED, 1, b"", b"")
    assert hashlib.sha256(program.read_bytes()).digest() == before


# ---------------------------------------------------------------- out through /proc, handles, and of a chroot


def write_through_proc(a, target, pid):
    for name, root in (("own root", "self/root"), ("thread's root", "thread-self/root"), ("above cwd", "self/cwd" + "/.." * 40),
                       ("another's root", f"{pid}/root"), ("above another's cwd", f"{pid}/cwd" + "/.." * 40)):  # fmt: skip
        a.step(name, lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)), f"/proc/{root}{target}")


def test_writing_through_proc(walls):
    """host files by /proc/<pid>/root and ``..`` — proc(5), CVE-2019-14271"""
    expected = dict.fromkeys(("own root", "thread's root", "above cwd"), ("ok", "EROFS"))
    expected |= dict.fromkeys(("another's root", "above another's cwd"), ("ok", "EACCES"))
    with public_directory() as directory:
        os.chmod(directory, 0o777)
        outside, inside = {"target": f"{directory}/a", "pid": os.getpid()}, {"target": f"{directory}/b", "pid": 1}
        walls.check(write_through_proc, expected, outside=outside, inside=inside)
        assert [path.name for path in directory.iterdir()] == ["a"]


def break_chroot(a, prison):
    """Outside the prison is a chroot of root's, inside it is the sandbox's own root."""
    host = os.stat("/")
    if prison:
        os.chroot(prison)
        os.chdir("/")
    os.makedirs("/tmp/hole")
    a.step("chroot", os.chroot, "/tmp/hole")
    if a.ok:
        for _ in range(40):
            os.chdir("..")
        a.step("stand", lambda: Said("in the host" if os.path.samestat(os.stat("."), host) else "in prison"))


def test_breaking_out_of_a_chroot(walls, workspace):
    """the working directory left above a new root — chroot(2), unshare(1)"""
    expected = {"chroot": ("ok", "EPERM"), "stand": ("in the host", "-")}
    walls.check(break_chroot, expected, outside={"prison": str(workspace)}, inside={"prison": ""})


def open_by_handle(a, path):
    """A file's handle opens it by any mount of its file system, whatever paths lead there."""
    handle, mount_id = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128)), ctypes.c_int()
    a.call("name_to_handle_at", AT_FDCWD, path.encode(), handle, ctypes.byref(mount_id), 0)
    a.call("open_by_handle_at", os.open(path, os.O_RDONLY), handle, os.O_RDONLY)


def test_file_handles(walls):
    """any file of a file system by its inode number — open_by_handle_at(2), the "shocker" exploit of Docker 0.11"""
    expected = {"name_to_handle_at": ("ok", "ok"), "open_by_handle_at": ("ok", "EPERM")}
    walls.check(open_by_handle, expected, outside={"path": "/dev/shm"}, inside={"path": "/tmp"})


# ---------------------------------------------------------------- devices


def open_devices(a, directory, given):
    kinds = {"character": (stat.S_IFCHR, 1, 3), "block": (stat.S_IFBLK, 7, 0), "kmsg": (stat.S_IFCHR, 1, 11)}
    for name, (kind, major, minor) in kinds.items():
        a.step(f"mknod {name}", os.mknod, f"{directory}/{name}", kind | 0o666, os.makedev(major, minor))
    a.step("open a given node", lambda: os.close(os.open(given, os.O_RDONLY)))
    machine = ("mem", "kmem", "port", "kvm", "fuse", "net/tun", "loop-control", "vda", "kmsg", "mapper/control", "vsock")
    a.step("the machine's devices", lambda: Said(any(os.path.exists(f"/dev/{name}") for name in machine)))


def test_device_nodes(walls, workspace):
    """raw disks and memory — mknod(2), nodev in mount(8)"""
    os.mknod(workspace / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (workspace / "null").chmod(0o666)
    given = str(workspace / "null")
    without = walls.outside.attack(open_devices, directory="/dev/shm", given=given)
    within = walls.alone(open_devices, params={"directory": "/tmp", "given": given}, workspace=str(workspace))
    made = dict.fromkeys(("mknod character", "mknod block", "mknod kmsg"), ("ok", "EPERM|EACCES"))  # the latter of Landlock
    compare(without, within, made | {"open a given node": ("ok", "EACCES"), "the machine's devices": ("True", "False")})


# ---------------------------------------------------------------- setuid programs, file capabilities, links


def test_setuid_and_file_capabilities(walls, workspace):
    """a setuid-root program and one with capabilities in the workspace — execve(2), capabilities(7)"""
    for name, mode in (("setuid", 0o4755), ("capable", 0o755)):
        shutil.copy("/bin/cat", workspace / name)
        (workspace / name).chmod(mode)
    # struct vfs_cap_data, revision 2, with the effective bit: CAP_DAC_OVERRIDE (1) and CAP_SYS_ADMIN (21)
    gained = 1 << 1 | 1 << 21
    os.setxattr(workspace / "capable", "security.capability", struct.pack("<5I", 0x02000001, gained, 0, 0, 0))

    def identity(status: bytes) -> tuple[str, int]:
        fields = dict(line.split(":\t") for line in status.decode().splitlines() if ":\t" in line)
        return fields["Uid"].split()[1], int(fields["CapEff"], 16)

    def outside(name: str) -> tuple[str, int]:
        command = as_nobody(str(workspace / name), "/proc/self/status")
        return identity(subprocess.run(command, check=True, capture_output=True).stdout)

    def inside(name: str) -> tuple[str, int]:
        return identity(walls.executor.run([f"./{name}", "/proc/self/status"], workspace=str(workspace)).stdout)

    assert outside("setuid")[0] == "0"
    assert outside("capable") == (str(NOBODY), gained)
    assert inside("setuid") == inside("capable") == ("1000", 0)


def own_what_is_anothers(a, directory, victim):
    """Root's file under another name or in its place, files given away, rights written into files."""
    os.chdir(directory)
    held = os.open(victim, os.O_PATH)
    a.step("link", os.link, victim, "linked")
    a.step("link by descriptor", a.sys, "linkat", AT_FDCWD, b"/proc/self/fd/%d" % held, AT_FDCWD, b"linked2", 0x400)
    a.step("unnamed file beside it", os.open, os.path.dirname(victim), os.O_TMPFILE | os.O_WRONLY, 0o600)
    with open("own", "w") as own:
        a.step("give to another", os.fchown, own.fileno(), 54321, -1)
        a.step("give to a group", os.fchown, own.fileno(), -1, 54321)
        a.step("give to root", os.fchown, own.fileno(), 0, 0)
        a.step("capabilities", os.setxattr, own.fileno(), "security.capability", struct.pack("<5I", 0x02000001, 2, 0, 0, 0))
        a.step("trusted attribute", os.setxattr, own.fileno(), "trusted.overlay.opaque", b"y")
        flags = ctypes.c_long()
        a.sys("ioctl", own.fileno(), 0x80086601, ctypes.byref(flags))  # FS_IOC_GETFLAGS
        immutable = ctypes.c_long(flags.value | 0x10)
        a.step("immutable", a.sys, "ioctl", own.fileno(), 0x40086602, ctypes.byref(immutable))  # FS_IOC_SETFLAGS
        a.sys("ioctl", own.fileno(), 0x40086602, ctypes.byref(flags))
    a.step("exchange", a.sys, "renameat2", AT_FDCWD, victim.encode(), AT_FDCWD, b"own", 2)


def test_links_and_owners(walls, workspace):
    """hard links to host files, files given away, rights written into files — link(2), chown(2), xattr(7)"""
    for name in ("without", "within", "other"):
        (workspace / name).mkdir()
    (workspace / "other/victim").write_text("x")
    without = walls.outside.attack(
        own_what_is_anothers, directory=str(workspace / "without"), victim=str(workspace / "other/victim")
    )
    with public_directory() as other:
        # On the same file system as the workspace, but for a guest's scratch disk, which no sandbox shows as a whole.
        (other / "victim").write_text("x")
        ours = str(workspace / "within")
        params = {"directory": ours, "victim": str(other / "victim")}
        within = walls.alone(own_what_is_anothers, params=params, workspace=ours)
        assert (workspace / "within/own").stat().st_uid == os.geteuid()
    names = ("link", "link by descriptor", "unnamed file beside it", "give to another", "give to a group", "give to root",
             "capabilities", "trusted attribute", "immutable", "exchange")  # fmt: skip
    refused = dict.fromkeys(("link", "link by descriptor", "exchange"), "EXDEV") | {"unnamed file beside it": "EROFS"}
    refused |= dict.fromkeys(("give to another", "give to a group", "give to root"), "EOVERFLOW")  # ids the mount does not map
    compare(without, within, {name: ("ok", refused.get(name, "EPERM")) for name in names})
