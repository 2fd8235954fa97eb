# SPDX-License-Identifier: Apache-2.0
"""What a tool call can see and do, asked from inside one."""

import os
import secrets
import socket
from pathlib import Path

import pytest

from agentrun import Workspace

pytestmark = pytest.mark.host


def test_only_its_own_processes_are_visible(executor):
    pids = executor.text("for p in /proc/[0-9]*; do echo ${p#/proc/}; done").split()
    assert 1 in map(int, pids)
    assert len(pids) == 2, "init and the shell"


def test_the_pid_1_of_the_sandbox_can_be_neither_signalled_nor_looked_into(executor):
    result = executor.sh("kill -9 1; kill -TERM 1; cat /proc/1/environ; readlink /proc/1/root; ls /proc/1/fd; echo alive")
    assert result.stdout == b"alive\n"


@pytest.mark.parametrize(
    "place",
    ["/", "/bin", "/boot", "/dev", "/dev/pts", "/etc", "/home", "/lib", "/mnt", "/opt", "/proc", "/proc/self", "/root", "/run",
     "/run/agentrun", "/run/agentrun/etc", "/sbin", "/srv", "/sys", "/sys/fs/cgroup", "/usr", "/usr/bin", "/usr/local", "/var",
     "/var/log", "/var/lib"],
)  # fmt: skip
def test_nothing_can_be_made_outside_the_scratch(executor, place):
    name = f"agentrun-probe-{secrets.token_hex(4)}"
    result = executor.sh('touch "$1/$2" 2>/dev/null && echo made; mkdir "$1/$2.d" 2>/dev/null && echo made', place, name)
    assert result.stdout == b""
    assert not Path(place, name).exists()


def test_no_host_file_is_writable(executor):
    """Everything that says it is writable is in the call's own scratch, in its /proc, or a device."""
    script = "find / -xdev -writable ! -type l 2>/dev/null; find /usr /etc /var /opt /srv -writable ! -type l 2>/dev/null"
    found = executor.sh(script, timeout=120).stdout.decode().splitlines()
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    own = ("/tmp", "/home/tool", "/dev/shm", "/dev/pts", "/run/agentrun/scratch", "/var/tmp", "/proc")
    assert [path for path in found if path not in devices and not path.startswith(own)] == []


@pytest.mark.parametrize(
    "path",
    ["/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger",
     "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/cgroup.kill", "/sys/fs/cgroup/pids.max", "/proc/1/oom_score_adj",
     "/proc/self/uid_map", "/proc/sys/user/max_user_namespaces"],
)  # fmt: skip
def test_the_kernels_controls_are_refused(executor, path):
    before = Path(path).read_bytes() if path.startswith("/proc/sys/") and path != "/proc/sys/vm/drop_caches" else b""
    result = executor.sh('echo 1 > "$1"', path)
    assert result.returncode != 0
    assert result.stderr.count(b"\n") == 1
    if before:
        assert Path(path).read_bytes() == before


@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/gshadow", "/proc/kcore", "/proc/1/maps"])
def test_what_only_root_may_read_is_not_readable(executor, path):
    result = executor.sh('cat "$1"', path)
    assert result.returncode != 0
    assert result.stdout == b""


def test_a_0600_file_of_root_is_not_readable(executor):
    path = Path(f"/opt/agentrun-test-{os.getpid()}")
    path.write_text("secret")
    path.chmod(0o600)
    try:
        result = executor.sh('test -e "$1" && echo there; cat "$1"', str(path))
        assert result.stdout == b"there\n"
        assert b"Permission denied" in result.stderr
    finally:
        path.unlink()


def test_no_capability_no_new_privileges_and_a_filter(executor):
    status = dict(line.split(":\t") for line in executor.text("cat /proc/self/status").splitlines() if ":\t" in line)
    for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[field], 16) == 0, field
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Groups"].split() in ([], ["1000"])
    assert status["Uid"].split() == status["Gid"].split() == ["1000"] * 4


def test_signals_are_as_a_program_expects_them(executor):
    lines = executor.text("grep -E '^Sig(Blk|Ign|Pnd)|^ShdPnd' /proc/self/status").splitlines()
    assert {line.split()[0]: int(line.split()[1], 16) for line in lines} == {
        "SigPnd:": 0,
        "ShdPnd:": 0,
        "SigBlk:": 0,
        "SigIgn:": 0,
    }
    # A writer to a closed pipe dies of SIGPIPE instead of complaining.
    assert executor.sh("yes | head -1").stderr == b""


@pytest.mark.parametrize("program", ["su", "mount", "passwd", "newgrp"])
def test_a_setuid_program_of_the_host_gains_nothing(executor, program):
    found = executor.sh('command -v "$1"', program).stdout.decode().strip()
    if not found or not os.stat(found).st_mode & 0o4000:
        pytest.skip(f"no setuid {program} here")
    # It is asked for the euid it has while it runs: with no terminal and nothing on stdin it waits or fails unprivileged.
    script = "\"$1\" </dev/zero >/dev/null 2>&1 & for i in 1 2 3; do awk '/^Uid/ {print $3}' /proc/$!/status 2>/dev/null; done"
    assert set(executor.sh(script, found).stdout.split()) <= {b"1000"}


def test_mounting_and_new_namespaces_are_refused(executor):
    assert executor.sh("mount -t tmpfs x /tmp").returncode != 0
    assert executor.sh("umount /tmp").returncode != 0
    script = "unshare -Ur true || exit 7; unshare -Ur sh -c 'mount -o remount,rw,bind /usr && echo got it'"
    assert b"got it" not in executor.sh(script).stdout


def test_the_network_is_a_loopback_and_nothing_else(executor):
    names = [line.split(":")[0].strip() for line in executor.text("tail -n +3 /proc/net/dev").splitlines()]
    assert names == ["lo"]
    assert executor.text("tail -n +2 /proc/net/route") == ""


def test_the_loopback_works_and_is_not_the_hosts(executor):
    script = (
        "import socket, sys\n"
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); print('own')\n"
        "try: socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2); print('host')\n"
        "except OSError as e: print(e.strerror)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        result = executor.python(script, str(listener.getsockname()[1]))
    assert result.stdout == b"own\nConnection refused\n"


def test_the_hosts_abstract_sockets_are_out_of_reach(executor):
    name = f"agentrun-test-{secrets.token_hex(8)}"
    script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1])"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as probe:
        listener.bind("\0" + name)
        listener.listen()
        probe.connect("\0" + name)
        result = executor.python(script, name)
    assert result.returncode == 1
    assert b"ConnectionRefusedError" in result.stderr


def test_no_descriptor_but_the_standard_ones(executor):
    # The fourth is the directory that ls reads.
    assert executor.run(["ls", "/proc/self/fd"]).stdout == b"0\n1\n2\n3\n"


def test_its_cgroup_is_the_root_it_sees(executor):
    assert executor.text("cat /proc/self/cgroup").splitlines()[-1] == "0::/"
    assert executor.sh("ls -d /sys/fs/cgroup/tenant-* /sys/fs/cgroup/agentrun-*").stdout == b""


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp", "/dev/shm", "/home/tool"])
def test_the_scratch_is_writable_and_private_to_one_call(executor, place):
    name = f"probe-{secrets.token_hex(4)}"
    assert executor.text('ls -A "$1"; echo x > "$1/$2"; cat "$1/$2"', place, name) == "x"
    assert executor.text('ls -A "$1"', place) == ""
    assert not Path(place, name).exists()


def test_devices_and_shared_memory(executor):
    executor.text("echo x > /dev/null; head -c 4 /dev/zero | cmp -n 4 - /dev/zero; head -c 4 /dev/urandom > /tmp/r")
    assert executor.text("ls /dev") == "\n".join(
        sorted(["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"])
    )
    script = (
        "from multiprocessing import shared_memory, get_context\n"
        "m = shared_memory.SharedMemory(create=True, size=4096); m.buf[:2] = b'hi'; n = shared_memory.SharedMemory(m.name)\n"
        "print(bytes(n.buf[:2]).decode()); n.close(); m.close(); m.unlink()\n"
        "with get_context('fork').Pool(2) as p: print(sum(p.map(abs, range(10))))\n"
    )
    result = executor.python(script)
    assert (result.stdout, result.stderr) == (b"hi\n45\n", b"")


def test_it_has_no_terminal(executor):
    assert executor.sh("tty").stdout == b"not a tty\n"
    assert executor.sh(": < /dev/tty").returncode != 0


@pytest.mark.parametrize(
    ("command", "answer"),
    [("hostname", "sandbox"), ("whoami", "tool"), ("id -gn", "tool"), ("umask", "0022"), ("nice", "0"), ("pwd", "/home/tool"),
     ("echo ~", "/home/tool"), ("readlink /proc/self/fd/0", "/dev/null"), ("wc -c", "0"), ("ulimit -c", "0"),
     ("ulimit -n", "1024"), ("ps -o ppid= -p $$ | tr -d ' '", "0"), ("cat /proc/self/oom_score_adj", "200")],
)  # fmt: skip
def test_ordinary_questions_have_ordinary_answers(executor, command, answer):
    assert executor.text(command) == answer


def test_the_tool_leads_a_session_of_its_own(executor):
    pid, group, session = executor.text("awk '{print $1, $5, $6}' /proc/$$/stat").split()
    assert pid == group == session


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("place", ["/dev/{}", "/proc/self/fd/{n}", "/dev/fd/{n}"])
def test_a_captured_stream_can_be_opened_again(executor, stream, place):
    path = place.format(stream, n=1 if stream == "stdout" else 2)
    result = executor.sh(f"echo x > {path}")
    assert result.returncode == 0, result
    assert getattr(result, stream) == b"x\n"


def test_the_environment_is_minimal_and_not_ours(executor, monkeypatch):
    monkeypatch.setenv("DAEMON_SECRET", "hunter2")
    env = dict(line.split("=", 1) for line in executor.run(["env"]).stdout.decode().splitlines())
    assert env == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home/tool", "USER": "tool",
        "LOGNAME": "tool", "SHELL": "/bin/sh", "LANG": "C.UTF-8",
    }  # fmt: skip
    assert executor.run(["sh", "-c", "echo $FOO $HOME"], env={"FOO": "bar", "HOME": "/tmp"}).stdout == b"bar /tmp\n"


def test_orphans_are_reaped_inside(executor):
    script = (
        "(sh -c 'exit 0' & sh -c 'exit 1' &) ; i=0; zombies() { ps -A -o stat= | grep -c Z; }\n"
        "while [ $i -lt 200 ] && [ $(zombies) != 0 ]; do i=$((i+1)); done; zombies"
    )
    assert executor.sh(script).stdout == b"0\n"


def test_two_tenants_are_two_users_on_the_host(executor, tmp_path):
    owners = set()
    for tenant in ("one", "two"):
        info = executor.text("cat /proc/self/uid_map", tenant=tenant).split()
        owners.add(int(info[1]))
        assert (info[0], info[2]) == ("0", "65536")
    assert len(owners) == 2
    one, two = sorted(owners)
    assert two - one >= 65536


def test_a_readonly_workspace_cannot_be_remounted(executor, tmp_path):
    script = 'touch f; mount -o remount,rw,bind "$PWD"; touch f'
    result = executor.sh(script, workspace=Workspace(str(tmp_path), "ro"))
    assert result.returncode != 0
    assert list(tmp_path.iterdir()) == []
