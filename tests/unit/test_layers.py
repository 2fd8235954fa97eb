# SPDX-License-Identifier: Apache-2.0
"""The architecture, pinned: who may import whom, who may make processes, how long a file may get."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import agentrun
from agentrun.cli import VERBS
from agentrun_shim import native

ROOT = Path(__file__).parents[2]
RUNTIME, SHIM, NATIVE = ROOT / "runtime" / "agentrun", ROOT / "shim" / "agentrun_shim", ROOT / "shim" / "native"
MODULES = {
    ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for package in (RUNTIME, SHIM)
    for file in sorted(package.rglob("*.py"))
}
TEXT = {".py", ".c", ".h", ".md", ".toml", ".sh", ".service", ".socket", ".slice", ".cfg", ".yml", ".yaml", ".json", ""}
UNTRACKED = {".git", ".venv", ".hypothesis", "build", "dist", "_native", "__pycache__", "node_modules", "out"}
CITED = {"systemd.io", "json-schema.org"}
"""Hosts of documents that are cited, or whose address is a name; nothing is fetched from them."""

# What the lowest modules may import of agentrun; a test that names every module would only repeat the code.
BOTTOM = {
    "agentrun.errors": set(),
    "agentrun.types": set(),
    "agentrun.protocol": set(),
    "agentrun.notify": set(),
    "agentrun.capture": set(),
    "agentrun.denials": set(),
    "agentrun.units": {"agentrun.errors"},
    "agentrun.policy": {"agentrun.errors", "agentrun.units"},
    "agentrun.tomltext": set(),
    "agentrun.policytables": {"agentrun.policy"},
    "agentrun.executorconfig": {"agentrun.policy"},
    "agentrun.chores": set(),
    "agentrun.turns": {"agentrun.errors"},
    "agentrun.tenants": {"agentrun.errors", "agentrun.executorconfig", "agentrun.policy", "agentrun.shape"},
    "agentrun.egress.rules": {"agentrun.errors", "agentrun.egress.addresses"},
    "agentrun.egress.addresses": set(),
    "agentrun.policychecks": {
        "agentrun.errors",
        "agentrun.egress.rules",
        "agentrun.units",
        "agentrun.policy",
        "agentrun.policytables",
        "agentrun.tomltext",
    },
    "agentrun.policyfile": {"agentrun.errors", "agentrun.policytables", "agentrun.tomltext"},
    "agentrun.binds": {"agentrun.errors", "agentrun.policy", "agentrun.policychecks"},
    "agentrun.cgroup": {"agentrun.errors", "agentrun.types", "agentrun.policy", "agentrun.cgroup"},
    "agentrun.rootfs": {"agentrun.errors", "agentrun.policy", "agentrun.binds"},
    "agentrun.workspace": {"agentrun.errors"},
    "agentrun.changes.beneath": set(),
    "agentrun.changes.nodes": {"agentrun.changes.beneath"},
    "agentrun.changes.model": {"agentrun.changes.nodes"},
    "agentrun.changes.scan": {"agentrun.changes"},
    "agentrun.changes.units": {"agentrun.changes"},
    "agentrun.changes.check": {"agentrun.changes"},
    "agentrun.changes.build": {"agentrun.changes", "agentrun.errors"},
    "agentrun.changes.apply": {"agentrun.changes", "agentrun.errors"},
    "agentrun.zygote": {"agentrun.errors"},
    "agentrun.bpfmaps": set(),
    "agentrun.histogram": set(),
    "agentrun.latency": {"agentrun.bpfmaps", "agentrun.burst.layout", "agentrun.histogram"},
    "agentrun.probes": {"agentrun.probes"},
    "agentrun.burst.ladder": {"agentrun.policy"},
    "agentrun.burst.layout": set(),
    "agentrun.burst.link": set(),
    "agentrun.burst.table": {"agentrun.bpfmaps", "agentrun.burst.layout"},
    "agentrun.burst.account": {"agentrun.cgroup", "agentrun.units"},
    "agentrun.burst.headroom": {"agentrun.burst.account", "agentrun.units"},
    "agentrun.egress": {"agentrun.errors", "agentrun.egress"},
}


def imports(name: str) -> set[str]:
    """Every module that a module's source names in an import, wherever; ``from package import module`` is the module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import hides where an arrow goes"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_scan_sees_both_packages():
    assert {"agentrun", "agentrun.cgroup.tree", "agentrun.cli.__main__", "agentrun_shim.plan"} <= MODULES.keys()
    assert "trio" in imports("agentrun.pool")
    assert "agentrun.rootfs" in imports("agentrun.shape")


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, {"agentrun_shim"})])
def test_the_shim_needs_only_the_standard_library_and_msgspec(name):
    known = {"agentrun_shim", "msgspec", *sys.stdlib_module_names}
    assert {module for module in imports(name) if not within(module, known)} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, set(BOTTOM))])
def test_the_bottom_imports_nothing_above_itself(name):
    allowed = next(allowed for module, allowed in BOTTOM.items() if within(name, {module}))
    assert {module for module in imports(name) if within(module, {"agentrun"}) and not within(module, allowed)} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, {"agentrun.cli"})])
def test_only_the_command_line_imports_the_command_line(name):
    assert not {module for module in imports(name) if within(module, {"agentrun.cli"})}


def test_no_module_imports_itself_in_a_circle():
    arrows = {name: {module for module in imports(name) if module in MODULES} for name in MODULES}
    # `from agentrun import rootfs` runs the package's __init__ as well, as any import below a package does: no arrow of its own.
    arrows = {name: {to for to in targets if to not in ("agentrun", "agentrun_shim")} for name, targets in arrows.items()}
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows


FORKS = {"fork", "forkpty", "unshare", "setns", "system", "popen", "spawnv", "spawnve", "spawnvp", "spawnl", "posix_spawnp"}
FORKS_MODULES = {"subprocess", "multiprocessing", "pty", "concurrent.futures.process"}


def process_making(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {*FORKS, "posix_spawn", "run_process", "open_process"}:
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg == "preexec_fn":
            found.add("preexec_fn")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & FORKS_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} & FORKS_MODULES
            found |= {alias.name for alias in node.names} & FORKS if node.module == "os" else set()
    return found


def test_process_making_is_seen():
    assert process_making("import os, subprocess\nos.fork()\nsubprocess.run([], preexec_fn=f)") == {
        "subprocess",
        "fork",
        "preexec_fn",
    }
    assert process_making("from os import unshare\nimport trio\ntrio.run_process") == {"unshare", "run_process"}


MAY = {
    "agentrun.zygote": {"posix_spawn"},
    "agentrun.burst.link": {"posix_spawn"},
    "agentrun.image.programs": {"posix_spawn"},  # zstd and skopeo, for `agentrun image`
    "agentrun.cli.session": {"fork"},  # of a session
    "agentrun.probes.tracefs": {"unshare"},  # in the probes process, which is not the daemon
    "agentrun.egress.netns": {"setns"},  # in a thread that is started for it and ends there: test_egress.py counts them
}


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, {"agentrun"})])
def test_the_daemon_never_forks(name):
    assert process_making(MODULES[name].read_text()) == MAY.get(name, set())


def test_public_names_are_sorted_and_importable():
    def rank(name: str) -> tuple[int, str]:  # ruff's isort style: CONSTANTS, Classes, functions
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    names = agentrun.__all__
    assert names == sorted(names, key=rank)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(agentrun, name).__class__ is not type(ast), f"{name} is a module"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_stays_short(name):
    text = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 500


def test_the_native_slot_stays_small_enough_to_be_read():
    files = [*native.SOURCES["agentrun-slot"], "slot.h", "sys.h"]
    assert set(files) == {
        *(f"{name}.c" for name in ("zygote", "plan", "template", "init", "runner", "rights", "landlock", "shared", "start")),
        "slot.h",
        "sys.h",
    }
    assert sum(len((NATIVE / file).read_text().splitlines()) for file in files) <= 1000


def test_the_oci_runtimes_native_half_shares_the_slots_code_and_stays_small():
    assert native.SOURCES["agentrun-oci"] == ("oci_*.c", "shared.c", "rights.c", "start.c")
    files = [*NATIVE.glob("oci_*.c"), NATIVE / "oci.h"]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 2000
    assert max(len(file.read_text().splitlines()) for file in files) <= 400


def test_no_hosts_in_the_repository():
    found = []
    for file in ROOT.rglob("*"):
        inside = file.relative_to(ROOT)
        if UNTRACKED & set(inside.parts) or any(part.startswith(".") and part.endswith("_cache") for part in inside.parts):
            continue
        if file.is_file() and file.name != "LICENSE" and file.suffix in TEXT and inside.parts[0] != "tests":
            hosts = re.findall(r"https?:" + r"//([\w.-]+)", file.read_text(errors="replace"))
            found += [f"{inside}: {host}" for host in hosts if host not in CITED]
    assert found == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module(verb):
    name, summary = VERBS[verb]
    module = importlib.import_module(f"agentrun.cli.{name}")
    assert callable(module.add_arguments)
    assert callable(module.run)
    assert summary
