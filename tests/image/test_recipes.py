# SPDX-License-Identifier: Apache-2.0
"""The shipped recipes, built from the machine's Debian archive: the tools work, and two builds are the same to the bit."""

import os
import stat

import pytest

from agentrun.image.manifest import decode
from tests.image.support import image

ALL = os.environ.get("AGENTRUN_TEST_RECIPES") == "all"


def manifest(store, name):
    [layer] = store.find(name).layers
    return decode((store.root / "layers" / layer / "manifest").read_bytes())


def test_debian(store, inside, debian):
    inside.can(debian, "apt")
    assert inside(debian, "sh", "-c", ". /etc/os-release; echo $ID").strip() == "debian"
    assert store.verify(debian) == []


def test_python(store, inside, python):
    inside.can(python, "python", "apt", "git")
    assert inside(python, "pip", "--version").startswith("pip ")
    assert inside(python, "sh", "-c", "python -m venv /tmp/v && /tmp/v/bin/pip --version").startswith("pip ")
    assert store.find(python).config.env[1:] == ("LANG=C.UTF-8",)


@pytest.mark.skipif(not ALL, reason="its hundreds of packages take minutes; AGENTRUN_TEST_RECIPES=all")
def test_node(store, inside):
    image(store, "build", "node")
    inside.can("node", "node", "apt", "git")


def test_two_builds_are_the_same(store, debian):
    first = store.find(debian)
    image(store, "build", "debian-slim", "again")
    second = store.find("again")
    assert second.layers == first.layers, differences(store, debian, "again")
    assert second.id == first.id


@pytest.mark.skipif(not ALL, reason="takes a minute more; AGENTRUN_TEST_RECIPES=all")
def test_two_builds_of_python_are_the_same(store, python):
    first = store.find(python)
    image(store, "build", "python", "python-again")
    assert store.find("python-again").layers == first.layers, differences(store, python, "python-again")


def differences(store, *names):
    """What to look at where two builds are not the same."""
    one, other = (manifest(store, name) for name in names)
    return [path for path in one.keys() | other.keys() if one.get(path) != other.get(path)][:20]


@pytest.mark.parametrize("name", ["debian", "python"])
def test_nothing_of_the_machine_or_the_moment(store, name, request):
    entries = manifest(store, request.getfixturevalue(name))
    files = {path.decode() for path, record in entries.items() if record.kind == "f"}
    assert {record.kind for record in entries.values()} <= {"d", "f", "l"}, "no device, no FIFO"
    left = ("var/log/", "var/lib/apt/lists/", "var/cache/apt/", "run/", "tmp/", "var/tmp/", "root/.cache/")
    assert not [path for path in files if path.startswith(left)]
    assert not files & {"etc/resolv.conf", "etc/hostname", "etc/apt/sources.list", "etc/passwd-", "etc/shadow-"}
    assert entries[b"etc/machine-id"].size == 0
    assert not [path for path in files if "mmdebstrap" in path]
    assert not [path for path in files if path.startswith("usr/share/man/")]
    assert {path.rpartition("/")[2] for path in files if path.startswith("usr/share/doc/")} == {"copyright"}
    [layer] = store.find(name).layers
    tree = store.root / "layers" / layer / "fs"
    newest = max(path.lstat().st_mtime for path in tree.rglob("*"))
    assert newest <= 1735689600, "the date of the recipes, and not that of the build"
    assert stat.S_IMODE((tree / "tmp").stat().st_mode) == 0o1777
