# SPDX-License-Identifier: Apache-2.0
"""Framing over a real socket pair: any split, any length, descriptors that are carried and never leaked; and decoding."""

import itertools
import os
import socket
import struct

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agentrun.protocol import (
    MAX_FDS,
    MAX_FRAME,
    Exec,
    Kill,
    Options,
    ProtocolError,
    Ps,
    Signal,
    Stats,
    Status,
    decode,
    error_frame,
    frame,
    one_line,
    receive_frame,
    reply_frame,
    result_frame,
)  # fmt: skip

pack = msgspec.msgpack.encode


def received(pieces: list[bytes], fds: list[int] = [], *, close: bool = True) -> tuple[bytes, list[int]] | None:  # noqa: B006
    """What receive_frame makes of pieces that arrive one after the other, the descriptors with the first."""

    async def main():
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            async with trio.open_nursery() as nursery:

                async def send():
                    for number, piece in enumerate(pieces):
                        if number == 0 and fds:
                            socket.send_fds(theirs._sock, [piece], fds)
                        else:
                            await theirs.send(piece) if len(piece) < 65536 else await send_all(theirs, piece)
                        await trio.testing.wait_all_tasks_blocked()  # the reader has taken it and waits for more
                    if close:
                        theirs.shutdown(socket.SHUT_WR)

                nursery.start_soon(send)
                with trio.fail_after(10):
                    try:
                        return await receive_frame(ours)
                    finally:
                        nursery.cancel_scope.cancel()

    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def send_all(sock, data):
    while data:
        data = data[await sock.send(data) :]


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


FRAME = frame({"v": 1, "op": "status"})


@pytest.mark.parametrize("at", range(1, len(FRAME)))
def test_a_frame_in_two_pieces(at):
    assert received([FRAME[:at], FRAME[at:]]) == (FRAME[4:], [])


def test_a_frame_byte_by_byte():
    assert received([FRAME[at : at + 1] for at in range(len(FRAME))]) == (FRAME[4:], [])


@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(1, 299), max_size=6))
def test_any_frame_in_any_pieces(body, cuts):
    data = struct.pack("<I", len(body)) + body
    ends = sorted({cut for cut in cuts if cut < len(data)} | {0, len(data)})
    assert received([data[a:b] for a, b in itertools.pairwise(ends)]) == (body, [])


@pytest.mark.parametrize("size", [65532, 65533, 1_000_000, MAX_FRAME])
def test_long_frames(size):
    body = os.urandom(size)
    assert received([struct.pack("<I", size) + body]) == (body, [])


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 2**32 - 1])
def test_a_length_that_cannot_be(file, length):
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes; 1 to {MAX_FRAME} are allowed"):
        received([struct.pack("<I", length) + b"x"], [file] * 3)


def test_nobody_said_anything():
    assert received([]) is None


@pytest.mark.parametrize("at", range(1, len(FRAME)))
def test_an_end_in_the_middle(file, at):
    missing = 4 - at if at < 4 else len(FRAME) - at
    with pytest.raises(ProtocolError, match=f"the connection ended {missing} bytes before the frame did"):
        received([FRAME[:at]], [file] * 2)


@pytest.mark.parametrize("count", [1, 2, MAX_FDS])
@pytest.mark.parametrize("pieces", [[FRAME], [FRAME[:1], FRAME[1:]]])
def test_descriptors_arrive_with_the_first_byte(file, count, pieces):
    body, fds = received(pieces, [file] * count)
    assert body == FRAME[4:]
    assert len(fds) == count
    for fd in fds:
        assert os.path.sameopenfile(fd, file)
        assert not os.get_inheritable(fd)
        os.close(fd)


@pytest.mark.parametrize("count", [MAX_FDS + 1, MAX_FDS + 2, 100])
def test_too_many_descriptors(file, count):
    with pytest.raises(ProtocolError, match=f"more than {MAX_FDS} descriptors"):
        received([FRAME], [file] * count)


def test_a_frame_too_many(file):
    with pytest.raises(ProtocolError, match="a second frame before the first was answered"):
        received([FRAME + b"x"], [file])


def test_descriptors_of_a_read_that_was_cancelled_are_closed(file):
    async def main():
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            socket.send_fds(theirs._sock, [FRAME[:5]], [file] * 4)
            with trio.move_on_after(30) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(receive_frame, ours)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught

    trio.run(main)


# ---------------------------------------------------------------- what a frame says


def test_every_request():
    assert decode(pack({"v": 1, "op": "exec", "argv": [b"ls"]})) == Exec(v=1, argv=[b"ls"])
    everything = {
        "v": 1, "op": "exec", "argv": [b"a", b"\xff"], "env": [b"A=1"],
        "fds": ["stdin", "stdout", "stderr", "workspace", "console"],
        "options": {
            "policy": "p", "cwd": "/", "timeout": "1", "memory": "1G", "cpus": "2", "pids": "3", "net": "none", "tenant": "t",
            "workspace": "ro", "best-effort": "1", "capture": "1",
        },
    }  # fmt: skip
    assert decode(pack(everything)) == Exec(
        v=1, argv=[b"a", b"\xff"], env=[b"A=1"], fds=["stdin", "stdout", "stderr", "workspace", "console"],
        options=Options(policy="p", cwd="/", timeout="1", memory="1G", cpus="2", pids="3", net="none", tenant="t", workspace="ro",
                        best_effort="1", capture="1"),
    )  # fmt: skip
    assert decode(pack({"v": 1, "op": "signal", "signal": 15})) == Signal(v=1, signal=15)
    assert decode(pack({"v": 1, "op": "kill", "id": "a"})) == Kill(v=1, id="a", signal=None)
    for request in (Status, Ps, Stats):
        assert decode(pack({"v": 1, "op": request.__name__.lower()})) == request(v=1)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"op": "status"}, "`v`"),
        ({"v": 2, "op": "status"}, r"\$\.v"),
        ({"v": 1}, "`op`"),
        ({"v": 1, "op": "dance"}, r"\$\.op"),
        ({"v": 1, "op": "status", "extra": 1}, "`extra`"),
        ({"v": 1, "op": "exec"}, "`argv`"),
        ({"v": 1, "op": "exec", "argv": ["text"]}, r"\$\.argv\[0\]|\$\.argv\[\.\.\.\]"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "fds": ["tty"]}, r"\$\.fds"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"colour": "red"}}, "`colour`"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"best_effort": "1"}}, "`best_effort`"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"timeout": 5}}, r"\$\.options\.timeout"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"capture": "2"}}, r"\$\.options\.capture"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"timings": "yes"}}, r"\$\.options\.timings"),
        ({"v": 1, "op": "exec", "argv": [b"x"], "options": {"best-effort": "0"}}, r"\$\.options\.best-effort"),
        ({"v": 1, "op": "kill"}, "`id`"),
        ([1], "object"),
    ],
)
def test_what_is_wrong_is_named(message, key):
    with pytest.raises(ProtocolError, match=f"^not a request of protocol version 1: .*({key})"):
        decode(pack(message))


VALUES = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(st.binary(max_size=60) | VALUES.map(pack))
def test_noise_is_refused(data):
    with pytest.raises(ProtocolError):
        decode(data)


def body(data: bytes) -> object:
    assert struct.unpack_from("<I", data)[0] == len(data) - 4
    return msgspec.msgpack.decode(data[4:])


def test_answers():
    assert body(result_frame(3, b"{}", None)) == {"v": 1, "op": "result", "exit": 3, "json": b"{}"}
    assert body(result_frame(3, b"{}", "a\nb")) == {"v": 1, "op": "result", "exit": 3, "json": b"{}", "message": "a?b"}
    assert body(error_frame(2, "no\x1b[2J")) == {"v": 1, "op": "error", "exit": 2, "message": "no?[2J"}
    assert body(reply_frame({"a": [1]})) == {"v": 1, "op": "reply", "data": {"a": [1]}}


@given(st.text(st.characters()))
def test_a_line_is_one_line_and_speaks_to_no_terminal(text):
    line = one_line(text)
    assert len(line) == len(text)
    assert all(a == b or b == "?" for a, b in zip(text, line, strict=True))
    assert len(line.splitlines()) <= 1
    assert line.isprintable()
    line.encode()


@pytest.mark.parametrize("text", ["\n", "\r", "\x1b", "\x00", "\x7f", "\x9b", "\u2028", "\u202e", "\udcff"])
def test_characters_that_do_something(text):
    assert one_line(f"a{text}b") == "a?b"
    assert one_line("grün: ok ✓") == "grün: ok ✓"
