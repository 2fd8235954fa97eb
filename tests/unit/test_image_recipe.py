# SPDX-License-Identifier: Apache-2.0
"""Recipes and where packages come from: what is read, what is refused and how that is said. Nothing is built here."""

import datetime
import json
import os
from pathlib import Path

import pytest

from agentrun.cli import main
from agentrun.errors import HostError, UsageError
from agentrun.image.aptsources import acquire_settings, debian_sources
from agentrun.image.recipe import directories, find_recipe, load, parse, recipe_files
from agentrun_shim.data import data_path

GOOD = """
name = "tools"
description = "A test."
suite = "bookworm"
date = 2026-11-01
packages = ["git", "libstdc++6", "hello=2.10-3", "nodejs/bookworm-security"]
exclude = ["/usr/share/doc/*"]
run = ["ln -s python3 /usr/bin/python"]

[config]
env = { LANG = "C.UTF-8" }
user = "app:33"
"""


@pytest.mark.parametrize("name", sorted(recipe_files([data_path("images")])))
def test_a_shipped_recipe(name):
    recipe = find_recipe(name, [data_path("images")])
    assert recipe.name == name
    assert recipe.description.endswith(".")
    assert not recipe.sources, "the machine's own"
    assert list(recipe.packages) == sorted(set(recipe.packages))


def test_which_are_shipped():
    assert set(recipe_files([data_path("images")])) >= {"debian-slim", "node", "python"}


def test_a_recipe():
    recipe = parse(GOOD.encode(), "x")
    assert (recipe.name, recipe.suite, recipe.variant) == ("tools", "bookworm", "minbase")
    assert recipe.date == datetime.date(2026, 11, 1)
    assert recipe.packages[2] == "hello=2.10-3"
    assert (recipe.config.env, recipe.config.user, recipe.config.workdir) == ({"LANG": "C.UTF-8"}, "app:33", "/")


BAD = {
    "no TOML": (lambda text: text + "[", "f: not TOML: "),
    "an unknown key": (lambda text: 'pakages = ["x"]\n' + text, 'f: pakages: unknown key, with ["x"] (did you mean packages?)'),
    "an unknown key of config": (lambda text: text + "home = 1", "f: config.home: unknown key, with 1 (known: env, workdir"),
    "a number": (lambda text: text.replace('"tools"', "3"), "f: name: Expected `str`, got `int` (3)"),
    "a number in a list": (lambda text: text.replace('"git"', "7"), "f: packages[0]: Expected `str`, got `int` (7)"),
    "nothing where something has to be": (lambda text: text.replace("date = 2026-11-01", ""), "missing required field `date`"),
    "a name": (lambda text: text.replace("tools", "../tools"), 'f: name: "../tools" is not a name of a-z'),
    "a suite": (lambda text: text.replace('"bookworm"', '"book worm"'), 'f: suite: "book worm" is not a release'),
    "an option for a package": (lambda text: text.replace('"git"', '"a,--b"'), 'f: packages[0]: "a,--b" is not the name'),
    "two lines": (lambda text: text.replace("A test.", "A\\ntest."), "f: description: "),
    "a pattern": (lambda text: text.replace("/usr/share/doc/*", "usr/*"), 'f: exclude[0]: "usr/*" is not an absolute path'),
    "a variant": (lambda text: 'variant = "huge"\n' + text, "f: variant: Invalid enum value 'huge' (\"huge\")"),
    "a date": (lambda text: text.replace("2026-11-01", "1969-01-01"), "f: date: 1969-01-01 is not a day between"),
    "a time": (lambda text: text.replace("2026-11-01", '"yesterday"'), 'f: date: Invalid RFC3339 encoded date ("yesterday")'),
    "a variable": (lambda text: text.replace("LANG =", '"A B" ='), 'f: config.env."A B": '),
    "a directory": (lambda text: text + 'workdir = "srv"', 'f: config.workdir: "srv" is not an absolute path'),
    "a user": (lambda text: text.replace("app:33", "a b"), 'f: config.user: "a b" is not a user'),
    "a source": (lambda text: 'sources = ["rpm x"]\n' + text, 'f: sources[0]: "rpm x" is not a line'),
    "a command": (lambda text: text.replace("ln -s python3 /usr/bin/python", " "), 'f: run[0]: " " is not a shell command'),
}


@pytest.mark.parametrize("what", BAD)
def test_a_recipe_that_is_none(what):
    spoil, message = BAD[what]
    with pytest.raises(UsageError) as caught:
        parse(spoil(GOOD).encode(), "f")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_recipes_are_found(tmp_path):
    own, shipped = tmp_path / "own", data_path("images")
    (own / "tools").mkdir(parents=True)
    path = own / "tools/image.toml"
    path.write_text(GOOD)
    for reference in ("tools", str(path), str(path.parent)):
        assert find_recipe(reference, [own, shipped]).description == "A test."
    assert set(recipe_files([own, shipped])) >= {"tools", "python"}
    with pytest.raises(UsageError, match=r'there is no "tols" \(known: debian-slim, node, python, tools'):
        find_recipe("tols", [own, shipped])
    with pytest.raises(UsageError, match="No such file"):
        find_recipe("./tools", [own])
    path.write_bytes(b"#" * 70_000)
    with pytest.raises(UsageError, match="larger than a recipe"):
        load(path)
    assert directories({"XDG_CONFIG_HOME": "/c"})[0] == Path("/c/agentrun/images")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AGENTRUN_IMAGES", str(tmp_path / "store"))
    assert main(["image", "build"]) == 0
    assert "python" in capsys.readouterr().out
    assert main(["image", "build", "--json"]) == 0
    assert {"debian-slim", "node", "python"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert main(["image", "build", "nothing"]) == 2
    assert "there is no" in capsys.readouterr().err
    path = tmp_path / "tools/image.toml"
    path.parent.mkdir()
    path.write_text(GOOD.replace("git", "G!T"))
    assert main(["image", "build", str(path)]) == 2
    assert f'{path}: packages[0]: "G!T" is not the name' in capsys.readouterr().err
    path.write_text(GOOD)
    if os.geteuid() != 0:
        assert main(["image", "build", str(path)]) == 125
        assert "only root" in capsys.readouterr().err
        return
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["image", "build", str(path)]) == 125
    assert "apt-get install mmdebstrap" in capsys.readouterr().err
    assert list((tmp_path / "store/tmp").iterdir()) == []


# ---------------------------------------------------------------- the machine's own archive

OS_RELEASE = 'PRETTY_NAME="Debian"\nID=debian\nVERSION_CODENAME=bookworm\n'
STANZAS = """\
# the mirror
Types: deb deb-src
URIs: mirror://a/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
# a comment inside
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: mirror://a/security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: mirror://off
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: mirror://vendor
Suites: stable
Components: main
"""
LINES = """\
deb [ arch=amd64 signed-by=/k.gpg ] mirror://a/debian bookworm main # ours
deb-src mirror://a/debian bookworm main
#deb mirror://off bookworm main
deb mirror://vendor bookworm stable
deb mirror://other bookworm-pgdg main
deb mirror://a/security bookworm-security main non-free
"""


@pytest.fixture
def etc(tmp_path):
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "os-release").write_text(OS_RELEASE)
    return tmp_path


def test_stanzas(etc):
    (etc / "apt/sources.list.d/debian.sources").write_text(STANZAS)
    (etc / "apt/sources.list.d/old.sources.disabled").write_text(STANZAS.replace("mirror://a", "mirror://disabled"))
    assert debian_sources("bookworm", etc) == [
        "deb [signed-by=/usr/share/keyrings/debian.gpg] mirror://a/debian bookworm main contrib",
        "deb [signed-by=/usr/share/keyrings/debian.gpg] mirror://a/debian bookworm-updates main contrib",
        "deb mirror://a/security bookworm-security main",
    ]
    assert debian_sources("trixie", etc)[2] == "deb mirror://a/security trixie-security main"


def test_lines(etc):
    (etc / "apt/sources.list").write_text(LINES)
    assert debian_sources("bookworm", etc) == [
        "deb [arch=amd64 signed-by=/k.gpg] mirror://a/debian bookworm main",
        "deb mirror://a/security bookworm-security main non-free",
    ]


def test_a_machine_without_an_archive(etc):
    (etc / "apt/sources.list").write_text("deb mirror://vendor bookworm stable\n")
    with pytest.raises(HostError, match="has no archive of Debian bookworm; give the recipe"):
        debian_sources("bookworm", etc)


def test_a_machine_that_is_no_debian(etc):
    (etc / "apt/sources.list").write_text(LINES.replace("bookworm", "noble"))
    (etc / "os-release").write_text("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n")
    with pytest.raises(HostError, match="has no archive of Debian; give the recipe"):
        debian_sources("bookworm", etc)
    (etc / "os-release").unlink()
    with pytest.raises(HostError, match="has no archive of Debian;"):
        debian_sources("bookworm", etc)


def test_how_an_archive_is_reached():
    dumped = """\
APT::Architecture "amd64";
Acquire::http "";
Acquire::http::Proxy "mirror://proxy:3128";
Acquire::https::CaInfo "/ca.pem";
Acquire::Check-Valid-Until "false";
Acquire::IndexTargets::deb::Packages::Optional "0";
DPkg::Post-Invoke:: "rm -rf /";
"""
    assert acquire_settings(dumped) == [
        'Acquire::http::Proxy "mirror://proxy:3128";',
        'Acquire::https::CaInfo "/ca.pem";',
        'Acquire::Check-Valid-Until "false";',
    ]
