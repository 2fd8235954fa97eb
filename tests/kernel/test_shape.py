# SPDX-License-Identifier: Apache-2.0
"""What a policy decides about a sandbox before any call is in it: who the tool is, what it sees, what it may write."""

import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from agentrun import HostError, Policy, UsageError
from agentrun.policy import Bind, Filesystem, Process, Rlimit
from agentrun_shim import landlock
from tests.support import BIN, eventually, open_daemon

pytestmark = pytest.mark.host
OTHER = 54321


@pytest.fixture
def data():
    """A directory whose owner is nobody we know."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as path:
        root = Path(path)
        root.chmod(0o755)
        for name in ("ro", "rw"):
            (root / name / "sub").mkdir(parents=True)
            (root / name / "f").write_text(name)
            for entry in (root / name, root / name / "sub", root / name / "f"):
                os.chown(entry, OTHER, OTHER + 1)
        yield root


def bound(*binds: Bind) -> Policy:
    return Policy(name="bound", fs=Filesystem(binds=binds))


# ---------------------------------------------------------------- binds


def test_a_bind_is_read_only_unless_it_says_otherwise(executor, data):
    policy = bound(Bind(str(data / "ro"), "/data/deep/ro"), Bind(str(data / "ro/f"), "/config"))
    result = executor.sh("cat /data/deep/ro/f /config; echo x > /data/deep/ro/f; echo x > /config; rm /config", policy=policy)
    assert result.stdout == b"roro"
    assert result.stderr.count(b"Read-only file system") + result.stderr.count(b"Permission denied") == 3
    assert (data / "ro/f").read_text() == "ro"


def test_a_writable_bind_belongs_to_the_tool_and_to_its_owner_on_disk(executor, data):
    policy = bound(Bind(str(data / "rw"), "/data/rw", "rw"))
    for tenant in ("one", "two"):  # each with ids of its own, of the same directory at once
        script = "stat -c %u:%g /data/rw/f; echo new >> /data/rw/sub/$0; mv /data/rw/sub/$0 /data/rw/$0"
        assert executor.run(["sh", "-c", script, tenant], policy=policy, tenant=tenant).stdout == b"1000:1000\n"
        info = (data / "rw" / tenant).stat()
        assert (info.st_uid, info.st_gid) == (OTHER, OTHER + 1)


def test_a_bind_into_the_image(executor, data):
    assert executor.text("cat /usr/share/f", policy=bound(Bind(str(data / "ro"), "/usr/share"))) == "ro"


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("{}/none", "/d", "No such file or directory"),
        ("/dev/null", "/d", "neither a directory nor a plain file"),
        ("{}/ro", "/usr/share/agentrun-not-there", "the image has no directory /usr/share/agentrun-not-there"),
        ("{}/ro/f", "/usr/share", "the image has no file /usr/share"),
        ("{}/ro", "/bin", "behind a symbolic link"),
        ("{}/link", "/d", "is never shown to a tool"),
    ],
)
def test_what_cannot_be_bound_is_named(executor, data, source, target, text):
    (data / "link").symlink_to("/proc/sys")
    with pytest.raises((HostError, UsageError)) as caught:
        executor.sh(":", policy=bound(Bind(source.format(data), target)))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- who the tool is


def test_identity(executor, data):
    process = Process(
        uid=2000, gid=2001, groups=(5, 2002), hostname="box.test", umask=0o077, oom_score_adj=300,
        rlimits=(Rlimit("stack", 1 << 23, None), Rlimit("nofile", 64, 128), Rlimit("fsize", None, None)), cpu_seconds=7,
    )  # fmt: skip
    policy = Policy(name="who", process=process, fs=Filesystem(file_size=1 << 33))
    script = (
        "id -u; id -g; id -G; whoami; hostname; umask; cat /proc/self/oom_score_adj;"
        " ulimit -s; ulimit -Hs; ulimit -n; ulimit -Hn;"
        "ulimit -t; ulimit -f; echo x > f; stat -c %u:%g:%a f; echo ~"
    )
    assert executor.text(script, policy=policy).split("\n") == [
        "2000", "2001", "2001 5 2002", "tool", "box.test", "0077", "300", "8192", "unlimited", "64", "128", "7", "16777216",
        "2000:2001:600", "/home/tool",
    ]  # fmt: skip


def test_a_file_grows_to_its_limit_and_no_further(executor):
    policy = Policy(name="small", fs=Filesystem(file_size=1 << 20))
    result = executor.sh("dd if=/dev/zero of=/tmp/f bs=64k count=100 2>&1; stat -c %s /tmp/f", policy=policy)
    assert result.stdout.endswith(b"1048576\n")


def test_root_is_nobody_special(executor):
    bits = executor.text("python3 -c 'import ctypes; print(ctypes.CDLL(None).prctl(27, 0, 0, 0, 0))'")  # PR_GET_SECUREBITS
    assert int(bits) == 0xEF


# ---------------------------------------------------------------- the second wall


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
def test_landlock_holds_what_the_mounts_would_let_through(executor, data):
    """A file that anybody may write, passed open for reading: the mounts have no say in it, /proc/self/fd opens it anew."""
    file = data / "open"
    file.write_text("before")
    file.chmod(0o666)
    script = "echo after > /proc/self/fd/0"
    for landlocked, text in ((True, "before"), (False, "after\n")):
        policy = Policy(name="walled", fs=Filesystem(landlock=landlocked))
        fd = os.open(file, os.O_RDONLY)
        try:
            result = executor.run(["sh", "-c", script], policy=policy, stdin=fd)
        finally:
            os.close(fd)
        assert (file.read_text(), result.ok) == (text, not landlocked)


def test_landlock_is_not_in_the_way(executor, data):
    script = (
        "cd /tmp && mkdir a b && touch a/f && mv a/f b/g && ln b/g a/h && ln -s x a/l && mkfifo p && : > /dev/null &&"
        " echo x > /dev/shm/f && echo x > ~/f && cp ~/f /var/tmp/f && truncate -s 5 ~/f &&"
        " rm -r a b && echo 300 > /proc/self/oom_score_adj"
    )
    assert executor.sh(script).ok
    os.chown(data / "rw", 0, 0)
    result = executor.sh("mkdir d && mv d e && echo x > e/f && ln e/f g && rm -r e && cat g", workspace=str(data / "rw"))
    assert (result.stdout, result.stderr) == (b"x\n", b"")


# ---------------------------------------------------------------- what would reach beyond the sandbox


@pytest.mark.parametrize(
    "attack",
    [
        "os.chmod('f', 0o4755)", "os.chmod('f', 0o2755)", "os.fchmod(fd, 0o6755)", "os.mknod('n', 0o104755)",
        "os.open('n', os.O_CREAT | os.O_WRONLY, 0o4755)", "os.open('.', os.O_TMPFILE | os.O_WRONLY, 0o2755)",
        "os.chmod('f', 0o4755, dir_fd=os.open('.', os.O_RDONLY))",
    ],
)  # fmt: skip
def test_no_set_id_bit_comes_back_from_a_workspace(executor, data, attack):
    os.chown(data / "rw", 0, 0)
    script = f"""
import os
fd = os.open('f', os.O_CREAT | os.O_RDWR, 0o755)
os.chmod('f', 0o1750)
try:
    {attack}
    print("done")
except PermissionError as error:
    print(error.errno)
"""
    (data / "rw/f").unlink()
    result = executor.python(script, workspace=str(data / "rw"))
    assert (result.stdout, result.stderr) == (b"1\n", b"")
    assert [d.reason for d in result.denied] == ["EPERM"]
    assert not any(entry.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID) for entry in (data / "rw").rglob("*"))


def test_refused_system_calls_are_told(executor):
    script = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(3): libc.syscall(321, 0, 0, 0)
libc.unshare(0x10000000)
libc.syscall(9999)
"""
    denied = executor.python(script).denied
    assert {(d.kind, d.what, d.reason, d.count) for d in denied} == {
        ("syscall", "bpf", "EPERM", 3), ("syscall", "unshare", "EPERM", 1),
    }  # fmt: skip
    assert executor.sh("true").denied == ()


def test_a_tool_that_tries_without_end_is_answered_all_the_same(executor):
    script = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print({libc.syscall(321, 0, 0, 0) for _ in range(20_000)})
"""
    result = executor.python(script, timeout=30)
    assert result.stdout == b"{-1}\n"
    assert [d.what for d in result.denied] == ["bpf"]
    assert result.denied[0].count >= 1000


def test_a_32_bit_call_is_the_end_and_the_verdict_says_why(executor):
    code = "import ctypes, mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3');"
    code += "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    result = executor.python(code)
    assert (result.outcome, result.signal) == ("signaled", 31)
    assert result.verdict.reason == "syscall"


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH])
def test_a_directory_is_no_stream(executor, stream, flags):
    fd = os.open("/", flags)
    try:
        with pytest.raises(UsageError, match="is a directory or a bare path"):
            executor.run(["true"], **{stream: fd})
    finally:
        os.close(fd)


def test_a_directory_as_stdin_of_the_client():
    with open_daemon() as daemon:
        fd = os.open("/", os.O_RDONLY)
        done = daemon.exec("--", "ls", "/proc/self/fd/0/", stdin=fd)
        os.close(fd)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"stdin: descriptor" in done.stderr


# ---------------------------------------------------------------- the daemon and its policies


def test_policies_are_read_at_start_and_again_on_sighup(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "agentrun/policies/own.toml"
    file.parent.mkdir(parents=True)
    file.write_text('name = "own"\ndescription = "d"\n[process]\nhostname = "first"\n')
    with open_daemon() as daemon:

        def hostname() -> str:
            return daemon.exec("--policy", "own", "hostname").stdout.decode().strip()

        assert hostname() == "first"
        file.write_text('name = "own"\ndescription = "d"\n[process]\nhostname = "no name"\n')
        daemon.process.send_signal(1)
        eventually(lambda: "reload refused" in daemon.log(), "the refusal")
        assert "own.toml: process.hostname: " in daemon.take_log()
        assert hostname() == "first"
        file.write_text('name = "own"\ndescription = "d"\n[process]\nhostname = "second"\n')
        daemon.process.send_signal(1)
        eventually(lambda: hostname() == "second", "the new policy")
        assert "reloaded" in daemon.take_log()


def test_a_policy_that_does_not_load_stops_the_daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "agentrun/policies").mkdir(parents=True)
    (tmp_path / "agentrun/policies/bad.toml").write_text('name = "bad"\ndescription = "d"\n[memory]\nmxa = "1G"\n')
    done = subprocess.run(
        [BIN / "agentrun-cli", "daemon", "--socket", tmp_path / "s"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bad.toml: memory.mxa: unknown key" in done.stderr
