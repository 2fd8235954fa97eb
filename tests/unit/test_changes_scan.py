# SPDX-License-Identifier: Apache-2.0
"""What layers change, found, and carried over: on real overlays, without calls. The definition is ``changes_lab.difference``."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrun.changes.apply import apply
from agentrun.changes.draft import stamp
from agentrun.changes.model import Change
from agentrun.changes.scan import scan
from tests.changes_lab import CHANGES, TREES, Lab, difference, directory, do, essence, snapshot

pytestmark = pytest.mark.host
EXAMPLES = int(os.environ.get("AGENTRUN_EXAMPLES", "150"))
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def lab():
    with directory() as path:
        yield Lab(path)


def changed(lab: Lab, operations) -> tuple[Change, ...]:
    with lab.mounted() as path:
        do(path, operations)
    with lab.opened() as (layers, base):
        return scan(layers, base)


def kinds(changes) -> dict[str, str]:
    return {os.fsdecode(change.path): change.kind for change in changes}


@MANY
@given(TREES, st.lists(CHANGES, min_size=1, max_size=3))
def test_the_changes_are_the_difference_of_the_trees_and_applying_them_gives_the_other(tree, rounds):
    with directory() as path:
        lab = Lab(path, len(rounds))
        do(str(lab.base), tree)
        before = snapshot(lab.base)
        after = before
        for number, operations in reversed(list(enumerate(rounds))):
            with lab.mounted(number) as mount:
                do(mount, operations)
                after = snapshot(mount)
        with lab.opened() as (layers, base):
            changes = scan(layers, base)
            assert snapshot(lab.base) == before
            assert kinds(changes) == difference(before, after)
            assert not any(change.raced for change in changes)
            report = apply(changes, layers, base, name="test")
            assert report.complete
            assert report.already == 0
            assert essence(lab.base) == {path: entry.essence() for path, entry in after.items()}
            again = apply(changes, layers, base, name="test")
            assert (again.complete, again.applied) == (True, 0)
            assert [change.kind for change in scan(layers, base)] == []


def test_nothing_is_no_change(lab):
    do(str(lab.base), [("write", "a", b"1"), ("mkdir", "d")])
    assert changed(lab, [("same", "a"), ("write", "t", b""), ("remove", "t"), ("again", "d")]) == ()


def test_what_is_in_a_directory_that_went_is_listed(lab):
    do(str(lab.base), [("mkdir", "d/e"), ("write", "d/e/f", b"1"), ("symlink", "d/l", "/etc")])
    assert kinds(changed(lab, [("remove", "d")])) == dict.fromkeys(["d", "d/e", "d/e/f", "d/l"], "deleted")


def test_a_tree_that_gave_way_to_a_file_and_a_file_that_gave_way_to_a_tree(lab):
    do(str(lab.base), [("mkdir", "d/e"), ("write", "d/e/f", b"1"), ("write", "f", b"2")])
    changes = changed(lab, [("replace", "d", b"3"), ("remove", "f"), ("mkdir", "f/g"), ("write", "f/g/h", b"4")])
    assert kinds(changes) == {
        "d": "type", "d/e": "deleted", "d/e/f": "deleted", "f": "type", "f/g": "added", "f/g/h": "added",
    }  # fmt: skip


def test_what_was_changed_meanwhile_is_marked(lab):
    """The original's time of change against the moment at which the call began, which is never a tick off."""
    do(str(lab.base), [("write", name, b"1") for name in "abcdef"] + [("mkdir", "g"), ("write", "g/h", b"1")])
    with lab.opened() as (layers, base):
        for name in "abc":
            os.utime(lab.base / name)  # just before
        since = stamp(layers[0])
        with lab.mounted() as path:
            do(path, [("append", name, b"2") for name in "abcde"] + [("remove", "g")])
            do(str(lab.base), [("append", "d", b"3"), ("chmod", "e", 0o600), ("write", "g/new", b"")])
        raced = {os.fsdecode(change.path) for change in scan(layers, base, since=since) if change.raced}
    assert raced == {"d", "e", "g", "g/new"}


def test_a_file_that_went_meanwhile_is_not_taken_for_a_new_one(lab):
    do(str(lab.base), [("write", "a", b"1")])
    with lab.opened() as (layers, base):
        since = stamp(layers[0])
        with lab.mounted() as path:
            do(path, [("append", "a", b"2"), ("write", "b", b"3")])
            do(str(lab.base), [("remove", "a")])
        found = {os.fsdecode(change.path): (change.kind, change.raced) for change in scan(layers, base, since=since)}
    assert found == {"a": ("added", True), "b": ("added", False)}


def test_a_tree_too_deep_for_one_path_is_refused_and_can_be_removed(lab):
    from agentrun.changes.store import remove_deep

    with lab.mounted() as path:
        here = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(60):
            os.mkdir("x" * 100, dir_fd=here)
            inner = os.open("x" * 100, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
    with lab.opened() as (layers, base), pytest.raises(OSError, match="a path of more than 4000 bytes"):
        scan(layers, base)
    remove_deep(lab.layers[0])
    assert not lab.layers[0].exists()
