# SPDX-License-Identifier: Apache-2.0
"""``agentrun exec --workspace DIR:cow``, and the verbs for what it leaves, as they are typed."""

import json
import re

import pytest

from tests.changes_lab import directory
from tests.support import open_daemon

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def place():
    with directory() as path:
        yield path


@pytest.fixture(scope="module")
def daemon(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTRUN_CHANGES", str(place / "store"))
        with open_daemon() as running:
            yield running


@pytest.fixture
def work(place):
    with directory() as path:
        (path / "a.txt").write_text("one\ntwo\nthree\n")
        (path / "old").write_text("x")
        yield path


def change(daemon, work, script: str = "sed -i s/two/2/ a.txt; rm old; printf new > n; chmod 755 a.txt") -> str:
    done = daemon.exec("--json", "--workspace", f"{work}:cow", "--", "sh", "-c", script, text=True)
    assert done.returncode == 0, done
    return json.loads(done.stdout)["changes"]["id"]


def test_diff_apply(daemon, work):
    name = change(daemon, work)
    assert (work / "old").exists()
    assert [row["id"] for row in json.loads(daemon.cli("changes", "--json").stdout)] == [name]
    assert re.search(rf"^{name}  \d{{4}}-\d\d-\d\d \d\d:\d\d        3 +\d+  {work}$", daemon.cli("changes").stdout, re.MULTILINE)
    shown = daemon.cli("diff", name)
    assert shown.stdout.splitlines() == [
        "M  a.txt  14 → 12 bytes, mode 0644 → 0755",
        "A  n  3 bytes",
        "D  old",
        f"3 changes to {work}: 1 added, 1 modified, 1 deleted",
    ]
    patch = daemon.cli("diff", "--patch", name[:6]).stdout
    assert patch == (
        "--- a/a.txt\n+++ b/a.txt\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n"
        "--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+new\n\\ No newline at end of file\n"
        "--- a/old\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n\\ No newline at end of file\n"
    )
    done = daemon.cli("apply", name)
    assert (done.returncode, done.stdout) == (0, f"applied {name}: 3 changes to {work}\n")
    assert (work / "a.txt").read_text() == "one\n2\nthree\n"
    assert (work / "n").read_text() == "new"
    assert not (work / "old").exists()
    assert daemon.cli("apply", name).stderr == f"agentrun: change set: there is none '{name}'\n"


def test_a_conflict_is_1_and_says_what(daemon, work):
    name = change(daemon, work)
    (work / "old").write_text("theirs")
    done = daemon.cli("apply", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"old: was written to\nagentrun: {name}: 1 conflicts; nothing was applied, and it is kept\n"
    assert "(apply was begun)" not in daemon.cli("changes").stdout
    assert (work / "a.txt").read_text() == "one\ntwo\nthree\n"
    assert daemon.cli("apply", "--force", name).returncode == 0
    assert not (work / "old").exists()


def test_discard(daemon, work):
    name = change(daemon, work)
    assert daemon.cli("discard", name).stdout == f"discarded {name}\n"
    assert daemon.cli("diff", name).returncode == 2
    assert (work / "old").exists()
    assert daemon.cli("changes", "--verify").stdout == "the store is as it should be\n"


def test_exec_without_json_and_without_daemon(daemon, work):
    assert daemon.exec("--workspace", f"{work}:cow", "--", "rm", "old").returncode == 0
    (row,) = json.loads(daemon.cli("changes", "--json").stdout)
    assert (row["deleted"], row["argv"]) == (1, ["rm", "old"])
    assert daemon.cli("discard", row["id"][:4]).returncode == 0


def test_a_directory_whose_name_ends_so(daemon, place):
    with directory() as path:
        odd = path / "x:cow"
        odd.mkdir()
        path.chmod(0o755)
        assert daemon.exec("--workspace", f"{odd}:rw", "--", "touch", "f").returncode == 0
        assert (odd / "f").exists()
