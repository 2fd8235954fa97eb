# SPDX-License-Identifier: Apache-2.0
"""The shipped recipes, built from the machine's Debian archive: the tools work, and two builds are the same to the bit."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentrun.image.manifest import decode
from agentrun.image.store import Store
from tests.image.support import image, need

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


@pytest.mark.skipif(not ALL, reason="its hundreds of packages take a minute; AGENTRUN_TEST_RECIPES=all")
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


OWN = """
name = "own"
description = "Everything a recipe may have."
suite = "bookworm"
variant = "essential"
date = 2024-05-06
exclude = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"]
include = ["/usr/share/doc/dash/*"]
run = ["echo 'it''s $HOME' > /srv/said", "echo worker:x:77:77::/work:/bin/sh >> /etc/passwd; mkdir /work; chown 77 /work"]

[config]
env = { PATH = "/bin", GREETING = "hello there" }
workdir = "/work"
user = "worker"
entrypoint = ["env", "ENTERED=1"]
labels = { kind = "test" }
"""


def test_a_recipe_of_ones_own(store, inside, tmp_path):
    need("mmdebstrap")
    (tmp_path / "image.toml").write_text(OWN)
    image(store, "build", tmp_path)
    script = "echo $GREETING $ENTERED; pwd; id -un; cat /srv/said; ls /usr/share/doc; stat -c %U /work"
    said = inside("own", "sh", "-c", script).split("\n")
    assert said[:6] == ["hello there 1", "/work", "worker", "its $HOME", "dash", "worker"]
    found = store.find("own")
    assert found.config.labels["kind"] == "test"
    assert '"created":"2024-05-06T00:00:00Z"' in found.document
    files = {path.decode() for path in manifest(store, "own")}
    assert "usr/share/doc/dash/copyright" in files
    assert "usr/share/doc/bash/copyright" not in files
    assert "usr/bin/apt" not in files


def test_a_recipe_that_cannot_be_built(store, tmp_path):
    need("mmdebstrap")
    path = tmp_path / "bad.toml"
    path.write_text(OWN.replace('variant = "essential"', 'packages = ["no-such-thing"]'))
    said = image(store, "build", path, code=125)
    assert "building own: " in said
    assert "Unable to locate package no-such-thing" in said
    path.write_text(OWN.replace("2024", "2095"))
    assert "date: 2095-05-06 is after today" in image(store, "build", path, code=2)
    assert list(store.root.glob("tmp/*")) == []


@pytest.mark.skipif(not ALL, reason="has to build it first; AGENTRUN_TEST_RECIPES=all")
def test_a_command_that_fails(store, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(OWN.replace("mkdir /work;", "mkdir /no/where;"))
    assert "/no/where" in (said := image(store, "build", path, code=125))
    assert "No such file or directory | E: " in said


@pytest.mark.parametrize(("how", "when"), [(signal.SIGINT, "etc"), (signal.SIGKILL, "usr/bin/dpkg")])
def test_a_build_that_is_ended(tmp_path, how, when):
    """What it had started goes with it, and what it had written with whoever is next."""
    need("mmdebstrap")
    store = Store(tmp_path / "store")
    command = [sys.executable, "-m", "agentrun.cli", "image", "build", "debian-slim"]
    with subprocess.Popen(command, env={**os.environ, "AGENTRUN_IMAGES": str(store.root)}, stderr=subprocess.PIPE) as build:
        end = time.monotonic() + 60
        while not list(store.root.glob(f"tmp/*/root/{when}")):
            assert time.monotonic() < end
            assert build.poll() is None
            time.sleep(0.1)
        build.send_signal(how)
        assert build.wait(20) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    end = time.monotonic() + 20
    while list(store.root.glob("tmp/*")):  # for as long as one of its processes is there, the directory is locked
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.1)
        store.prune()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


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
    assert newest <= 1754697600, "the date of the recipes, and not that of the build"
    assert stat.S_IMODE((tree / "tmp").stat().st_mode) == 0o1777
