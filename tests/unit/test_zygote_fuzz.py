# SPDX-License-Identifier: Apache-2.0
"""Spoilt messages: the zygote answers each with a step and an errno, and nothing is left of them."""

import errno
import os
import random
import socket
import struct
from collections import Counter
from pathlib import Path

import pytest

from agentrun.cgroup.tree import find_base
from agentrun_shim.plan import HEADER_SIZE, MAGIC, VERSION, Op, SlotFlag, Step, pack_op, pack_slot, pack_userns
from tests.unit.plan_spoils import OP_AT, OP_IDS, SPOILS, find, flip, header, join_ops, put, split_ops, spoil_plan
from tests.unit.zygote_support import MAPS, Gone, RawZygote, clone, collect, host_plan, ready_zygote, settled

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]


def test_noise(zygote):
    rng = random.Random(1)
    for size in [*range(1, 64), *(rng.randrange(64, 70_000) for _ in range(137))]:
        done, fds = zygote.ask(rng.randbytes(size))
        assert (done.error, done.step, fds) == (errno.EPROTO, Step.MESSAGE, [])


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
        assert (done.error, done.step) in {
            (errno.EPROTO, Step.MESSAGE),
            *({(errno.EINVAL, Step.MESSAGE)} if sound and kind in (2, 3) else ()),
        }
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 63, 64, 65, 100, 253])
def test_descriptors_that_were_not_asked_for(zygote, count):
    with socket.socket() as any_socket:
        fds = [any_socket.fileno()] * count
        slot = pack_slot(SlotFlag(0), MAPS, 1)
        wrong = [slot] if count != 1 else []
        for message in [
            *wrong,
            header(slot, nfds=count + 1),
            b"x" * 20,
            *([header(slot, nfds=count)] if 1 != count <= 64 else []),
        ]:
            done, received = zygote.ask(message, fds)
            assert (done.step, received) == (Step.MESSAGE, [])
            assert done.error in (errno.EPROTO, errno.EINVAL)


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


def test_spoilt_slots_and_namespaces(zygote):
    rng = random.Random(3)
    ours, theirs = socket.socketpair()
    for _ in range(400):
        for message, fds in ((pack_slot(SlotFlag(0), MAPS, 1), [theirs.fileno()]), (pack_userns(tuple(MAPS)), [])):
            done, received = zygote.ask(spoil_maps(rng, message), fds)
            assert (done.error, done.step, done.init, done.runner, received) == (errno.EINVAL, Step.MESSAGE, 0, 0, [])
    ours.close()
    theirs.close()


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


@pytest.mark.parametrize("path", ["/tmp", "/dev/null"])
def test_a_leaf_that_is_none(fragile, path):
    ours, theirs = socket.socketpair()
    leaf = os.open(path, os.O_RDONLY)
    try:
        done, received = fragile.ask(pack_slot(SlotFlag.LEAF, MAPS, 2), [theirs.fileno(), leaf])
    finally:
        os.close(leaf)
        ours.close()
        theirs.close()
    assert (done.error, done.step, done.init, received) == (errno.EBADF, Step.CLONE_INIT, 0, [])
    assert fragile.alive


def test_a_clone_that_could_not_be_moved_is_named(fragile, tmp_path):
    ours, theirs = socket.socketpair()
    leaf = os.open(tmp_path, os.O_RDONLY)
    done, received = fragile.ask(pack_slot(SlotFlag.LEAF | SlotFlag.NO_CLONE3, MAPS, 2), [theirs.fileno(), leaf])
    os.close(leaf)
    ours.close()
    theirs.close()
    collect(received)
    assert (done.error, done.step) == (errno.ENOENT, Step.CLONE_INIT)
    assert sum(pid > 0 for pid in (done.init, done.runner)) == len(received)


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
        assert settled(zygote) == ["0", "1", "2", "3", "4"]
        assert zygote.shape(root.fds, plan).error == 0
        assert os.readlink(f"/proc/{zygote.pid}/ns/mnt") != mounts
        assert clone(zygote).dispose() == [-9, -9]
        zygote.close()


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
    assert uid not in ("0", str(MAPS[0][2]))
    assert done.step is Step.PLAN


def test_the_end_of_the_daemon_ends_the_zygote_and_its_slots():
    zygote = ready_zygote()
    slot = clone(zygote)
    zygote.sock.close()
    assert os.waitstatus_to_exitcode(zygote.wait()) == 0
    os.write(zygote.life, b"")  # the other writer: init waits for its end of file alone
    zygote.close()
    assert collect(slot.pidfds, kill=False) == [-9, 0]
    slot.control.close()
