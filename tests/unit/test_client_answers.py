# SPDX-License-Identifier: Apache-2.0
"""The native client against a daemon played by the test: every answer, every exit code, every line it can print."""

import json
import os
import random
import signal
import struct

import msgspec
import pytest

from tests.unit.client_support import MALFORMED, WENT_AWAY, finish, frame, needs_client

pytestmark = needs_client

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
    struct.pack("<I", 0), struct.pack("<I", 16_777_217), frame([1]), frame({}), frame({"op": "result", "exit": 0}),
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
