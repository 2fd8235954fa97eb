# SPDX-License-Identifier: Apache-2.0
"""``agentrun exec`` against a daemon: exit codes, streams, signals, options."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support import (
    BIN,
    CLIENT,
    PYTHON,
    Watched,
    connect,
    eventually,
    exec_frame,
    frame,
    has_taken_its_signals,
    open_daemon,
    pids_below,
    read_answer,
)

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 3"], 3, ""),
        (["sh", "-c", "exit 125"], 125, ""),
        (["no-such-command"], 127, "agentrun: no-such-command: No such file or directory\n"),
        (["/etc/passwd"], 126, "agentrun: /etc/passwd: Permission denied\n"),
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -SEGV $$"], 139, ""),
        (["--timeout", "0.3", "sleep", "60"], 124, "agentrun: killed after 0.3 s\n"),
        (["--timeout=0.3", "--", "sleep", "60"], 124, "agentrun: killed after 0.3 s\n"),
        (["--cwd", "/nowhere", "true"], 126, "agentrun: working directory /nowhere: No such file or directory\n"),
    ],
)
def test_exit_codes(daemon, command, code, err):
    done = daemon.exec(*command, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


def test_a_full_queue_is_75():
    with open_daemon(config="max_running = 1\nmax_queued = 0\npool_least = 1\n") as daemon:
        running = daemon.popen("--", "sleep", "60")
        eventually(daemon.calls)
        done = daemon.exec("--", "true", text=True)
        assert (done.returncode, done.stderr) == (75, "agentrun: 1 calls run and 0 wait; try again later\n")
        running.terminate()
        assert running.wait(20) == 143
        running.communicate()
        assert eventually(lambda: daemon.exec("--", "true").returncode == 0)


def test_no_daemon_at_a_named_socket_is_125(daemon):
    done = daemon.exec("--socket", "/nowhere/s", "true", text=True)
    assert (done.returncode, done.stderr) == (125, "agentrun: cannot connect to /nowhere/s: No such file or directory\n")


@pytest.mark.parametrize("name", ["agentrun-cli", "agentrun"])
def test_exec_through_python_is_the_same(daemon, name):
    done = subprocess.run(
        [BIN / name, "exec", "--", "sh", "-c", "echo x; exit 4"], env=daemon.env, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (4, b"x\n", b"")


# ---------------------------------------------------------------- streams


def test_a_pipeline(daemon):
    script = f"printf 'abc\\n' | {CLIENT} exec -- tr a-c A-C | cat; printf x | {CLIENT} exec -- cat | wc -c"
    done = subprocess.run(["sh", "-c", script], env=daemon.env, capture_output=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == (b"ABC\n1\n", b"")


def test_much_through_a_pipeline(daemon):
    script = f"head -c 50000000 /dev/zero | {CLIENT} exec -- cat | cksum"
    done = subprocess.run(["sh", "-c", script], env=daemon.env, capture_output=True, timeout=60, check=False)
    assert done.stdout.split()[1] == b"50000000"


def test_a_reader_that_goes_away_ends_the_tool(daemon):
    script = f"{CLIENT} exec -- sh -c 'yes; kill -9 $$' | head -1"
    done = subprocess.run(["sh", "-c", script], env=daemon.env, capture_output=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == (b"y\n", b"")
    eventually(lambda: not daemon.calls())


def test_the_streams_are_the_very_same_files(daemon, tmp_path):
    """Not copies: the tool has the caller's own open files, with their offsets."""
    with (tmp_path / "out").open("w+b") as out, (tmp_path / "in").open("w+b") as source, (tmp_path / "err").open("w+b") as err:
        source.write(b"0123456789")
        source.seek(4)
        source.flush()
        done = daemon.exec("--", "sh", "-c", "stat -Lc %i /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2; cat; echo e >&2",
                           stdin=source, stdout=out, stderr=err, capture_output=None)  # fmt: skip
        assert done.returncode == 0
        inodes = "".join(f"{os.fstat(file.fileno()).st_ino}\n" for file in (source, out, err))
        assert (tmp_path / "out").read_text() == inodes + "456789"
        assert out.tell() == len(inodes) + 6
        assert (tmp_path / "err").read_text() == "e\n"


def test_a_socket_as_stdin_and_stdout(daemon):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = daemon.popen("--", "cat", stdin=theirs, stdout=theirs)
        ours.sendall(b"echo")
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b"echo"
        assert client.wait(20) == 0
        client.communicate()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_dev_stdout_of_a_pipe_can_be_opened(daemon, stream):
    done = daemon.exec("--", "sh", "-c", f"echo x > /dev/{stream}", text=True)
    assert (done.returncode, getattr(done, stream)) == (0, "x\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_dev_null(daemon, closed):
    done = subprocess.run(["sh", "-c", f"{CLIENT} exec -- sh -c 'cat; echo o; echo e >&2; exit 6' {closed}"],
                          env=daemon.env, capture_output=True, stdin=subprocess.DEVNULL, timeout=30, check=False)  # fmt: skip
    assert done.returncode == 6
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"o\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"e\n")


def test_the_result_waits_for_no_orphan(daemon):
    started = time.monotonic()
    done = daemon.exec("--", "sh", "-c", "(setsid sleep 60 &); echo x")
    assert (done.returncode, done.stdout) == (0, b"x\n")
    assert time.monotonic() - started < 10


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_client_reaches_the_tool(daemon, number):
    name = signal.Signals(number).name[3:]
    client = daemon.popen("--", "sh", "-c", f"trap 'echo got; exit 7' {name}; echo ready; while :; do sleep 0.02; done")
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(number)
    out, err = client.communicate(timeout=20)
    assert (client.returncode, out) == (7, b"got\n")
    # The shell may name the signal its child died of; the client itself has nothing to say.
    assert b"agentrun" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tool_that_does_not_catch_it_dies_of_it(daemon, number):
    client = daemon.popen("--", "sh", "-c", "echo ready; exec sleep 60")
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(number)
    client.communicate(timeout=20)
    assert client.returncode == 128 + number


def test_a_killed_client_takes_its_tool_along(daemon):
    client = daemon.popen("--", "sh", "-c", "trap '' TERM HUP INT; (setsid sleep 60 &); echo ready; while :; do sleep 1; done")
    assert client.stdout.readline() == b"ready\n"
    (call,) = daemon.calls()
    watched = Watched(pids_below(daemon.cgroup / "tenant-default" / f"call-{call['id']}"))
    assert len(watched) >= 3
    client.kill()
    client.communicate(timeout=20)
    watched.all_die()
    eventually(lambda: not daemon.calls())
    daemon.works()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whom_no_daemon_hears_can_be_interrupted(tmp_path, number):
    """A daemon that does not start has its clients in the backlog of its socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        client = subprocess.Popen([CLIENT, "exec", "--socket", str(tmp_path / "sock"), "--", "true"])
        connection, _ = listener.accept()  # it is connected, and what it says is not read
        with connection:
            eventually(lambda: int.from_bytes(fcntl.ioctl(connection, termios.FIONREAD, bytes(4)), sys.byteorder) > 0)
            client.send_signal(signal.SIGUSR1)  # is not for it, but for the tool that may come
            with pytest.raises(subprocess.TimeoutExpired):
                client.wait(0.3)
            client.send_signal(number)
            assert client.wait(20) == 128 + number


def test_signals_in_quick_succession_all_arrive(daemon):
    """The daemon may find two frames in one read."""
    script = "trap 'echo one' USR1; trap 'echo two; exit 7' USR2; echo ready; while :; do sleep 0.02; done"
    client = daemon.popen("--", "sh", "-c", script)
    assert client.stdout.readline() == b"ready\n"
    with daemon.stopped():
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            client.send_signal(number)
            eventually(lambda: has_taken_its_signals(client.pid))
    out, err = client.communicate(timeout=20)
    assert (client.returncode, b"agentrun" in err) == (7, False), err
    assert b"two\n" in out


def test_a_signal_right_behind_the_request(daemon):
    """The daemon finds both in one read."""
    with connect(daemon.socket) as sock:
        request = exec_frame(b"sleep", b"60", options={"capture": "1", "timeout": "5"})
        sock.sendall(request + frame({"v": 1, "op": "signal", "signal": signal.SIGTERM.value}))
        answer = read_answer(sock)
    assert answer["exit"] == 143, answer


def test_a_call_that_waits_can_be_interrupted():
    with open_daemon(config="max_running = 1\npool_least = 1\n") as daemon:
        running = daemon.popen("--", "sleep", "60")
        eventually(daemon.calls)
        waiting = daemon.popen("--", "echo", "never")
        eventually(lambda: daemon.ask(op="stats")["data"]["queued"] == 1)
        waiting.terminate()
        try:
            assert waiting.wait(5) == 143
        finally:
            running.kill()
            running.communicate()
            out, _ = waiting.communicate()
        assert out == b""


# ---------------------------------------------------------------- options


def test_environment(daemon):
    env = daemon.env | {"COPIED": "c c", "EMPTY": ""}
    options = [
        "--env",
        "A=1",
        "--env=B=x=y",
        "--env",
        "COPIED",
        "--env",
        "UNSET",
        "--env",
        "EMPTY",
        "--env",
        "HOME=/tmp",
        "--env",
        "A=2",
    ]
    done = daemon.exec(*options, "--", "env", env=env, text=True)
    got = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert got == {
        "A": "2", "B": "x=y", "COPIED": "c c", "EMPTY": "", "HOME": "/tmp", "USER": "tool", "LOGNAME": "tool",
        "SHELL": "/bin/sh", "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }  # fmt: skip


def test_arguments_arrive_as_they_are(daemon):
    odd = ["", " ", "a b", "\n", "ü", "*", "--", "-x", "\udcff\udcfe", "'\"$x"]
    done = daemon.exec("--", PYTHON, "-c", "import sys, os; print([os.fsencode(a) for a in sys.argv[1:]])", *odd, text=True)
    assert done.stdout == f"{[os.fsencode(a) for a in odd]}\n"


def test_the_working_directory_and_the_workspace(daemon, tmp_path):
    assert daemon.exec("--cwd", "/usr/bin", "pwd").stdout == b"/usr/bin\n"
    done = daemon.exec("--workspace", str(tmp_path), "sh", "-c", "pwd; echo x > made")
    assert done.stdout == f"{tmp_path}\n".encode()
    assert (tmp_path / "made").read_text() == "x\n"
    done = daemon.exec("--workspace", f"{tmp_path}:ro", "touch", "other")
    assert done.returncode == 1
    assert daemon.exec("--workspace", ".", "sh", "-c", "cat made; pwd", cwd=tmp_path).stdout == f"x\n{tmp_path}\n".encode()
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["made"]


def test_the_network(daemon):
    inside = "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort"
    assert daemon.exec("--net", "none", "sh", "-c", inside).stdout == b"lo\n"
    host = subprocess.run(["sh", "-c", inside], capture_output=True, check=True).stdout
    assert daemon.exec("--net", "host", "sh", "-c", inside).stdout == host


def test_a_tenant_has_a_cgroup_of_its_own(daemon):
    done = daemon.exec("--tenant", "some.one", "--", "true")
    assert done.returncode == 0
    assert (daemon.cgroup / "tenant-some.one").is_dir()


def test_the_processes_are_bounded(daemon):
    script = (
        "import os, time\nn = 0\ntry:\n  while n < 100:\n    if not os.fork(): time.sleep(60)\n    n += 1\n"
        "except OSError: print(n)"
    )
    done = daemon.exec("--pids", "10", "--best-effort", PYTHON, "-c", script)
    assert 5 <= int(done.stdout) <= 10
