# SPDX-License-Identifier: Apache-2.0
"""Bounded capture through a real pipe: whatever the pieces, head and tail are exact and the rest is counted."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun.capture import Capture

MARK = re.compile(rb"\n\[agentrun: (\d+) bytes cut\]\n")


def captured(pieces: list[bytes], bound: int) -> Capture:
    """A capture that has seen every piece, each drained before the next is written."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    capture = Capture(read, bound)
    try:
        for piece in pieces:
            while piece:
                piece = piece[os.write(write, piece[:65536]) :]
                assert capture.drain() is False
        os.close(write)
        write = -1
        capture.finish()
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    return capture


def expected(content: bytes, bound: int) -> bytes:
    if len(content) <= bound:
        return content
    head, tail = content[: bound // 2], content[len(content) - (bound - bound // 2) :]
    return head + b"\n[agentrun: %d bytes cut]\n" % (len(content) - bound) + tail


@given(st.lists(st.binary(max_size=80), max_size=20), st.integers(1, 200))
def test_any_pieces(pieces, bound):
    content = b"".join(pieces)
    capture = captured(pieces, bound)
    assert capture.content() == expected(content, bound)
    assert capture.truncated == (len(content) > bound)
    assert capture.total == len(content)


@given(st.integers(0, 400_000), st.integers(1, 70_000), st.sampled_from([1, 2, 3, 1000, 4096, 65_535, 100_000, 300_000]))
def test_long_output_keeps_its_ends(size, step, bound):
    content = (b"%06d " * (size // 7) % tuple(range(size // 7)))[:size]
    pieces = [content[at : at + step] for at in range(0, len(content), step)][:60]
    content = b"".join(pieces)
    assert captured(pieces, bound).content() == expected(content, bound)


@pytest.mark.parametrize("bound", [1, 2, 999, 1000, 1001])
def test_the_bound_itself(bound):
    for size in (bound - 1, bound, bound + 1):
        capture = captured([b"x" * size], bound)
        assert capture.truncated == (size > bound)
        assert len(MARK.sub(b"", capture.content())) == min(size, bound)


def test_what_is_kept_of_a_flood_stays_small():
    capture = captured([b"y" * 60_000] * 200, 10_000)
    assert capture.total == 12_000_000
    kept = sum(len(getattr(capture, name)) for name in ("_head", "_tail"))
    assert kept <= 10_000 + 10_000 * 2 + 65_536  # the bound, and what is cut in one go
    assert MARK.search(capture.content())[1] == b"11990000"


def test_a_bound_of_nothing_keeps_nothing():
    assert captured([b"abc"], 0).content() == expected(b"abc", 0)


def test_drain_says_when_the_stream_ended():
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    capture = Capture(read, 100)
    assert capture.drain() is False  # nothing there yet
    os.write(write, b"text")
    assert capture.drain() is False
    os.close(write)
    assert capture.drain() is True
    os.close(read)
    assert capture.content() == b"text"


def test_finish_takes_what_is_there_though_a_writer_lives():
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    capture = Capture(read, 100)
    os.write(write, b"last words")
    capture.finish()
    assert capture.content() == b"last words"
    os.close(read)
    os.close(write)
