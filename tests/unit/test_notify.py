# SPDX-License-Identifier: Apache-2.0
"""sd_notify and socket activation, against real sockets and the real `systemd-socket-activate`."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrun import notify as module
from agentrun.notify import LISTEN_VARIABLES, listen_fds, notify

ROOTS = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)


@pytest.fixture(autouse=True)
def no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", *LISTEN_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A manager's end of NOTIFY_SOCKET."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path if request.param == "path" else "\0" + path)
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", path if request.param == "path" else "@" + path)
        yield receiver


def test_notify_arrives_as_one_datagram(manager: socket.socket) -> None:
    assert notify("READY=1\nSTATUS=4 warm, 0 busy · ok")
    assert manager.recv(4096).decode() == "READY=1\nSTATUS=4 warm, 0 busy · ok"
    assert notify("STOPPING=1")
    assert manager.recv(4096) == b"STOPPING=1"


def test_notify_without_a_manager_is_false(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notify("READY=1") is False
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    assert notify("READY=1") is False


def test_notify_names_the_path_it_could_not_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "gone")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with pytest.raises(FileNotFoundError) as caught:
        notify("READY=1")
    assert caught.value.filename == path


@pytest.mark.parametrize("value", ["relative/path", "@", "/", "vsock:2:1234", "/" + "x" * 200])
def test_notify_refuses_a_malformed_address(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    with pytest.raises(ValueError, match="NOTIFY_SOCKET"):
        notify("READY=1")


# ---------------------------------------------------------------- listen_fds


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two descriptors as if passed: open, inheritable, consecutive."""
    start = 900
    fds = [start, start + 1]
    for fd in fds:
        os.dup2(0, fd, inheritable=True)
    monkeypatch.setattr(module, "LISTEN_FDS_START", start)
    yield fds
    for fd in fds:
        os.close(fd)


def announce(monkeypatch: pytest.MonkeyPatch, *values: str | None) -> None:
    for name, value in zip(LISTEN_VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)


def assert_variables_are_gone() -> None:
    assert not [name for name in LISTEN_VARIABLES if name in os.environ]


@pytest.mark.parametrize(("names", "labels"), [("api:debug", ["api", "debug"]), (None, ["unknown"] * 2)])
def test_listen_fds(monkeypatch: pytest.MonkeyPatch, passed: list[int], names: str | None, labels: list[str]) -> None:
    announce(monkeypatch, str(os.getpid()), "2", names)
    assert listen_fds() == list(zip(passed, labels, strict=True))
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in passed)
    assert_variables_are_gone()
    assert listen_fds() == [], "a second look finds nothing"


def test_listen_fds_for_another_process(monkeypatch: pytest.MonkeyPatch, passed: list[int]) -> None:
    announce(monkeypatch, str(os.getppid()), "2", "a:b")
    assert listen_fds() == []
    assert not any(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in passed), "not ours to touch"
    assert_variables_are_gone()


@pytest.mark.parametrize("values", [(None,) * 3, (None, "1", None), ("me", None, None), ("me", "0", "")])
def test_listen_fds_without_any(monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...]) -> None:
    announce(monkeypatch, *(str(os.getpid()) if value == "me" else value for value in values))
    assert listen_fds() == []
    assert_variables_are_gone()


@pytest.mark.parametrize(
    ("values", "variable"),
    [
        (("x", "1", "a"), "LISTEN_PID"),
        (("", "1", "a"), "LISTEN_PID"),
        (("-1", "1", "a"), "LISTEN_PID"),
        (("me", "x", "a"), "LISTEN_FDS"),
        (("me", "-1", "a"), "LISTEN_FDS"),
        (("me", " 1", "a"), "LISTEN_FDS"),
        (("me", "1_0", "a"), "LISTEN_FDS"),
        (("me", "99999999999", "a"), "LISTEN_FDS"),
        (("me", "2", "a"), "LISTEN_FDNAMES"),
        (("me", "2", "a:b:c"), "LISTEN_FDNAMES"),
        (("me", "0", "a"), "LISTEN_FDNAMES"),
    ],
)
@pytest.mark.usefixtures("passed")
def test_listen_fds_names_the_malformed_variable(monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], variable: str) -> None:
    announce(monkeypatch, *(str(os.getpid()) if value == "me" else value for value in values))
    with pytest.raises(ValueError, match=f"^{variable}="):
        listen_fds()
    assert_variables_are_gone()


def test_listen_fds_that_are_not_open(monkeypatch: pytest.MonkeyPatch, passed: list[int]) -> None:
    announce(monkeypatch, str(os.getpid()), "3", None)
    with pytest.raises(OSError, match="LISTEN_FDS=3") as caught:
        listen_fds()
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, f"fd {passed[-1] + 1}")


ACTIVATED = """
import json, os, socket
from agentrun.notify import listen_fds
found = listen_fds()
listener = socket.socket(fileno=found[0][0])
connection, _ = listener.accept()
connection.sendall(json.dumps([found, os.get_inheritable(3), sorted(os.environ)]).encode())
"""


def test_a_real_socket_activation(tmp_path: Path) -> None:
    tool = shutil.which("systemd-socket-activate")
    if tool is None:
        pytest.skip("systemd-socket-activate is not installed")
    path = tmp_path / "api.sock"
    command = [tool, f"--listen={path}", "--fdname=api", f"--setenv=PYTHONPATH={ROOTS}"]
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, sys.executable, "-c", ACTIVATED], stderr=stderr)
    with process, socket.socket(socket.AF_UNIX) as client:
        try:
            client.settimeout(20)
            deadline = time.monotonic() + 20
            while (refused := client.connect_ex(str(path))) in {errno.ENOENT, errno.ECONNREFUSED}:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
            assert refused == 0
            found, inheritable, environment = json.loads(client.makefile("rb").read() or b"null")
        finally:
            process.kill()
    assert found == [[3, "api"]]
    assert inheritable is False
    assert not set(LISTEN_VARIABLES) & set(environment)
