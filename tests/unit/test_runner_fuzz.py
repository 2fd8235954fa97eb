# SPDX-License-Identifier: Apache-2.0
"""Spoilt RUN messages: the runner answers each with a step and an errno, ends, and never executes anything."""

import errno
import random
import socket
from collections import Counter

import pytest

from agentrun_shim.plan import HEADER_SIZE, Kind, Step
from tests.unit.plan_spoils import header, put
from tests.unit.zygote_support import SHELL, clone, good_run, send_run

pytestmark = pytest.mark.host


def test_a_good_run_executes(zygote):
    slot = clone(zygote)
    assert send_run(slot, good_run()) == b"EXECUTED\n"
    assert slot.event().kind is Kind.STARTED
    assert slot.event() is None
    assert slot.dispose() == [7, -9]


def spoil_run(rng: random.Random, good: bytes) -> tuple[str, bytes, int]:
    """A RUN that must be refused: what is wrong, the bytes, how many descriptors."""
    what = rng.choice(RUN_SPOILS)
    if what == "header":
        at = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15])
        return what, good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :], 3
    if what == "no header":
        return what, good[: rng.randrange(1, HEADER_SIZE)], 3
    if what == "cut":
        return what, good[: rng.randrange(HEADER_SIZE, len(good))], 3
    if what == "shorter":
        return what, header(good[: rng.randrange(HEADER_SIZE, len(good))]), 3
    if what == "longer":
        return what, header(good + rng.choice([b"\0", b"x", b"x\0", bytes(100), b"A=3\0" * 9])), 3
    if what == "too long":
        return what, put(good, 8, rng.choice([4 * 2**20 + 17, 2**31, 2**32 - 1])), 3
    if what == "counts":
        at, real = rng.choice([(20, 3), (24, 2)])
        return (
            what,
            put(good, HEADER_SIZE + at - 16, rng.choice([n for n in (0, 1, 4, 100, len(good), 2**31, 2**32 - 1) if n != real])),
            3,
        )
    if what == "unterminated":
        return what, good[:-1] + b"x", 3
    if what == "run together":
        ends = [at for at in range(40, len(good)) if good[at] == 0]
        at = rng.choice(ends)
        return what, good[:at] + b"x" + good[at + 1 :], 3
    if what == "too few":
        count = rng.randrange(3)
        return what, header(good, nfds=count), count
    if what == "too many":
        count = rng.choice([4, 5, 64, 65, 200])
        return what, header(good, nfds=count), count
    assert what == "flags"
    return what, put(good, HEADER_SIZE, rng.choice([1, 2, 3])), 3


RUN_SPOILS = (
    "header", "no header", "cut", "shorter", "longer", "too long", "counts", "unterminated", "run together", "too few",
    "too many", "flags",
)  # fmt: skip


def test_spoilt_runs_are_refused_and_nothing_is_executed(zygote):
    rng = random.Random(6)
    good = good_run()
    seen = Counter()
    for _ in range(240):
        what, message, fds = spoil_run(rng, good)
        slot = clone(zygote)
        output = send_run(slot, message, fds)
        events = [slot.event()]
        while events[-1]:
            events.append(slot.event())
        statuses = slot.dispose()
        assert output == b"", what
        assert [(event.kind, event.step) for event in events[:-1]] == [(Kind.FAILED, Step.MESSAGE)], (what, events)
        assert events[0].error in (errno.EPROTO, errno.EINVAL, errno.EMSGSIZE), (what, events)
        assert statuses == [127, -9]
        seen[what] += 1
    assert set(seen) == set(RUN_SPOILS)


def test_a_slot_that_is_let_go_ends_quietly(zygote):
    slot = clone(zygote)
    slot.control.shutdown(socket.SHUT_WR)
    assert slot.event() is None
    assert slot.dispose() == [0, -9]


@pytest.mark.parametrize(
    ("run", "fds", "step", "number"),
    [
        (good_run(cwd=b"/nonexistent"), 3, Step.WORKING_DIRECTORY, errno.ENOENT),
        (good_run(cwd=b""), 3, Step.WORKING_DIRECTORY, errno.ENOENT),
        (good_run(flags=1, nfds=1), 1, Step.TERMINAL, errno.ENOTSOCK),
        (good_run(flags=2, nfds=4, attach=b"x" * 5000), 4, Step.WORKSPACE, errno.ENAMETOOLONG),
        (good_run(flags=2, nfds=4, attach=b"/tmp/w"), 4, Step.WORKSPACE, None),
        (good_run(flags=2, nfds=4, attach=b""), 4, Step.WORKSPACE, None),
    ],
)
def test_a_run_that_cannot_be_names_its_step(zygote, run, fds, step, number):
    slot = clone(zygote)
    assert send_run(slot, run, fds) == b""
    event = slot.event()
    assert (event.kind, event.step) == (Kind.FAILED, step)
    assert event.error == number if number else event.error > 0
    assert slot.event() is None
    assert slot.dispose() == [127, -9]


@pytest.mark.parametrize(("argv", "number"), [
    ([b"/nonexistent"], errno.ENOENT), ([b"nonexistent"], errno.ENOENT), ([b""], errno.ENOENT), ([b"/etc"], errno.EACCES),
    ([b"/" + b"x" * 5000], errno.ENAMETOOLONG), ([b"/etc/hostname/x"], errno.ENOTDIR),
])  # fmt: skip
def test_what_cannot_be_executed(zygote, argv, number):
    slot = clone(zygote)
    assert send_run(slot, good_run(argv)) == b""
    events = [slot.event(), slot.event()]
    assert [event.kind for event in events] == [Kind.STARTED, Kind.FAILED]
    assert (events[1].step, events[1].error) == (Step.EXEC, number)
    assert slot.dispose() == [127, -9]


def test_a_path_too_long_is_not_cut_into_another(zygote):
    slot = clone(zygote)
    run = good_run([b"shXYZ", *SHELL[1:]], env=[b"PATH=/bin" + b"/" * 4088])
    output = send_run(slot, run)
    events = [slot.event(), slot.event()]
    slot.dispose()
    assert output == b""
    assert events[1].error in (errno.ENAMETOOLONG, errno.ENOENT)
