# SPDX-License-Identifier: Apache-2.0
"""A daemon played by the test, and the native client built and started against it. The fixtures are in conftest.py's reach."""

import os
import platform
import select
import shutil
import socket
import struct
import subprocess
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

needs_client = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the native client is written for x86-64"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) to build the client with"),
]
"""What every module that uses these fixtures has as its ``pytestmark``."""


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
