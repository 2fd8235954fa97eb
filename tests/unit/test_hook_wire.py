# SPDX-License-Identifier: Apache-2.0
"""The hook's own msgpack beside msgspec's, and what it makes of a daemon that answers oddly."""

import contextlib
import socket
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.protocol import Register, Unregister, decode, error_frame, reply_frame
from agentrun_shim import hook_wire
from agentrun_shim.hook_wire import NoDaemon, Refused, ask, pack, unpack

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(VALUES)
def test_what_it_packs_msgspec_reads(value):
    assert msgspec.msgpack.decode(pack(value)) == value


@given(VALUES)
def test_it_reads_what_msgspec_packs(value):
    data = msgspec.msgpack.encode(value)
    assert unpack(data, 0) == (value, len(data))


@pytest.mark.parametrize(
    "value", ["x" * 31, "x" * 32, "x" * 300, "x" * 70000, list(range(20)), {str(n): n for n in range(70000)}]
)
def test_it_reads_every_width_of_length(value):
    assert unpack(msgspec.msgpack.encode(value), 0)[0] == value


@given(st.binary(max_size=40))
def test_what_is_no_msgpack_is_an_error_of_a_known_kind(data):
    with contextlib.suppress(ValueError, IndexError, TypeError):
        unpack(data, 0)


def test_no_value_of_another_kind_is_packed():
    with pytest.raises(TypeError, match="float"):
        pack(1.5)


def test_its_requests_are_requests():
    request = {
        "v": 1, "op": "register", "id": "a", "bundle": "/b", "cgroup": "/c", "inode": 2**40, "policy": "test", "tenant": None,
        "hint": None, "fail": "", "started": False,
    }  # fmt: skip
    assert decode(pack(request)) == Register(v=1, id="a", bundle="/b", cgroup="/c", inode=2**40, policy="test")
    gone = {"v": 1, "op": "unregister", "id": "a", "bundle": "/b"}
    assert decode(pack(gone)) == Unregister(v=1, id="a", bundle="/b")


@contextlib.contextmanager
def answering(directory, *pieces: bytes, wait: bool = False):
    """Somebody at a socket who reads a request and answers these bytes."""
    path = str(directory / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            for piece in pieces:
                connection.sendall(piece)
            if wait:
                done.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        done.set()
        thread.join()
        listener.close()


def test_an_answer_in_pieces(tmp_path):
    frame = reply_frame({"write": {"memory.max": "1"}, "unenforced": [["a", "b"]]})
    with answering(tmp_path, frame[:3], frame[3:9], frame[9:]) as path:
        assert ask(path, {"v": 1, "op": "status"}) == {"write": {"memory.max": "1"}, "unenforced": [["a", "b"]]}


def test_a_refusal_is_the_daemons_own_words(tmp_path):
    with (
        answering(tmp_path, error_frame(2, "policy: there is no policy 'x'")) as path,
        pytest.raises(Refused, match="no policy 'x'"),
    ):
        ask(path, {"v": 1, "op": "status"})


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([], "closed the connection"),
        ([b"\xff\xff\xff\x7f"], "protocol"),
        ([b"\x01\0\0\0\xc1"], "protocol"),
        ([b"\x01\0\0\0\x80"], "protocol"),
        ([b"\x01\0\0\0\x05"], "protocol"),
    ],
)
def test_who_answers_something_else_is_no_daemon(tmp_path, pieces, why):
    with answering(tmp_path, *pieces) as path, pytest.raises(NoDaemon, match=why):
        ask(path, {"v": 1, "op": "status"})


def test_who_does_not_answer_is_no_daemon(tmp_path, monkeypatch):
    monkeypatch.setattr(hook_wire, "PATIENCE", 0.05)
    with answering(tmp_path, wait=True) as path, pytest.raises(NoDaemon, match="no answer within"):
        ask(path, {"v": 1, "op": "status"})


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_where_nobody_is_there_is_no_daemon(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(NoDaemon, match=r"No such file|Connection refused"):
        ask(str(tmp_path / name), {"v": 1, "op": "status"})
