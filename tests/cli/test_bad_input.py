# SPDX-License-Identifier: Apache-2.0
"""Whatever arrives at the socket or the command line: one clear line, the right code, and the daemon goes on."""

import contextlib
import os
import resource
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrun.policystore import PolicyStore
from agentrun.protocol import MAX_FRAME
from agentrun.tomltext import show_path
from tests.support import connect, eventually, exec_frame, frame, open_daemon, read_answer

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def serves_on(daemon, request):
    """After each test a normal call works, no call is left, and the daemon has not more descriptors than before."""
    if "fuzz" in request.node.name:
        yield
        return
    eventually(lambda: not daemon.calls())
    yield
    daemon.works()
    eventually(lambda: not daemon.calls())
    assert daemon.log() == ""


def send(daemon, data: bytes, fds=()):
    """The daemon's answer to bytes after which we say nothing more."""
    with connect(daemon.socket) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(sock, [data], fds)
            sock.shutdown(socket.SHUT_WR)
        return read_answer(sock)


def assert_refused(answer, *words: str) -> None:
    assert answer is not None, "the daemon hung up without a word"
    assert (set(answer), answer["v"], answer["op"], answer["exit"]) == ({"v", "op", "exit", "message"}, 1, "error", 2)
    assert answer["message"].isprintable()
    assert len(answer["message"]) < 500
    for word in words:
        assert word in answer["message"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0", "the connection ended"),
        (b"\1\0\0\0", "the connection ended"),
        (b"\x10\0\0\0abc", "the connection ended 13 bytes before the frame did"),
        (exec_frame(b"true")[:-1], "the connection ended 1 bytes"),
        (b"\0\0\0\0", "a frame of 0 bytes"),
        (struct.pack("<I", MAX_FRAME + 1), f"a frame of {MAX_FRAME + 1} bytes"),
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "a frame of"),
        (b"\1\0\0\0\xc1", "not a request"),
        (struct.pack("<I", 3) + b"\xa2hi", "not a request"),
        (struct.pack("<I", 1) + b"\x80", "not a request"),
        (struct.pack("<I", 100_000) + b"\x91" * 100_000, "not a request"),
        (struct.pack("<I", 5) + b"\xdf\xff\xff\xff\xff", "not a request"),
        (frame([1, 2]), "not a request"),
        (frame(None), "not a request"),
        (frame({"v": 1}), "op"),
        (frame({"op": "exec", "argv": [b"true"]}), "v"),
        (frame({"v": 2, "op": "status"}), "v"),
        (frame({"v": "1", "op": "status"}), "v"),
        (frame({"v": 1, "op": "nope"}), "nope"),
        (frame({"v": 1, "op": 7}), "op"),
        (frame({"v": 1, "op": "status", "more": 1}), "more"),
        (frame({"v": 1, "op": "signal", "signal": 9}), "a signal before a call"),
        (frame({"v": 1, "op": "kill"}), "id"),
        (frame({"v": 1, "op": "kill", "id": "nope"}), "no call 'nope' runs"),
        (frame({"v": 1, "op": "kill", "id": 5}), "id"),
        (frame({"v": 1, "op": "kill", "id": "\x1b[2J\n"}), "no call"),
        (frame({1: 2}), "not a request"),
    ],
)
def test_frames(daemon, data, words):
    assert_refused(send(daemon, data), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"argv": []}, "no command"),
        ({"argv": [b""]}, "no command"),
        ({"argv": [b"echo", b"a\0b"]}, "NUL"),
        ({"argv": "true"}, "argv"),
        ({"argv": [1]}, "argv"),
        ({"argv": None}, "argv"),
        ({"env": [b"A\0=x"]}, "NUL"),
        ({"env": [b"A=x\0"]}, "NUL"),
        ({"env": [b"=x"]}, "environment variable"),
        ({"env": {"A": "x"}}, "env"),
        ({"more": 1}, "more"),
        ({"options": []}, "options"),
        ({"options": {"nope": "1"}}, "nope"),
        ({"options": {"timeout": 5}}, "timeout"),
        ({"options": {"timeout": "nan"}}, "timeout"),
        ({"options": {"timeout": "-1"}}, "timeout"),
        ({"options": {"memory": "0"}}, "memory"),
        ({"options": {"cwd": "a\0b"}}, "NUL"),
        ({"options": {"workspace": "rx"}}, "workspace"),
        ({"options": {"workspace": "rw"}}, "the option workspace without a descriptor of that name"),
        ({"options": {"capture": "2"}}, "capture"),
        ({"options": {"best-effort": "yes"}}, "best-effort"),
        ({"options": {"timings": "0"}}, "timings"),
        ({"options": {"tenant": ""}}, "tenant: '' is no name"),
        ({"options": {"net": "egress"}}, "names no hosts for egress to reach"),
        ({"options": {"policy": "\x1b[2J\n\0"}}, "policy"),
        ({"options": {"tenant": "../../x"}}, "tenant"),
        ({"options": {"tenant": "x" * 100_000}}, "tenant"),
        ({"options": {"net": "x" * 100_000}}, "net"),
        ({"fds": ["stdin"]}, "0 descriptors came, 1 are named"),
        ({"fds": ["nope"]}, "fds"),
    ],
)
def test_requests(daemon, changes, words):
    assert_refused(send(daemon, exec_frame(**changes)), words)


@pytest.mark.parametrize(
    ("names", "count", "words"),
    [([], 1, "1 descriptors came, 0"), (["stdin"], 2, "2 descriptors came, 1"), (["stdin"] * 2, 2, "fds: named twice: stdin"),
     (["stdin"], 17, "more than 16"), (["stdin"], 200, "more than 16")],
)  # fmt: skip
def test_descriptors_that_do_not_fit_their_names(daemon, names, count, words):
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    for _ in range(5):
        assert_refused(send(daemon, exec_frame(fds=names), [0] * count), words)
    assert eventually(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before + 4)


def test_a_workspace_that_is_no_directory(daemon, tmp_path):
    for opened in ("/etc/passwd", "/usr", "/proc", "/dev/null", "/"):
        fd = os.open(opened, os.O_PATH)
        assert_refused(send(daemon, exec_frame(fds=["workspace"]), [fd]), "workspace")
        os.close(fd)
    read, write = os.pipe()
    assert_refused(send(daemon, exec_frame(fds=["workspace"]), [read]), "workspace")
    os.close(read)
    os.close(write)


def test_a_console_that_is_no_socket(daemon):
    """Nothing that hangs: the terminal cannot be handed over, and the answer says so."""
    with open("/dev/null", "r+b") as null:
        sock = connect(daemon.socket)
        with sock:
            socket.send_fds(sock, [exec_frame(options={}, fds=["console"])], [null.fileno()])
            answer = read_answer(sock)
    assert answer["op"] == "error"
    assert answer["exit"] in (2, 125)
    assert "terminal" in answer["message"]


def test_a_client_that_says_nothing_is_let_go():
    with open_daemon() as daemon, connect(daemon.socket) as silent, connect(daemon.socket) as slow:
        slow.send(b"\x10\0")
        daemon.works()
        for sock in (silent, slow):
            sock.settimeout(30)
            assert_refused(read_answer(sock), "no request within 10 s")
        daemon.works()


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 5, 20, None])
def test_a_client_that_vanishes(daemon, cut):
    """At each point of its request, and just after it."""
    data = exec_frame(b"sleep", b"300")
    for _ in range(5):
        with connect(daemon.socket) as sock:
            sock.sendall(data[:cut])
    for _ in range(5):
        sock = connect(daemon.socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(data[:cut])
        sock.close()
    eventually(lambda: not daemon.calls())


def test_a_client_that_vanishes_with_its_answer_unread(daemon):
    for _ in range(5):
        with connect(daemon.socket) as sock:
            sock.sendall(exec_frame(b"head", b"-c", b"1000000", b"/dev/zero"))
            sock.recv(1)


def test_a_second_request_too_early_gets_no_answer_of_its_own(daemon):
    """One connection, one request, one answer (``read_answer`` sees to it); only a signal may follow a call."""
    assert send(daemon, frame({"v": 1, "op": "status"}) * 2)["op"] in ("reply", "error")


def test_frames_that_follow_a_call(daemon):
    """Signals are passed on; another request, or rubbish, ends neither the daemon nor lies about the call."""
    script = b"trap 'exit 7' USR1; while :; do sleep 0.02; done"
    with connect(daemon.socket) as sock:
        sock.sendall(exec_frame(b"sh", b"-c", script))
        eventually(daemon.calls)
        for number in (0, -1, 65, 10_000, 2**40):
            sock.sendall(frame({"v": 1, "op": "signal", "signal": number}))
        sock.sendall(frame({"v": 1, "op": "status"}))
        assert len(daemon.calls()) == 1
        eventually(lambda: [daemon.ask(op="kill", id=call["id"], signal=10) for call in daemon.calls()] == [])
        assert read_answer(sock)["exit"] in (7, 138)
    with connect(daemon.socket) as sock:
        sock.sendall(exec_frame(b"sleep", b"300"))
        eventually(daemon.calls)
        sock.sendall(b"\xff" * 1000)
        assert_refused(read_answer(sock), "a frame of 4294967295 bytes")
    eventually(lambda: not daemon.calls())


@pytest.mark.parametrize(("data", "words"), [(frame("rubbish"), "not a request"), (frame({"v": 1, "op": "dance"}), "dance"),
                                             (b"\x10\0\0\0abc", "the connection ended 13 bytes before")])  # fmt: skip
@pytest.mark.parametrize("at_once", [True, False])
def test_rubbish_after_a_call_ends_it_and_says_so(daemon, data, words, at_once):
    with connect(daemon.socket) as sock:
        sock.sendall(exec_frame(b"sleep", b"300") + (data if at_once else b""))
        if not at_once:
            eventually(daemon.calls)
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert_refused(read_answer(sock), words)
    eventually(lambda: not daemon.calls())


@pytest.mark.parametrize(
    ("args", "code", "err"),
    [
        (["--nope", "true"], 2, "agentrun: unknown option '--nope' (see agentrun exec --help)\n"),
        (["-x"], 2, "agentrun: unknown option '-x' (see agentrun exec --help)\n"),
        (["--n\nope", "x"], 2, "agentrun: unknown option '--n?ope' (see agentrun exec --help)\n"),
        ([], 2, "agentrun: no command given (see agentrun exec --help)\n"),
        (["--"], 2, "agentrun: no command given (see agentrun exec --help)\n"),
        (["--timeout"], 2, "agentrun: option '--timeout' needs a value (see agentrun exec --help)\n"),
        (["--json=1", "true"], 2, "agentrun: option '--json' takes no value (see agentrun exec --help)\n"),
        (["--env", "=x", "true"], 2, "agentrun: option '--env' needs NAME or NAME=VALUE (see agentrun exec --help)\n"),
        (["--workspace", "/nowhere", "true"], 2, "agentrun: workspace /nowhere: No such file or directory\n"),
        (["--workspace", "/etc/passwd", "true"], 2, "agentrun: workspace /etc/passwd: Not a directory\n"),
        (["--workspace", "/usr", "true"], 2, "agentrun: workspace /usr: a system directory cannot be a workspace\n"),
        (["--memory", "lots", "true"], 2, "agentrun: --memory: 'lots' is not a size (say 512M or 2G)\n"),
        (["--memory", "-5", "true"], 2, "agentrun: --memory: '-5' is not a size (say 512M or 2G)\n"),
        (["--memory", "99999999T", "true"], 2, "agentrun: --memory: '99999999T' is not a size (say 512M or 2G)\n"),
        (["--pids", "0", "true"], 2, "agentrun: --pids: '0' is not a whole number from 1 to 4194304\n"),
        (["--pids", "1.5", "true"], 2, None),
        (["--cpus", "many", "true"], 2, None),
        (["--timeout", "1e999", "true"], 2, None),
        (
            ["--policy", "nope", "true"],
            2,
            'agentrun: policy: there is no policy "nope" (known: {known})\n',
        ),
        (["--net", "all", "true"], 2, "agentrun: net: 'all' is not known (none, host or egress)\n"),
        (["--net", "egress", "true"], 2, "agentrun: --net: policy default names no hosts for egress to reach (net.allow)\n"),
        (["--tenant", "a/b", "true"], 2, None),
        (["--tenant", "", "true"], 2, None),
        ([""], 2, "agentrun: there is no command to run\n"),
    ],
)
def test_command_lines(daemon, args, code, err):
    done = daemon.exec(*args, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("agentrun: ")
    assert done.stderr.count("\n") == 1
    if err is not None:
        # This machine and this user may have policies of their own.
        assert done.stderr == err.format(known=", ".join(map(show_path, PolicyStore().names())))


@pytest.mark.parametrize(
    ("count", "code", "words"),
    [
        (10, 0, ""),
        (30, 126, "agentrun: true: Argument list too long\n"),
        (50, 126, "agentrun: Argument list too long: the command"),
    ],
)
def test_an_environment_of_megabytes(daemon, count, code, words):
    """100 kB each; the kernel takes 2 MiB at the usual stack limit, and up to 6 MiB from a caller who has a higher one."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    options = [f"--env=V{number}={'x' * 100_000}" for number in range(count)]
    done = daemon.exec(*options, "--", "true", text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, hard)))  # fmt: skip
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == (1 if code else 0)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda body: struct.pack("<I", len(body)) + body),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats()
            | st.binary(max_size=20)
            | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["v", "op", "argv", "env", "options", "fds", "id", "signal"]), inner, max_size=6),
        ).map(frame),
        st.builds(lambda at, byte: exec_frame(b"true")[:at] + bytes([byte]) + exec_frame(b"true")[at + 1 :],
                  st.integers(0, len(exec_frame(b"true")) - 1), st.integers(0, 255)),
    )
)  # fmt: skip
def test_fuzz(daemon, data):
    answer = send(daemon, data)
    if answer is not None:
        assert answer["op"] in ("error", "result", "reply")
        if answer["op"] == "error":
            assert answer["exit"] in (2, 75, 125)
            assert answer["message"].isprintable()
    assert daemon.process.poll() is None
    assert daemon.ask(op="ps")["op"] == "reply"
