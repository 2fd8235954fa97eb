# SPDX-License-Identifier: Apache-2.0
"""Spoilt messages: the zygote and its runners answer each with a step and an errno, and nothing is left of them."""

import errno
import os
import random
import socket
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from agentrun.cgroup.tree import find_base
from agentrun_shim import plan as plan_module
from agentrun_shim.plan import HEADER_SIZE, MAGIC, VERSION, Kind, Op, RunFlag, SlotFlag, Step, pack_op, pack_run, pack_slot, pack_userns
from tests.unit.zygote_support import (
    MAPS, OP_AT, PATIENCE, SPOILS, Gone, RawZygote, children, clone, collect, find, flip, header, host_plan, join_ops, put,
    ready_zygote, spoil_plan, split_ops, OP_IDS,
)  # fmt: skip

host = pytest.mark.host
NATIVE = Path(__file__).parents[2] / "shim" / "native"


@pytest.fixture(autouse=True)
def nothing_left():
    """No child and no descriptor more after a test than before it."""
    before, open_before = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.fixture
def zygote():
    """A zygote with the default policy's shape; at the end it is alive and still makes a correct slot."""
    zygote = ready_zygote()
    open_before = zygote.descriptors()
    yield zygote
    assert zygote.alive
    assert zygote.descriptors() == open_before == ["0", "1", "2", "3", "4"]
    slot = clone(zygote)
    send_run(slot, good_run())
    assert [slot.event().kind, slot.event()] == [Kind.STARTED, None]
    assert slot.dispose() == [7, -9]
    zygote.close()


# ---------------------------------------------------------------- the zygote


@host
def test_noise(zygote):
    rng = random.Random(1)
    for size in [*range(1, 64), *(rng.randrange(64, 70_000) for _ in range(137))]:
        done, fds = zygote.ask(rng.randbytes(size))
        assert (done.error, done.step, fds) == (errno.EPROTO, Step.MESSAGE, [])


@host
def test_wrong_headers(zygote):
    rng = random.Random(2)
    good = [pack_slot(SlotFlag(0), MAPS, 1), pack_userns(tuple(MAPS)), pack_slot(SlotFlag.LEAF, MAPS, 2)]
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    for _ in range(500):
        message = flip(rng, rng.choice(good), 0, HEADER_SIZE)
        if message in good:
            continue
        kind, length, nfds = struct.unpack_from("<6xHII", message)
        count = rng.randrange(4)
        sound = message[:6] == struct.pack("<IH", MAGIC, VERSION) and (length, nfds) == (len(message), count)
        done, received = zygote.ask(message, fds[:count])
        assert received == []
        assert (done.error, done.step) in {(errno.EPROTO, Step.MESSAGE), *({(errno.EINVAL, Step.MESSAGE)} if sound and kind in (2, 3) else ())}
    for fd in fds:
        os.close(fd)


@host
@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64, 65, 100, 253])
def test_descriptors_that_were_not_asked_for(zygote, count):
    with socket.socket() as any_socket:
        fds = [any_socket.fileno()] * count
        slot = pack_slot(SlotFlag(0), MAPS, 1)
        wrong = [slot] if count != 1 else []
        for message in [*wrong, header(slot, nfds=count + 1), b"x" * 20, *([header(slot, nfds=count)] if 1 != count <= 64 else [])]:
            done, received = zygote.ask(message, fds)
            assert (done.step, received) == (Step.MESSAGE, [])
            assert done.error in (errno.EPROTO, errno.EINVAL)


@host
def test_a_second_shape(zygote):
    with host_plan() as (plan, root):
        done, _ = zygote.ask(plan, root.fds)
    assert (done.error, done.step) == (errno.EALREADY, Step.MESSAGE)


def spoil_maps(rng: random.Random, message: bytes) -> bytes:
    choice = rng.randrange(4)
    if choice == 0:  # a count that is not the number of maps
        return put(message, HEADER_SIZE + 4, rng.choice([0, 1, 3, 64, 65, 2**28, 2**31, 2**32 - 1]))
    if choice == 1:
        return header(message[: rng.randrange(HEADER_SIZE, len(message))])
    if choice == 2:
        return header(message + rng.randbytes(rng.randrange(1, 40)))
    return header(message + rng.randbytes(16) * 64)


@host
def test_spoilt_slots_and_namespaces(zygote):
    rng = random.Random(3)
    ours, theirs = socket.socketpair()
    for _ in range(400):
        for message, fds in ((pack_slot(SlotFlag(0), MAPS, 1), [theirs.fileno()]), (pack_userns(tuple(MAPS)), [])):
            done, received = zygote.ask(spoil_maps(rng, message), fds)
            assert (done.error, done.step, done.init, done.runner, received) == (errno.EINVAL, Step.MESSAGE, 0, 0, [])
    ours.close()
    theirs.close()


@host
def test_maps_the_kernel_refuses(zygote):
    ours, theirs = socket.socketpair()
    bad = [
        [(False, 0, 5, 0), (True, 0, 5, 0)],  # nothing
        [(False, 0, 5, 1), (True, 0, 2**32 - 1, 2)],  # beyond the last id
        [(False, 0, 5, 10), (False, 5, 50, 10), (True, 0, 5, 10)],  # overlap
        [(False, 0, 5, 1)],  # no gid map
        [],
    ]
    for maps in bad:
        done, received = zygote.ask(pack_slot(SlotFlag(0), maps, 1), [theirs.fileno()])
        assert (done.error, done.step, done.runner) == (errno.EINVAL, Step.ID_MAP, 0), maps
        assert done.init > 0
        assert collect(received) == [-9]
        done, received = zygote.ask(pack_userns(tuple(maps)))
        assert (done.error, done.step, received) == (errno.EINVAL, Step.ID_MAP, [])
    ours.close()
    theirs.close()


@host
@pytest.mark.parametrize("path", ["/tmp", "/dev/null"])
def test_a_leaf_that_is_none(zygote, path):
    ours, theirs = socket.socketpair()
    leaf = os.open(path, os.O_RDONLY)
    done, received = zygote.ask(pack_slot(SlotFlag.LEAF, MAPS, 2), [theirs.fileno(), leaf])
    assert (done.error, done.step, done.init, received) == (errno.EBADF, Step.CLONE_INIT, 0, [])
    os.close(leaf)
    ours.close()
    theirs.close()


@host
@pytest.mark.xfail(reason="zygote.c spawn(): the fallback forgets the pid of a clone it could not move, and the answer says 0", strict=True)
def test_a_clone_that_could_not_be_moved_is_named(zygote, tmp_path):
    ours, theirs = socket.socketpair()
    leaf = os.open(tmp_path, os.O_RDONLY)
    done, received = zygote.ask(pack_slot(SlotFlag.LEAF | SlotFlag.NO_CLONE3, MAPS, 2), [theirs.fileno(), leaf])
    os.close(leaf)
    ours.close()
    theirs.close()
    collect(received)
    assert (done.error, done.step) == (errno.ENOENT, Step.CLONE_INIT)
    assert sum(pid > 0 for pid in (done.init, done.runner)) == len(received)


@host
@pytest.mark.parametrize("flags", [SlotFlag(0), SlotFlag.NO_CLONE3])
def test_a_good_slot_is_in_its_leaf(zygote, flags):
    path = find_base().path / f"test-zygote-{os.getpid()}-{int(flags)}"
    path.mkdir()
    leaf = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        slot = clone(zygote, leaf, flags)
        assert slot.done.flags & SlotFlag.NO_CLONE3 == flags
        assert sorted(map(int, (path / "cgroup.procs").read_text().split())) == sorted([slot.done.init, slot.done.runner])
        assert slot.dispose() == [-9, -9]
    finally:
        os.close(leaf)
        path.rmdir()


@host
def test_spoilt_plans_are_refused_before_anything_of_them_is_done():
    rng = random.Random(4)
    with host_plan() as (plan, root):
        zygote = RawZygote()
        mounts = os.readlink(f"/proc/{zygote.pid}/ns/mnt")
        seen = Counter()
        for _ in range(1500):
            what, spoilt = spoil_plan(rng, plan, len(root.fds))
            done = zygote.shape(root.fds, spoilt)
            assert (done.error, done.step) == (errno.EINVAL, Step.PLAN), (what, done)
            seen[what] += 1
        assert set(seen) == set(SPOILS)
        for count in range(len(root.fds)):
            assert zygote.shape(root.fds[:count], plan).error == errno.EPROTO
            assert zygote.shape(root.fds[:count], header(plan, nfds=count)).error == errno.EINVAL
        slot = pack_slot(SlotFlag(0), MAPS, 1)
        done, _ = zygote.ask(slot, root.fds[:1])
        assert (done.error, done.step) == (errno.EINVAL, Step.MESSAGE)  # there is no shape to make a slot of
        assert os.readlink(f"/proc/{zygote.pid}/ns/mnt") == mounts
        assert zygote.descriptors() == ["0", "1", "2", "3", "4"]
        assert zygote.shape(root.fds, plan).error == 0
        assert os.readlink(f"/proc/{zygote.pid}/ns/mnt") != mounts
        assert clone(zygote).dispose() == [-9, -9]
        zygote.close()


@host
def test_flipped_bits_end_in_a_template_or_an_error():
    rng = random.Random(5)
    seen = Counter()
    for _ in range(60):
        with host_plan() as (plan, root):
            zygote = RawZygote()
            for _ in range(10):
                spoilt = flip(rng, plan, 0, rng.choice([OP_AT + 200, len(plan) // 2]))
                try:
                    done = zygote.shape(root.fds, spoilt)
                except Gone:
                    pytest.fail("no answer")
                seen[done.step if done.error else "built"] += 1
                if not done.error:
                    break
                if done.step is Step.TEMPLATE:  # half a template serves nobody: it says so and exits
                    assert os.waitstatus_to_exitcode(zygote.wait()) == 1
                    break
                assert (done.error, done.step) in ((errno.EPROTO, Step.MESSAGE), (errno.EINVAL, Step.PLAN))
            zygote.close()
    assert seen[Step.PLAN] > 20
    assert seen[Step.TEMPLATE] > 5


@host
@pytest.mark.xfail(reason="plan.c plan_load(): uid 0xffffffff means 'keep' to setresuid, and the tool stays root of its namespace", strict=True)
def test_ids_that_mean_no_change_are_no_ids():
    with host_plan() as (plan, root):
        ops = split_ops(plan)
        ops[find(ops, OP_IDS)] = pack_op(Op.IDS, a=2**32 - 1, b=2**32 - 1)
        zygote = RawZygote()
        done = zygote.shape(root.fds, join_ops(plan, ops))
        uid = None
        if not done.error:
            slot = clone(zygote)
            uid = Path(f"/proc/{slot.done.runner}/status").read_text().split("Uid:")[1].split()[0]
            slot.dispose()
        zygote.close()
    assert uid != str(MAPS[0][2])
    assert done.step is Step.PLAN


@host
def test_the_end_of_the_daemon_ends_the_zygote_and_its_slots():
    zygote = ready_zygote()
    slot = clone(zygote)
    zygote.sock.close()
    assert os.waitstatus_to_exitcode(zygote.wait()) == 0
    os.write(zygote.life, b"")  # the other writer: init waits for its end of file alone
    zygote.close()
    assert collect(slot.pidfds, kill=False) == [-9, 0]
    slot.control.close()


# ---------------------------------------------------------------- a runner

SHELL = [b"/bin/sh", b"-c", b"echo EXECUTED; exit 7"]


def good_run(argv=SHELL, env=(b"A=1", b"B=2"), flags=0, attach=b"", cwd=b"/", nfds=3) -> bytes:
    return pack_run(argv, env, cwd=cwd, flags=RunFlag(flags), umask=0o22, nproc=0, attach=attach, nfds=nfds)


def send_run(slot, message: bytes, fds: int = 3) -> bytes:
    """Send and say that nothing follows; returns what the tool wrote."""
    read, write = os.pipe()
    try:
        socket.send_fds(slot.control, [message], [write] * fds)
        slot.control.shutdown(socket.SHUT_WR)
    except BrokenPipeError:
        pass  # refused at the header: the body may not have been taken
    finally:
        os.close(write)
    with open(read, "rb") as out:
        return out.read()


@host
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
        return what, put(good, HEADER_SIZE + at - 16, rng.choice([n for n in (0, 1, 4, 100, len(good), 2**31, 2**32 - 1) if n != real])), 3
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
    "header", "no header", "cut", "shorter", "longer", "too long", "counts", "unterminated", "run together", "too few", "too many", "flags",
)  # fmt: skip


@host
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


@host
def test_a_slot_that_is_let_go_ends_quietly(zygote):
    slot = clone(zygote)
    slot.control.shutdown(socket.SHUT_WR)
    assert slot.event() is None
    assert slot.dispose() == [0, -9]


@host
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


@host
@pytest.mark.parametrize(("argv", "number"), [
    ([b"/nonexistent"], errno.ENOENT), ([b"nonexistent"], errno.ENOENT), ([b""], errno.ENOENT), ([b"/etc"], errno.EACCES),
    ([b"x" * 5000], errno.ENAMETOOLONG), ([b"/etc/hostname/x"], errno.ENOTDIR),
])  # fmt: skip
def test_what_cannot_be_executed(zygote, argv, number):
    slot = clone(zygote)
    assert send_run(slot, good_run(argv)) == b""
    events = [slot.event(), slot.event()]
    assert [event.kind for event in events] == [Kind.STARTED, Kind.FAILED]
    assert (events[1].step, events[1].error) == (Step.EXEC, number)
    assert slot.dispose() == [127, -9]


# ---------------------------------------------------------------- the plan checker under the sanitizers

HARNESS = r"""
#include "slot.h"
#include <stdio.h>
#include <stdlib.h>

// Records of stdin: u32 length, u32 descriptors, bytes. Each in an allocation of exactly its length.
int main(void) {
    uint32_t head[2];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        char *plan = malloc(head[0] ? head[0] : 1);
        if (head[0] && fread(plan, head[0], 1, stdin) != 1) return 3;
        struct shape shape;
        struct failure why;
        bool good = plan_load(plan, head[0], head[1], &shape, &why);
        size_t seen = 0;
        if (good) {  // walk it as template.c, init.c and runner.c do
            const struct plan_op *op = shape.first;
            for (uint32_t i = 0; i < shape.nops; i++, op = op_next(op)) {
                const char *text = op_text(op);
                for (unsigned k = 0; k < sizeof op_strings / sizeof *op_strings; k++)
                    if (op_strings[k].type == op->type)
                        for (unsigned s = op_strings[k].strings; s; s--) seen += str_len(text), text = text_next(text);
                if (op->type == OP_FILTER)
                    for (uint32_t b = 0; b < op->a * 8; b++) seen += (unsigned char)op_text(op)[b];
            }
        }
        printf("%d %u %d\n", good, good ? 0 : why.step, good ? 0 : why.error);
        free(plan);
    }
    return 0;
}
"""


def model_plan() -> bytes:
    """A plan with every operation, made without the host's mounts."""
    ops = [
        pack_op(Op.ROOT), pack_op(Op.MOVE, b"usr", a=1), pack_op(Op.BIND, b"a", b"b"), pack_op(Op.SETATTR, b".", a=3),
        pack_op(Op.MOUNT, b"proc", b"/proc", b"", a=14), pack_op(Op.MKDIR, b"/tmp", a=0o1777), pack_op(Op.SLOT_BIND, b"/s", b"/tmp"),
        pack_op(Op.HOSTNAME, b"sandbox"), pack_op(Op.LOOPBACK), pack_op(Op.RLIMIT, a=4), pack_op(Op.IDS, a=1000, b=1000),
        pack_op(Op.FILTER, a=3, blob=bytes(range(24))),
    ]  # fmt: skip
    return plan_module.pack_shape(0x7E020000, ops, 2)


def test_the_plan_checker_reads_nothing_but_the_plan(tmp_path):
    rng = random.Random(8)
    plan = model_plan()
    cases = [(plan, 2), (plan, 1), (b"", 0)]
    cases += [(plan[:size], 2) for size in range(len(plan))]
    cases += [(flip(rng, plan), 2) for _ in range(4000)]
    cases += [(spoil_plan(rng, plan, 2)[1], 2) for _ in range(3000)]
    cases += [(plan[:HEADER_SIZE] + rng.randbytes(rng.randrange(8 * 40)), rng.randrange(3)) for _ in range(500)]
    (tmp_path / "plan.h").write_text(plan_module.c_header())
    (tmp_path / "harness.c").write_text(HARNESS)
    program = tmp_path / "harness"
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-builtin"]
    subprocess.run(
        ["cc", "-std=c11", *sanitize, f"-I{NATIVE}", f"-I{tmp_path}", "-o", program, tmp_path / "harness.c", NATIVE / "plan.c"], check=True
    )
    data = b"".join(struct.pack("<II", len(message), nfds) + message for message, nfds in cases)
    env = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program], input=data, capture_output=True, timeout=60, env=env)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    answers = done.stdout.decode().splitlines()
    assert len(answers) == len(cases)
    assert answers[:3] == ["1 0 0", f"0 {Step.PLAN} {errno.EINVAL}", f"0 {Step.PLAN} {errno.EINVAL}"]
    assert set(answers[3 : 3 + len(plan)]) == {f"0 {Step.PLAN} {errno.EINVAL}"}
    spoilt = answers[-3500:-500]
    assert set(spoilt) == {f"0 {Step.PLAN} {errno.EINVAL}"}
    assert "1 0 0" in answers[3 + len(plan) : -3500]  # a flipped bit in a name is still a plan
