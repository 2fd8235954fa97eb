# SPDX-License-Identifier: Apache-2.0
"""The native client against a daemon played by the test: every frame, every exit code, every line it can print."""

import fcntl
import json
import os
import platform
import pty
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import tty
from pathlib import Path

import msgspec
import pytest

NATIVE = Path(__file__).resolve().parents[2] / "shim" / "native"
FLAGS = (
    "-std=c11 -Os -ffreestanding -fno-stack-protector -fno-asynchronous-unwind-tables -fno-pic -no-pie -nostdlib "
    "-static -Wall -Wextra -Werror"
)
WENT_AWAY = "agentrun: the daemon went away during the call; the tool call was killed with it\n"
MALFORMED = "agentrun: malformed answer from the daemon\n"

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the native client is written for x86-64"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) to build the client with"),
]


class Exec(msgspec.Struct, forbid_unknown_fields=True):
    v: int
    op: str
    argv: list[bytes]
    env: list[bytes]
    options: dict[str, str]
    fds: list[str]


class Call:
    """One accepted connection, its request read."""

    def __init__(self, conn: socket.socket):
        self.conn = conn
        data, fds, _, _ = socket.recv_fds(conn, 65536, 16)
        data += self.recv(4 + struct.unpack_from("<I", data)[0] - len(data))
        self.request = msgspec.msgpack.decode(data[4:], type=Exec)
        assert self.request.v == 1
        assert self.request.op == "exec"
        assert len(self.request.fds) == len(fds)
        self.fds = dict(zip(self.request.fds, fds, strict=True))

    def recv(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += (piece := self.conn.recv(count - len(data)))
            assert piece, "the client hung up"
        return data

    def read_message(self):
        return msgspec.msgpack.decode(self.recv(struct.unpack("<I", self.recv(4))[0]))

    def send(self, data: bytes):
        self.drop_fds()  # or the client's reader would wait for our end of its pipes
        self.conn.sendall(data)

    def answer(self, **answer):
        self.send(frame(answer))

    def drop_fds(self):
        while self.fds:
            os.close(self.fds.popitem()[1])

    def close(self):
        self.drop_fds()
        self.conn.close()


class Daemon:
    def __init__(self, path: Path):
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(20)
        self.calls: list[Call] = []

    def accept(self) -> Call:
        conn, _ = self.listener.accept()
        conn.settimeout(20)
        self.calls.append(Call(conn))
        return self.calls[-1]

    def nobody_called(self) -> bool:
        return not select.select([self.listener], [], [], 0)[0]


def frame(message) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(body)) + body


@pytest.fixture(scope="session")
def agentrun(tmp_path_factory):
    path = tmp_path_factory.mktemp("client") / "agentrun"
    sources = [*map(str, sorted(NATIVE.glob("client*.c"))), str(NATIVE / "start.c")]
    subprocess.run(["cc", *FLAGS.split(), "-o", str(path), *sources], check=True)
    return path


@pytest.fixture
def daemon(tmp_path):
    daemon = Daemon(tmp_path / "sock")
    yield daemon
    for call in daemon.calls:
        call.close()
    daemon.listener.close()


@pytest.fixture
def start(agentrun, daemon):
    """Start `agentrun exec` with the test's daemon; anything still running at the end is killed."""
    clients = []

    def start(*args, **popen):
        popen = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        env = {"AGENTRUN_SOCKET": str(daemon.path), **popen.pop("env", {})}
        clients.append(subprocess.Popen([agentrun, "exec", *args], env=env, **popen))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.wait()
        for pipe in (client.stdin, client.stdout, client.stderr):
            if pipe:
                pipe.close()


def finish(client):
    out, err = client.communicate(timeout=20)
    return client.returncode, (out or b"").decode(), (err or b"").decode()


# ---------------------------------------------------------------- the request


def test_request_carries_everything(start, daemon, tmp_path):
    workspace = tmp_path / "w"
    workspace.mkdir()
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("in", "out", "err")]
    client = start(
        *("--policy", "strict", "--cwd=/src", "--timeout", "2.5", "--memory=1G", "--cpus", "2", "--pids", "9"),
        *("--net", "none", "--tenant", "t", "--best-effort", f"--workspace={workspace}:ro", "--policy=last"),
        *("--env", "A=1=2", "--env=B=", "--env", "HOME", "--env", "UNSET", "--", "prog", "--json", b"\xff", ""),
        stdin=files[0], stdout=files[1], stderr=files[2], env={"HOME": "/h", "HOMEX": "no"},
    )  # fmt: skip
    call = daemon.accept()
    assert call.request.argv == [b"prog", b"--json", b"\xff", b""]
    assert call.request.env == [b"A=1=2", b"B=", b"HOME=/h"]
    assert call.request.options == {
        "policy": "last", "cwd": "/src", "timeout": "2.5", "memory": "1G", "cpus": "2", "pids": "9", "net": "none",
        "tenant": "t", "best-effort": "1", "workspace": "ro",
    }  # fmt: skip
    assert call.request.fds == ["stdin", "stdout", "stderr", "workspace"]
    for name, file in zip(("stdin", "stdout", "stderr"), files, strict=True):
        assert os.path.sameopenfile(call.fds[name], file)
    assert os.path.samestat(os.fstat(call.fds["workspace"]), workspace.stat())
    assert fcntl.fcntl(call.fds["workspace"], fcntl.F_GETFL) & os.O_PATH
    call.answer(op="result", exit=3, json=b"{}")
    assert finish(client)[0] == 3
    assert [os.fstat(file).st_size for file in files] == [0, 0, 0]
    for file in files:
        os.close(file)


@pytest.mark.parametrize(("given", "mode"), [("{}", "rw"), ("{}:rw", "rw"), ("{}:ro", "ro"), ("{}:x", None)])
def test_workspace_mode(start, daemon, tmp_path, given, mode):
    client = start("--workspace", given.format(tmp_path), "true")
    if mode is None:
        assert finish(client)[::2] == (2, f"agentrun: workspace {tmp_path}:x: No such file or directory\n")
    else:
        assert daemon.accept().request.options == {"workspace": mode}


def test_command_without_dashes_keeps_its_options(start, daemon):
    start("ls", "--policy", "x", "--", "-h")
    request = daemon.accept().request
    assert (request.argv, request.options, request.env) == ([b"ls", b"--policy", b"x", b"--", b"-h"], {}, [])


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_closed_stdio_is_not_passed_and_not_reused(start, daemon, tmp_path, closed):
    def close():
        for fd in closed:
            os.close(fd)

    client = start("--workspace", tmp_path, "--result", tmp_path / "r", "true", preexec_fn=close)
    call = daemon.accept()
    kept = [name for fd, name in enumerate(("stdin", "stdout", "stderr")) if fd not in closed]
    assert call.request.fds == [*kept, "workspace"]
    assert os.path.samestat(os.fstat(call.fds["workspace"]), tmp_path.stat())
    assert all(os.readlink(f"/proc/{client.pid}/fd/{fd}") == "/dev/null" for fd in closed)
    call.answer(op="result", exit=0, json=b"{}")
    assert finish(client)[0] == 0


def test_large_command_line(start, daemon):
    args = [bytes([65 + i]) * 100_000 for i in range(15)]
    client = start("cat", *args)
    call = daemon.accept()
    assert call.request.argv == [b"cat", *args]
    assert call.request.fds == ["stdin", "stdout", "stderr"]
    call.answer(op="result", exit=0, json=b"{}")
    assert finish(client)[0] == 0


def test_command_line_over_the_frame_limit(start, daemon):
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard not in (-1, resource.RLIM_INFINITY):
        pytest.skip("needs an unlimited hard stack limit to pass 4 MiB of arguments")
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        client = start("cat", *["x" * 131_000] * 33)
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    code, _, err = finish(client)
    size = err.split("take ")[1].split()[0]
    assert abs(int(size) - 33 * 131_005 - 130) < 60  # every argument has a head of five bytes
    text = f"the command line and environment take {size} bytes; the limit is 4194304"
    assert code == 126
    assert err == f"agentrun: Argument list too long: {text}\n"
    assert daemon.nobody_called()


# ---------------------------------------------------------------- wrong usage

SEE = " (see agentrun exec --help)"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--foo", "ls"], "unknown option '--foo'" + SEE),
        (["--foo=1", "ls"], "unknown option '--foo'" + SEE),
        (["-x", "ls"], "unknown option '-x'" + SEE),
        (["--capture", "ls"], "unknown option '--capture'" + SEE),
        (["--json=1", "ls"], "option '--json' takes no value" + SEE),
        (["--cwd"], "option '--cwd' needs a value" + SEE),
        (["--cwd", "--", "ls"], "option '--cwd' needs a value" + SEE),
        (["--env", "=x", "ls"], "option '--env' needs NAME or NAME=VALUE" + SEE),
        ([], "no command given" + SEE),
        (["--json", "--"], "no command given" + SEE),
        (["--workspace", "/dev/null", "ls"], "workspace /dev/null: Not a directory"),
        (["--workspace", "/a\nb", "ls"], "workspace /a?b: No such file or directory"),
        (["--result", "/nonexistent/r", "ls"], "result /nonexistent/r: No such file or directory"),
        (["--result", "/", "ls"], "result /: Is a directory"),
    ],
)
def test_refused_before_anything_runs(start, daemon, args, message):
    assert finish(start(*args)) == (2, "", f"agentrun: {message}\n")
    assert daemon.nobody_called()


def test_json_needs_stdout(start):
    assert finish(start("--json", "ls", preexec_fn=lambda: os.close(1))) == (
        2, "", "agentrun: option '--json' needs an open standard output\n")  # fmt: skip


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(start, option):
    code, out, err = finish(start(option))
    assert code == 0
    assert not err
    assert out.startswith("usage: agentrun exec ")
    assert all(f"--{name}" in out for name in ("env", "tenant", "best-effort", "result", "no-daemon", "socket"))
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("option", [True, False])
def test_named_socket_is_never_replaced(start, tmp_path, option):
    def refused(path):
        args, env = (["--socket", path], {}) if option else ([], {"AGENTRUN_SOCKET": path})
        return finish(start(*args, "ls", env=env))

    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    for path, why in [("/none", "No such file or directory"), (f"{tmp_path}/stale", "Connection refused"),
                      ("/" + "x" * 107, "File name too long")]:  # fmt: skip
        assert refused(path) == (125, "", f"agentrun: cannot connect to {path}: {why}\n")


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("code", [0, 1, 127, 128, 255])
def test_exit_code(start, daemon, code):
    client = start("ls")
    daemon.accept().answer(op="result", exit=code, json=b"{}")
    assert finish(client) == (code, "", "")


def test_error_answer(start, daemon):
    client = start("ls")
    daemon.accept().answer(op="error", exit=75, message="the queue is full\x1b[2J\n: 8 of 8 wait")
    assert finish(client) == (75, "", "agentrun: the queue is full?[2J?: 8 of 8 wait\n")


def test_json_and_result_file(start, daemon, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as a Node.js parent leaves it: writes are partial, or refused
    client = start("--json", "--result", tmp_path / "r", "ls", stdout=writer)
    os.close(writer)
    call = daemon.accept()
    assert call.request.options == {"capture": "1"}
    assert call.request.fds == ["stdin"]
    assert (tmp_path / "r").read_bytes() == b""
    text = json.dumps({"out": "x" * (4_194_304 - 60)}).encode()
    call.answer(op="result", exit=4, json=text)
    with open(reader, "rb") as out:
        assert out.read() == text + b"\n"
    assert finish(client) == (4, "", "")
    assert (tmp_path / "r").read_bytes() == text + b"\n"


def test_result_file_alone_captures_nothing(start, daemon, tmp_path):
    client = start("--result", tmp_path / "r", "ls")
    call = daemon.accept()
    assert call.request.options == {}
    assert call.request.fds == ["stdin", "stdout", "stderr"]
    call.answer(op="result", exit=0, json=b'{"a":1}')
    assert finish(client) == (0, "", "")
    assert (tmp_path / "r").read_bytes() == b'{"a":1}\n'


@pytest.mark.parametrize(("args", "message"), [
    (["--json"], "cannot print the result: Broken pipe"),
    (["--result", "/dev/full"], "result /dev/full: No space left on device"),
])  # fmt: skip
def test_result_that_cannot_be_written(start, daemon, args, message):
    client = start(*args, "ls")
    call = daemon.accept()
    client.stdout.close()
    client.stdout = None
    call.answer(op="result", exit=0, json=b"{}")
    assert finish(client) == (125, "", f"agentrun: {message}\n")


def test_unknown_keys_are_skipped_and_pieces_joined(start, daemon):
    extensions = [msgspec.msgpack.Ext(5, b"z" * n) for n in (1, 2, 3, 4, 8, 16, 70000)]
    nested = [{"exit": [9, {"op": "error"}]}, [[]] * 20, {str(i): i for i in range(70000)}]
    strange = [None, True, -1, -(2**63), 2**64 - 1, 0.5, "x" * 70000, b"y" * 300, *nested, *extensions]
    client = start("--json", "ls")
    call = daemon.accept()
    data = frame({"before": strange, "op": "result", "new": strange, "exit": 7, "json": b"{}", "after": strange})
    for piece in (data[:1], data[1:4], data[4:5], data[5:90_000], data[90_000:]):
        call.send(piece)
    assert finish(client) == (7, "{}\n", "")


@pytest.mark.parametrize("data", [
    struct.pack("<I", 0), struct.pack("<I", 4_194_305), frame([1]), frame({}), frame({"op": "result", "exit": 0}),
    frame({"op": "result", "exit": 256, "json": b""}), frame({"op": "result", "exit": -1, "json": b""}),
    frame({"op": "result", "exit": "0", "json": b""}), frame({"op": "result", "exit": 0, "json": 1}),
    frame({"op": "error", "exit": 0}), frame({"op": "reply", "exit": 0, "json": b""}), frame({1: 2}),
    b"\5\0\0\0\xdf\xff\xff\xff\xff", b"\6\0\0\0\x81\xa1k\xdd\xff\xff", b"\4\0\0\0\x81\xa1k\xc1", b"\2\0\0\0\x81\xc6",
])  # fmt: skip
def test_malformed_answer(start, daemon, data):
    client = start("ls")
    daemon.accept().send(data)
    assert finish(client) == (125, "", MALFORMED)


def test_random_answers_never_crash(start, daemon):
    rng = random.Random(7)
    good = frame({"op": "result", "exit": 0, "json": b"{}", "more": [1.5, {"a": None}, "text"]})
    for round_ in range(400):
        if round_ % 2:
            body = rng.choice([b"", b"\x84\xa2op\xa6result", b"\x81\xa1x"]) + rng.randbytes(rng.randrange(1, 60))
            data = struct.pack("<I", len(body)) + body
        else:
            spoilt = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                spoilt[rng.randrange(4, len(spoilt))] = rng.randrange(256)
            data = bytes(spoilt)
        client = start("ls")
        call = daemon.accept()
        call.send(data)
        call.close()
        code, _, err = finish(client)
        assert code >= 0, data  # never by a signal
        assert (code == 125) == (err == MALFORMED), data
        assert code == 125 or round_ % 2 == 0, data  # a spoilt answer may still be an answer


@pytest.mark.parametrize("data", [b"", b"\7", b"\7\0\0\0\x82\xa2op"])
def test_daemon_goes_away(start, daemon, data):
    client = start("ls")
    call = daemon.accept()
    call.send(data)
    call.close()
    assert finish(client) == (125, "", WENT_AWAY)


def test_refusal_of_a_request_that_was_not_read(start, daemon):
    client = start("cat", *["x" * 100_000] * 10)
    conn, _ = daemon.listener.accept()
    conn.recv(10)
    conn.sendall(frame({"op": "error", "exit": 2, "message": "not to my taste"}))
    conn.close()
    assert finish(client) == (2, "", "agentrun: not to my taste\n")


# ---------------------------------------------------------------- signals


def test_signals_are_forwarded(start, daemon):
    client = start("ls")
    call = daemon.accept()
    for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2"):
        number = getattr(signal, "SIG" + name)
        client.send_signal(number)
        assert call.read_message() == {"v": 1, "op": "signal", "signal": number}
    call.answer(op="result", exit=130, json=b"{}")
    assert finish(client) == (130, "", "")


def test_ignored_signals_are_not_forwarded_and_others_end_the_client(start, daemon):
    client = start("ls", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    call = daemon.accept()
    client.send_signal(signal.SIGHUP)
    client.send_signal(signal.SIGINT)
    assert call.read_message()["signal"] == signal.SIGINT
    call.drop_fds()
    client.send_signal(signal.SIGALRM)
    assert finish(client) == (128 + signal.SIGALRM, "", "")
    assert call.conn.recv(1) == b""


# ---------------------------------------------------------------- the terminal


class Terminals:
    """The caller's terminal, with the client on it, and the tool's, whose master side the client gets."""

    def __init__(self, start, daemon, *args, **env):
        self.screen, self.caller = pty.openpty()
        termios.tcsetwinsize(self.caller, (33, 101))
        self.cooked = termios.tcgetattr(self.caller)
        self.tool = -1
        self.client = start(*args, "vi", stdin=self.caller, stdout=self.caller, stderr=self.caller, env=env)
        self.call = daemon.accept()

    def connect(self):
        master, self.tool = pty.openpty()
        tty.setraw(self.tool)
        console = socket.socket(fileno=self.call.fds.pop("console"))
        socket.send_fds(console, [b"x"], [master])
        console.close()
        os.close(master)
        os.write(self.tool, b"ready")
        assert self.read(self.screen, 5) == b"ready"  # from here on the caller's terminal is raw

    def close(self, *names: str):
        for name in names:
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    @staticmethod
    def read(fd: int, count: int) -> bytes:
        data = b""
        while len(data) < count and select.select([fd], [], [], 20)[0]:
            data += os.read(fd, count - len(data))
        return data

    def ticks(self) -> int:
        """Processor time the client has used, in hundredths of a second."""
        return sum(map(int, Path(f"/proc/{self.client.pid}/stat").read_text().split()[13:15]))

    def is_cooked(self) -> bool:
        return termios.tcgetattr(self.caller) == self.cooked


@pytest.fixture
def terminals(start, daemon):
    made = []

    def make(*args, **env):
        made.append(Terminals(start, daemon, *args, **env))
        return made[-1]

    yield make
    for t in made:
        t.close("screen", "caller", "tool")


def test_terminal_relays_both_ways(terminals):
    t = terminals(TERM="vt220")
    assert (t.call.request.fds, t.call.request.env) == (["console"], [b"TERM=vt220"])
    assert t.is_cooked()
    t.connect()
    assert termios.tcgetwinsize(t.tool) == (33, 101)
    assert not termios.tcgetattr(t.caller)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    os.write(t.screen, b"\x03ls\r\x1a\x04")  # keys are keys, not signals of ours
    assert t.read(t.tool, 6) == b"\x03ls\r\x1a\x04"
    termios.tcsetwinsize(t.caller, (10, 20))
    t.client.send_signal(signal.SIGWINCH)
    os.write(t.screen, b"!")
    assert t.read(t.tool, 1) == b"!"
    while termios.tcgetwinsize(t.tool) != (10, 20):
        assert t.client.poll() is None
    t.client.send_signal(signal.SIGTERM)
    assert t.call.read_message()["signal"] == signal.SIGTERM
    t.close("tool")
    t.call.answer(op="result", exit=9, json=b"{}")
    assert t.client.wait(20) == 9
    assert t.is_cooked()


def fill(fd: int, data: bytes) -> bytes:
    """Write until nobody takes more, and return what was written."""
    os.set_blocking(fd, False)
    written, refused = b"", 0
    while refused < 50:
        try:
            written += data[: os.write(fd, data)]
            refused = 0
        except BlockingIOError:
            refused += 1
            time.sleep(0.002)
    return written


@pytest.mark.parametrize("closed_first", [True, False])
def test_output_is_drained_after_the_answer(terminals, closed_first):
    t = terminals()
    t.connect()
    fill(t.screen, b"keys")
    data = fill(t.tool, bytes(range(251)) * 16)  # both terminals and the client are full, both ways
    t.client.send_signal(signal.SIGUSR1)
    assert t.call.read_message()["signal"] == signal.SIGUSR1
    if closed_first:
        t.close("tool")
    t.call.answer(op="result", exit=0, json=b"{}")
    ticks = t.ticks()
    with pytest.raises(subprocess.TimeoutExpired):  # longer than the client bears silence
        t.client.wait(0.8)
    assert t.ticks() - ticks < 20  # of 80: it waits, it does not spin
    assert t.read(t.screen, len(data)) == data
    assert t.client.wait(20) == 0
    assert t.is_cooked()


def test_a_tool_that_reads_no_keys_blocks_nothing(terminals):
    t = terminals()
    t.connect()
    typed = fill(t.screen, b"0123456789" * 50 + b"k")
    ticks = t.ticks()
    os.write(t.tool, b"output")
    assert t.read(t.screen, 6) == b"output"
    time.sleep(0.3)
    assert t.ticks() - ticks < 8  # of 30
    assert t.read(t.tool, len(typed)) == typed
    t.close("tool")
    t.call.answer(op="result", exit=0, json=b"{}")
    assert t.client.wait(20) == 0


@pytest.mark.parametrize("end", ["daemon", "alarm", "error"])
def test_terminal_is_restored_whatever_happens(terminals, end):
    t = terminals()
    t.connect()
    if end == "alarm":
        t.client.send_signal(signal.SIGALRM)
    elif end == "error":
        t.close("tool")
        t.call.answer(op="error", exit=125, message="broken")
    else:
        t.call.close()
    assert t.client.wait(20) == (128 + signal.SIGALRM if end == "alarm" else 125)
    assert t.is_cooked()
    expected = {"daemon": WENT_AWAY, "alarm": "", "error": "agentrun: broken\n"}[end].replace("\n", "\r\n").encode()
    assert t.read(t.screen, len(expected)) == expected


def test_console_that_is_never_made(terminals):
    t = terminals("--env", "TERM=x", TERM="vt220")
    assert t.call.request.env == [b"TERM=x"]
    t.call.answer(op="result", exit=6, json=b"{}")
    assert t.client.wait(0.4) == 6
    assert t.is_cooked()


def test_hang_up_of_the_callers_terminal(terminals):
    t = terminals()
    t.connect()
    t.close("caller", "screen")
    os.write(t.tool, b"nobody sees this" * 4096)  # and still it does not block
    t.close("tool")
    t.call.answer(op="result", exit=5, json=b"{}")
    assert t.client.wait(20) == 5


@pytest.mark.parametrize("option", ["--no-tty", "--json"])
def test_no_terminal_when_told(terminals, option):
    assert "console" not in terminals(option, TERM="x").call.request.fds


# ---------------------------------------------------------------- a private runtime, and the Python command line

CLI = f"""#!{sys.executable}
import json, os, signal, socket, struct, sys, time
from pathlib import Path
import msgspec
log = Path(os.environ["LOG"])
log.write_text(json.dumps(sys.argv[1:]))
if sys.argv[1] != "serve-one":
    sys.exit(42)
if os.environ.get("DIE"):
    sys.exit(int(os.environ["DIE"]))
blocked = [line for line in open("/proc/self/status") if line.startswith("SigBlk")][0]
conn = socket.socket(fileno=3)
data, fds, _, _ = socket.recv_fds(conn, 65536, 16)
send = lambda answer: conn.sendall(struct.pack("<I", len(b := msgspec.msgpack.encode(answer))) + b)
number = msgspec.msgpack.decode(conn.recv(4096)[4:])["signal"] if "WAIT" in os.environ else 0
send({{"op": "result", "exit": number or 11, "json": json.dumps({{
    "fds": len(fds), "session": os.getsid(0) == os.getpid(), "blocked": int(blocked.split()[1], 16),
    "stdio": [os.readlink(f"/proc/self/fd/{{fd}}") for fd in (0, 1)],
    "open": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))}}).encode()}})
assert conn.recv(1) == b""
time.sleep(0.2)
log.write_text("cleaned up")
"""


@pytest.fixture
def installed(agentrun, tmp_path):
    """The client copied to a directory of its own, agentrun-cli beside it, the environment for both."""
    shutil.copy(agentrun, tmp_path / "agentrun")
    (tmp_path / "agentrun-cli").write_text(CLI)
    (tmp_path / "agentrun-cli").chmod(0o755)
    return tmp_path / "agentrun", {"LOG": str(tmp_path / "log")}


def run(program, *args, env, **popen):
    return subprocess.run([program, *args], env=env, capture_output=True, text=True, timeout=20, **popen)


def test_private_runtime(installed):
    client, env = installed
    inherit = {"close_fds": False, "preexec_fn": lambda: os.dup2(0, 50)}
    done = run(client, "exec", "--no-daemon", "--json", "ls", env=env, **inherit)
    assert (done.returncode, done.stderr) == (11, "")
    seen = json.loads(done.stdout)
    assert (seen["fds"], seen["session"], seen["blocked"], seen["stdio"]) == (1, True, 0, ["/dev/null"] * 2)
    assert 50 not in seen["open"]
    assert Path(env["LOG"]).read_text() == "cleaned up"


def test_private_runtime_is_told_of_signals_and_waited_for(installed):
    client, env = installed
    env = {**env, "WAIT": "1"}
    proc = subprocess.Popen([client, "exec", "--no-daemon", "ls"], env=env, stdin=subprocess.DEVNULL)
    while not Path(env["LOG"]).exists():
        assert proc.poll() is None
    proc.send_signal(signal.SIGTERM)
    assert proc.wait(20) == signal.SIGTERM
    assert Path(env["LOG"]).read_text() == "cleaned up"


@pytest.mark.skipif(Path("/run/agentrun/agentrun.sock").exists(), reason="a daemon is installed on this machine")
def test_private_runtime_stands_in_for_a_missing_daemon(installed):
    client, env = installed
    assert run(client, "exec", "ls", env=env).returncode == 11


@pytest.mark.parametrize("status", [1, 125])
def test_private_runtime_that_dies(installed, status):
    client, env = installed
    done = run(client, "exec", "--no-daemon", "ls", env={**env, "DIE": str(status)})
    assert (done.returncode, done.stderr) == (125, WENT_AWAY)


@pytest.mark.parametrize("args", [["--version"], ["ps", "--x=1", ""], ["executable"]])
@pytest.mark.parametrize("beside", [True, False])
def test_everything_else_is_the_python_program(installed, tmp_path, args, beside):
    client, env = installed
    if not beside:
        (tmp_path / "bin").mkdir()
        (tmp_path / "agentrun-cli").rename(tmp_path / "bin" / "agentrun-cli")
        env = {**env, "PATH": f"/nonexistent::{tmp_path}/bin"}
    assert run(client, *args, env=env).returncode == 42
    assert json.loads(Path(env["LOG"]).read_text()) == args


@pytest.mark.parametrize("args", [[], ["ps"], ["exec", "--no-daemon", "ls"]])
def test_no_python_program(installed, args):
    client, env = installed
    (client.parent / "agentrun-cli").unlink()
    done = run(client, *args, env={**env, "PATH": "/nonexistent:"}, cwd="/")
    line = f"agentrun: cannot find agentrun-cli beside {client} or on PATH: is the package installed?\n"
    assert (done.returncode, done.stdout, done.stderr) == (125, "", line)
