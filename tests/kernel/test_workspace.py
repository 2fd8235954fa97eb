# SPDX-License-Identifier: Apache-2.0
"""A workspace: the caller's directory at its own path, with the caller's rights and no others."""

import os
import secrets
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from agentrun import HostError, UsageError, Workspace
from tests.support import CLIENT, open_daemon

pytestmark = pytest.mark.host

OTHER = 54321
"""A user and group that nobody here is."""


@pytest.fixture
def workspace():
    """A directory of root's that only root may enter."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as path:
        yield Path(path)


@pytest.fixture
def place(request):
    """A directory below a place that is private or hidden in the sandbox."""
    path = Path(request.param, f"agentrun-test-{os.getpid()}-{secrets.token_hex(4)}", "deep er")
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path.parent)


def test_files_come_back_as_the_callers(executor, workspace):
    (workspace / "in").write_text("from the host")
    text = executor.text(
        "cat in; mkdir -p a/b; echo out > a/b/f; ln -s f a/b/l; stat -c %u:%g in a/b/f", workspace=str(workspace)
    )
    assert text == "from the host1000:1000\n1000:1000"
    for path in workspace.rglob("*"):
        info = path.lstat()
        assert (info.st_uid, info.st_gid) == (os.geteuid(), os.getegid()), path
    assert (workspace / "a/b/f").read_text() == "out\n"


def test_it_is_the_working_directory_at_the_same_path(executor, workspace):
    assert executor.text("pwd -P", workspace=str(workspace)) == str(workspace)
    assert executor.text("pwd -P", workspace=str(workspace), cwd="/tmp") == "/tmp"


@pytest.mark.parametrize(
    "place", ["/root", "/mnt", "/tmp", "/home", "/media", "/srv", "/var/tmp", "/opt", "/root/.cache"], indirect=True
)
def test_it_may_be_below(executor, place):
    (place / "f").write_text("x")
    assert executor.text("cat f; echo y > g; pwd -P", workspace=str(place)) == f"x{place}"
    assert (place / "g").read_text() == "y\n"


def test_it_may_be_in_a_top_level_directory_that_is_new(executor):
    """A daemon lives for months; its image was opened before this directory was made."""
    executor.text("true")
    top = Path(f"/agentrun-test-{os.getpid()}-{secrets.token_hex(4)}")
    (top / "w").mkdir(parents=True)
    try:
        assert executor.text("echo y > g; pwd -P", workspace=str(top / "w")) == f"{top}/w"
        assert (top / "w/g").read_text() == "y\n"
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("place", ["/root", "/home", "/tmp"], indirect=True)
def test_what_lies_beside_it_stays_hidden(executor, place):
    (place.parent / "beside").write_text("x")
    assert executor.sh("ls ..; cat ../beside", workspace=str(place)).stdout == b"deep er\n"


def test_read_only(executor, workspace):
    (workspace / "f").write_text("x")
    result = executor.sh("cat f; touch f; echo y > f; rm -f f; touch g; mkdir d", workspace=Workspace(str(workspace), "ro"))
    assert result.stdout == b"x"
    assert result.stderr.count(b"Read-only file system") == 5
    assert [path.name for path in workspace.iterdir()] == ["f"]


def test_a_symbolic_link_is_resolved(executor, workspace, tmp_path):
    (tmp_path / "link").symlink_to(workspace)
    assert executor.text("pwd -P; pwd", workspace=str(tmp_path / "link")).split() == [str(workspace)] * 2


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/usr",
        "/usr/bin",
        "/etc",
        "/proc",
        "/proc/self",
        "/sys",
        "/dev",
        "/dev/shm",
        "/run",
        "/tmp",
        "/home",
        "/var",
        "/boot",
    ],
)
def test_a_system_directory_is_refused(executor, path):
    with pytest.raises(UsageError, match="system directory"):
        executor.run(["true"], workspace=path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/nonexistent/x", "No such file"), ("/etc/passwd", "Not a directory"), ("", "No such file"), ("a\0b", "null")],
)
def test_what_is_no_directory_is_refused(executor, path, reason):
    with pytest.raises(UsageError, match=reason):
        executor.run(["true"], workspace=path)


def test_a_deleted_directory_is_refused(executor, workspace):
    path = workspace / "gone"
    path.mkdir()
    fd = os.open(path, os.O_PATH)
    try:
        path.rmdir()
        with pytest.raises(UsageError, match="gone"):
            executor.run(["true"], workspace=f"/proc/self/fd/{fd}")
        path.mkdir()  # another directory of the same name is not it
        with pytest.raises(UsageError, match="gone"):
            executor.run(["true"], workspace=f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def test_modes_and_executables(executor, workspace):
    (workspace / "private").write_text("x")
    (workspace / "private").chmod(0o600)
    (workspace / "tool").write_text("#!/bin/sh\necho ran $1\n")
    (workspace / "tool").chmod(0o755)
    (workspace / "closed").mkdir(mode=0o700)
    (workspace / "closed/f").write_text("y")
    script = "cat private closed/f; ./tool it; touch new; mkdir newdir; chmod 750 newdir; chmod +x new; stat -c %a new newdir"
    assert executor.text(script, workspace=str(workspace)) == "xyran it\n755\n750"
    assert stat.S_IMODE((workspace / "newdir").stat().st_mode) == 0o750


def test_files_of_others_in_it_are_as_closed_as_they_are_to_the_caller(executor, workspace):
    """Even root's call has only root's own files: no capability comes along."""
    for name, mode in (("closed", 0o600), ("open", 0o644)):
        (workspace / name).write_text("x")
        os.chown(workspace / name, OTHER, OTHER)
        (workspace / name).chmod(mode)
    result = executor.sh("cat closed; cat open; echo y >> open; chown 1000 open; stat -c %u open", workspace=str(workspace))
    assert result.stdout == b"x65534\n"
    assert (workspace / "open").read_text() == "x"


@pytest.mark.parametrize("owner", [0, OTHER])
def test_setuid_files_in_it_are_not_honoured(executor, workspace, owner):
    program = workspace / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, owner, owner)
    program.chmod(0o6755)
    assert executor.text("./id -u; ./id -g", workspace=str(workspace)) == "1000\n1000"


def test_device_nodes_in_it_do_not_open(executor, workspace):
    os.mknod(workspace / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (workspace / "null").chmod(0o666)
    assert b"Permission denied" in (executor.sh("cat null", workspace=str(workspace)).stderr or b"")


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_git_repository_is_the_tools_own(executor, workspace):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    subprocess.run([*git, "init", "-q"], cwd=workspace, check=True)
    (workspace / "f").write_text("x")
    subprocess.run([*git, "add", "."], cwd=workspace, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=workspace, check=True)
    text = executor.text(
        "echo y >> f; git status --porcelain; git -c user.name=t -c user.email=t@t commit -qam two", workspace=str(workspace)
    )
    assert text == "M f"
    log = subprocess.run([*git, "log", "--format=%s"], cwd=workspace, check=True, capture_output=True, text=True)
    assert log.stdout == "two\none\n"


def test_mounts_below_it_are_not_included(executor, workspace):
    (workspace / "m").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", workspace / "m"], check=True)
    try:
        (workspace / "m/secret").write_text("x")
        assert executor.text("ls m", workspace=str(workspace)) == ""
    finally:
        subprocess.run(["umount", workspace / "m"], check=True)


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_file_system_that_cannot_map_owners(executor, mode):
    """proc has no idmapped mounts, but is refused as a system directory first; /run's kin are tmpfs, which can (Linux 6.3)."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as path:
        subprocess.run(["mount", "-t", "ramfs", "ramfs", path], check=True)
        try:
            Path(path).chmod(0o755)
            Path(path, "f").write_text("x")
            if mode == "ro":
                assert executor.text("cat f", workspace=Workspace(path, "ro")) == "x"
            else:
                with pytest.raises(HostError, match="cannot map owners"):
                    executor.run(["true"], workspace=path)
        finally:
            subprocess.run(["umount", path], check=True)


# ---------------------------------------------------------------- another user's calls


@pytest.fixture(scope="module")
def open_to_users():
    """A daemon that members of a group may ask; the group is ``users``, which every Debian has."""
    with open_daemon("--group", "users") as daemon:
        yield daemon


def as_other(daemon, *args: str, cwd: str = "/") -> subprocess.CompletedProcess:
    command = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--groups=users", *args]
    return subprocess.run(command, env=daemon.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def client(tmp_path_factory, open_to_users):
    """Run the client as another user, who may not read below /root: a copy of it stands in a public place."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-") as directory:
        os.chmod(directory, 0o755)
        program = shutil.copy(CLIENT, directory)
        os.chmod(program, 0o755)
        yield lambda *args: as_other(open_to_users, program, "exec", *args)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv")
class TestAnotherUser:
    @pytest.fixture
    def theirs(self, workspace):
        os.chown(workspace, OTHER, OTHER)
        (workspace / "mine").write_text("m")
        os.chown(workspace / "mine", OTHER, OTHER)
        (workspace / "roots").write_text("secret")
        (workspace / "roots").chmod(0o600)
        return workspace

    def test_files_are_theirs(self, client, theirs):
        done = client("--workspace", str(theirs), "--", "sh", "-c", "cat mine; echo x > new; echo y >> mine")
        assert (done.returncode, done.stdout, done.stderr) == (0, "m", "")
        for name in ("new", "mine"):
            info = (theirs / name).stat()
            assert (info.st_uid, info.st_gid) == (OTHER, OTHER)

    def test_roots_files_stay_closed(self, client, theirs):
        done = client("--workspace", str(theirs), "--", "sh", "-c", "cat roots; echo x > roots")
        assert done.returncode != 0
        assert done.stdout == ""
        assert (theirs / "roots").read_text() == "secret"

    def test_a_directory_they_may_not_enter(self, client, workspace):
        """The client opens it with its user's rights (O_PATH needs search on the way, not on itself); the tool has no more."""
        (workspace / "f").write_text("secret")
        done = client("--workspace", str(workspace), "--", "sh", "-c", "cat f; echo x > g")
        assert done.returncode != 0
        assert done.stdout == ""
        assert [path.name for path in workspace.iterdir()] == ["f"]
        (workspace / "sub").mkdir()
        done = client("--workspace", str(workspace / "sub"), "--", "true")
        assert (done.returncode, done.stderr) == (2, f"agentrun: workspace {workspace}/sub: Permission denied\n")

    def test_they_call_for_themselves_only(self, client, open_to_users):
        assert client("--tenant", "default", "true").returncode == 2
        assert client("--tenant", f"uid-{OTHER}", "true").returncode == 0
        assert (open_to_users.cgroup / f"tenant-uid-{OTHER}").is_dir()

    def test_without_the_group_nobody_gets_in(self, open_to_users):
        command = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", "python3", "-c",
                   f"import socket; socket.socket(socket.AF_UNIX).connect({open_to_users.socket!r})"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})
        assert "PermissionError" in done.stderr
