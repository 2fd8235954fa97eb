# SPDX-License-Identifier: Apache-2.0
"""Applying: what it refuses, what it leaves alone, and that it may be killed anywhere."""

import contextlib
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from agentrun import UsageError, cli
from agentrun.changes import apply as applying
from agentrun.changes.draft import Draft
from agentrun.changes.store import Store
from tests.changes_lab import directory, do, essence, keep, snapshot
from tests.dying import run_to_line
from tests.requirements import lacking

pytestmark = pytest.mark.host
KILLS = int(os.environ.get("AGENTRUN_KILLS", "100"))
TREE = [
    ("write", "a", b"1"), ("write", "b", b"2"), ("write", "d/e/f", b"3"), ("write", "d/g", b"4"), ("symlink", "l", "a"),
    ("write", "t", b"5"), ("write", "u/v", b"6"), ("write", "u/w/x", b"7"), ("write", "z/y", b"8"), ("chmod", "b", 0o600),
]  # fmt: skip
DONE = [
    ("append", "a", b"more"), ("remove", "b"), ("remove", "d"), ("remove", "l"), ("symlink", "l", "z/y"), ("remove", "t"),
    ("mkdir", "t"), ("write", "t/in", b"x" * 9000), ("write", "t/deep/er", b"y"), ("replace", "u", b"file now"),
    ("write", "new/one", b"1"), ("write", "new/two", b"2"), ("chmod", "z", 0o750), ("chmod", "z/y", 0o640), ("fifo", "p"),
    ("xattr", "z", b"v"),
]  # fmt: skip
"""All kinds of change: content, deleted, a tree deleted, a link, a file that became a tree and the opposite, modes."""


@pytest.fixture
def place(monkeypatch):
    with directory() as path:
        monkeypatch.setenv("AGENTRUN_CHANGES", str(path / "store"))
        (path / "base").mkdir()
        do(str(path / "base"), TREE)
        yield path


def run(*words: str) -> int:
    return cli.main(list(words))


def conflicts(capsys, name: str, *options: str) -> dict[str, str]:
    assert run("apply", "--json", *options, name) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["complete"]
    return {conflict["path"]: conflict["reason"] for conflict in answer["conflicts"]}


def test_it_is_applied_and_gone(place, capsys):
    base, store = place / "base", Store()
    name = keep(store, base, DONE)
    assert run("diff", name) == 0
    assert "M  a  1 → 5 bytes" in capsys.readouterr().out
    assert run("apply", name) == 0
    assert store.ids() == []
    assert (base / "a").read_bytes() == b"1more"
    assert (base / "t/deep/er").read_bytes() == b"y"
    assert (base / "u").read_bytes() == b"file now"
    assert not [path for path in snapshot(base) if ".agentrun-" in path]


def test_a_bar_for_those_who_look(place):
    """On a terminal how far it is, on stderr; for all others nothing, and the answer is the same."""
    for terminal in (True, False):
        name = keep(Store(), place / "base", DONE if terminal else [("append", "a", b"again")])
        ours, theirs = os.openpty()
        words = [sys.executable, "-m", "agentrun.cli", "apply", name]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=theirs if terminal else subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
        ) as child:
            os.close(theirs)
            drawn = b""
            with contextlib.suppress(OSError):  # EIO, once the other end is closed
                while terminal and (chunk := os.read(ours, 65536)):
                    drawn += chunk
            out, said = child.communicate()
        os.close(ours)
        assert (child.returncode, out[: 8 + len(name)]) == (0, f"applied {name}".encode())
        assert b"applying" in drawn if terminal else said == b""


@pytest.mark.parametrize("number", [3, 300])
def test_what_is_kept_is_on_the_disk_when_it_is_sealed(place, number):
    """Here without an overlay, which syncs its upper layer's file system itself, if only when it is unmounted."""
    workspace = os.open(place / "base", os.O_PATH | os.O_DIRECTORY)
    draft = Draft(Store(), workspace, str(place / "base"))
    draft.start()
    upper = place / "store" / draft.id / "upper"
    (upper / "new").mkdir()
    for n in range(number):
        (upper / f"new/{n}").write_bytes(bytes(9000))
    if not is_only_in_memory(upper / "new/0"):
        lacking("this file system does not say what is not on the disk yet")
    assert draft.seal("call", [], (0, 0)).added == number + 1
    assert not [path for path in (upper / "new").iterdir() if is_only_in_memory(path)]
    draft.close()
    os.close(workspace)


DELALLOC = 4
"""FIEMAP_EXTENT_DELALLOC (linux/fiemap.h)."""


def is_only_in_memory(path: Path) -> bool:
    """Whether the kernel has not even decided yet where on the disk something of a file is to be."""
    with path.open("rb") as file:
        request = bytearray(struct.pack("=QQIIII", 0, 2**64 - 1, 0, 0, 16, 0) + bytes(16 * 56))
        try:
            fcntl.ioctl(file, 0xC020660B, request)  # FS_IOC_FIEMAP
        except OSError:
            return False
    mapped = struct.unpack_from("=I", request, 20)[0]
    flags = [struct.unpack_from("=I", request, 32 + 56 * number + 40)[0] for number in range(mapped)]
    return any(flag & DELALLOC for flag in flags)


@pytest.mark.parametrize(
    ("edit", "path", "reason"),
    [
        (("append", "a", b"theirs"), "a", "was written to"),
        (("chmod", "a", 0o600), "a", "had mode 0644 and has 0600"),
        (("remove", "a"), "a", "is gone"),
        (("append", "b", b"theirs"), "b", "was written to"),
        (("write", "d/e/new", b"theirs"), "d/e/new", "is new"),
        (("append", "d/g", b"theirs"), "d/g", "was written to"),
        (("write", "u/w/new", b"theirs"), "u/w/new", "is new"),
        (("write", "new", b"theirs"), "new", "is new: there is a file now"),
        (("mkdir", "new"), "new", "is new: there is a directory now"),
        (("chmod", "z", 0o711), "z", "had mode 0755 and has 0711"),
        (("touch", "a", 5), "a", "was written to"),
    ],
)
def test_a_concurrent_edit_is_reported_and_nothing_is_touched(place, capsys, edit, path, reason):
    base, store = place / "base", Store()
    name = keep(store, base, DONE)
    do(str(base), [edit])
    before = snapshot(base)
    assert conflicts(capsys, name) == {path: reason}
    assert snapshot(base) == before
    assert store.ids() == [name]


def test_an_edit_that_keeps_size_and_time_is_seen(place, capsys):
    base = place / "base"
    name = keep(Store(), base, DONE)
    found = os.stat(base / "a")
    (base / "a").write_bytes(b"9")
    os.utime(base / "a", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert conflicts(capsys, name) == {"a": "was changed"}


def test_an_edit_while_the_call_ran_is_a_conflict(place, capsys):
    name = keep(Store(), place / "base", DONE, meanwhile=[("append", "b", b"theirs"), ("write", "d/theirs", b"")])
    assert conflicts(capsys, name) == dict.fromkeys(["b", "d", "d/theirs"], "was changed while the call ran")


def test_force_overwrites_files_but_removes_nothing_it_was_not_told_of(place, capsys):
    base = place / "base"
    name = keep(Store(), base, DONE)
    do(str(base), [("append", "a", b"theirs"), ("append", "d/g", b"theirs"), ("write", "d/theirs", b"keep me")])
    assert conflicts(capsys, name, "--force") == {"d/theirs": "is new"}
    (base / "d/theirs").unlink()
    assert run("apply", "--force", name) == 0
    assert (base / "a").read_bytes() == b"1more"
    assert not (base / "d").exists()


def test_what_others_did_besides_stays(place):
    base = place / "base"
    name = keep(Store(), base, DONE)
    do(str(base), [("write", "theirs", b"x"), ("append", "z/theirs", b"x"), ("write", "z/theirs", b"y")])
    assert run("apply", name) == 0
    assert (base / "theirs").read_bytes() == b"x"


@pytest.mark.parametrize("link", ["z", "u"])
def test_no_link_leads_out_of_the_tree(place, capsys, link):
    base, outside = place / "base", place / "outside"
    name = keep(Store(), base, [("append", f"{link}/{'y' if link == 'z' else 'v'}", b"out")])
    outside.mkdir()
    (outside / "y").write_bytes(b"8")
    (outside / "v").write_bytes(b"6")
    os.rename(base / link, place / "moved")
    os.symlink(outside, base / link)
    assert list(conflicts(capsys, name).values()) == ["a link is on the way there now"]
    assert ((outside / "y").read_bytes(), (outside / "v").read_bytes()) == (b"8", b"6")


def test_another_directory_at_the_same_path_is_refused(place, capsys):
    name = keep(Store(), place / "base", DONE)
    os.rename(place / "base", place / "moved")
    (place / "base").mkdir()
    assert run("apply", name) == 2
    assert "another directory is there now" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a", "u", "d"])
def test_whoever_is_faster_than_the_exchange_has_his_file_back(place, monkeypatch, capsys, path):
    """Somebody saves in the microseconds between the last look and the rename."""
    base, store = place / "base", Store()
    name = keep(store, base, DONE)
    renames = applying.rename

    def slow_rename(parent, old, new, flags):
        touched = old == path.encode() or (new == path.encode() and flags == 2)
        if touched and not (place / "done").exists():
            (place / "done").touch()
            do(str(base), [("append", {"a": "a", "u": "u/v", "d": "d/g"}[path], b"theirs")])
        renames(parent, old, new, flags)

    monkeypatch.setattr(applying, "rename", slow_rename)
    assert list(conflicts(capsys, name)) == [{"a": "a", "u": "u/v", "d": "d/g"}[path]]
    theirs = base / {"a": "a", "u": "u/v", "d": "d/g"}[path]
    assert theirs.read_bytes().endswith(b"theirs")
    assert not [left for left in snapshot(base) if ".agentrun-" in left]
    assert store.ids() == [name]


def test_damage_is_found_before_anything_is_used(place, capsys):
    base, store = place / "base", Store()
    name = keep(store, base, DONE)
    before = snapshot(base)
    (store.root / name / "upper/a").write_bytes(b"damaged")
    assert run("changes", "--verify") == 125
    assert run("apply", name) == 125
    assert "damaged" in capsys.readouterr().err
    assert snapshot(base) == before


def test_only_one_is_at_work_on_a_change_set(place):
    store = Store()
    name = keep(store, place / "base", DONE)
    opened = store.open(name, take=True)
    try:
        with pytest.raises(UsageError, match="it is being applied or discarded"):
            store.open(name, take=True)
        with pytest.raises(UsageError, match="it is being applied or discarded"):
            store.discard(name)
        store.begin_applying(name)
    finally:
        opened.close()
    with pytest.raises(UsageError, match="its applying was begun"):
        store.discard(name)
    store.discard(name, force=True)
    assert os.listdir(store.root) == ["lock"]


def test_a_user_sees_his_own(place):
    store = Store()
    name = keep(store, place / "base", DONE, uid=1234)
    assert [changes.id for changes in store.every(1234)] == [name]
    assert store.every(1235) == []
    for ask in (store.open, store.discard):
        with pytest.raises(UsageError, match="there is none"):
            ask(name, 1235)
    assert store.discard(name[:5], 1234) == name


def test_what_a_killed_call_left_is_swept_and_what_runs_is_not(place):
    store = Store()
    _, running, lock = store.begin()
    _, killed, gone = store.begin()
    os.close(gone)
    (killed / "upper").mkdir()
    (store.root / "nothing").mkdir()
    store.sweep()
    assert sorted(os.listdir(store.root)) == sorted(["lock", running.name])
    os.close(lock)
    store.sweep()
    assert os.listdir(store.root) == ["lock"]


# ---------------------------------------------------------------- kill -9


def apply_in_child(name: str, last_line: int = 0) -> tuple[bool, int]:
    """Apply in a process that kills itself at that line; whether it came to its end, and how many lines it ran."""
    ended, lines, code = run_to_line(lambda: run("apply", name), ("agentrun/changes/",), last_line)
    assert not ended or code == "0", code
    return ended, lines


def prepare(place, store: Store, number: int):
    """A tree, its change set, and what it has to come to: made from a copy by the same operations, not by applying."""
    base, copy = place / f"base{number}", place / f"copy{number}"
    base.mkdir()
    do(str(base), TREE)
    subprocess.run(["cp", "-a", base, copy], check=True)
    do(str(copy), DONE)
    # Not the times of files, which were written twice.
    return base, keep(store, base, DONE), {path: entry[:5] for path, entry in essence(copy).items()}


def test_killed_anywhere_it_comes_to_the_same_end(place):
    """Every path is old or new at any time, and the next run finishes, wherever the ones before were killed."""
    rng = random.Random(os.environ.get("AGENTRUN_SEED"))
    store = Store()
    _, name, _ = prepare(place, store, 0)
    ended, whole = apply_in_child(name)
    assert ended
    kills, number, points = 0, 0, []
    while kills < KILLS:
        number += 1
        base, name, new = prepare(place, store, number)
        old = {path: entry[:5] for path, entry in essence(base).items()}
        while name in store.ids():
            line = rng.randrange(1, whole + 1)
            kills += not apply_in_child(name, line)[0]
            points.append(line)
            assert list(store.verify()) == []
            for path, entry in essence(base).items():
                if ".agentrun-" not in path:
                    assert entry[:5] in (old.get(path), new.get(path)), (path, points)
        assert {path: entry[:5] for path, entry in essence(base).items()} == new, points
        store.sweep()
        assert os.listdir(store.root) == ["lock"]
    print(f"{kills} kills within {whole} lines, {number} change sets")
