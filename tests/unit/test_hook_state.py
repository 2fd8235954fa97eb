# SPDX-License-Identifier: Apache-2.0
"""What the hook reads out of a container's state, and the rules by which a policy's limits meet an engine's."""

import json
import os
import subprocess
import sys

import msgspec
import pytest

from agentrun.hookpolicy import container_files, governed, insisted, is_open, main
from agentrun.policy import DEFAULT, Limits, Policy
from agentrun_shim import hook
from agentrun_shim.hook_cgroup import Merged, cgroup_of, read_files, write_files
from agentrun_shim.hook_state import Container, HookError, unknown_annotations

MIB = 1 << 20


def state(status="created", **annotations) -> bytes:
    ours = {f"io.agentrun.{key}": value for key, value in annotations.items()}
    document = {
        "ociVersion": "1.0.2",
        "id": "web.1",
        "pid": 42,
        "bundle": "/b",
        "status": status,
        "annotations": {"a": "b", **ours},
    }
    return json.dumps(document).encode()


# ---------------------------------------------------------------- the state


@pytest.mark.parametrize(
    ("status", "stage"),
    [("creating", "createRuntime"), ("created", "createRuntime"), ("running", "poststart"), ("stopped", "poststop")],
)
def test_the_stage_is_told_by_the_status(status, stage):
    assert Container(state(status, policy="test")).stage == stage
    assert Container(state(status, policy="test"), "poststop").stage == "poststop"


def test_what_annotations_ask_for():
    container = Container(state(policy="test", tenant="ci", memory="high", fail="open", daemon="required"))
    assert (container.policy, container.tenant, container.memory, container.fail) == ("test", "ci", "memory:high", "open")
    assert container.needs_daemon
    assert (container.id, container.pid, container.bundle) == ("web.1", 42, "/b")
    plain = Container(state(policy="test"))
    assert (plain.tenant, plain.memory, plain.fail, plain.needs_daemon) == (None, None, "", False)


@pytest.mark.parametrize("said", ["4g", "memory:4g", "memory=4g"])
def test_a_hint_in_every_spelling(said):
    assert Container(state(policy="test", memory=said)).memory == "memory:4g"


def test_a_long_id_is_cut_for_people_only():
    raw = json.dumps({"id": "ab" * 32, "status": "created", "annotations": {"io.agentrun.policy": "x"}}).encode()
    assert (Container(raw).name, Container(raw).id) == ("ab" * 6, "ab" * 32)


def test_annotations_that_look_like_ours_and_are_none():
    assert unknown_annotations(state(polcy="test", fail="open")) == ["io.agentrun.polcy"]
    assert unknown_annotations(state(policy="test")) == []
    assert unknown_annotations(b'{"annotations": null}') == []


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no container state"),
        (b"{", "no container state"),
        (b"\xff", "no container state"),
        (b"[]", "not an object"),
        (b'{"annotations": []}', None),
        (b'{"annotations": [1]}', "not a map"),
        (b'{"annotations": {"a": 1}}', "not a map"),
        (state("odd", policy="test"), "status"),
        (state(policy="test", fail="maybe"), "open or closed"),
        (state(policy=""), "it names none"),
        (state(policy="", fail="open"), None),
        (state(policy="test", daemon="yes"), "required or optional"),
        (state(policy="test").replace(b"web.1", b"../x"), "id"),
        (state(policy="test").replace(b"web.1", b""), "id"),
    ],
)
def test_what_is_no_state_is_refused(raw, why):
    if why is None:
        assert Container(raw).policy == ""
        return
    with pytest.raises(HookError, match=why):
        Container(raw)


# ---------------------------------------------------------------- limits that meet


@pytest.mark.parametrize(
    ("name", "there", "text", "kept"),
    [
        ("memory.max", "max", "100", False),
        ("memory.max", "99", "100", True),
        ("memory.max", "101", "100", False),
        ("memory.swap.max", "max", "0", False),
        ("memory.swap.max", "0", "max", True),
        ("pids.max", "64", "512", True),
        ("cpu.max", "max 100000", "50000 100000", False),
        ("cpu.max", "20000 50000", "50000 100000", True),
        ("cpu.max", "40000 50000", "50000 100000", False),
        ("cpu.weight", "100", "10", False),
        ("cpu.weight", "79", "10", True),
        ("io.weight", "default 100", "10", False),
        ("io.weight", "default 50", "10", True),
        ("memory.oom.group", "0", "1", False),
    ],
)
def test_the_tighter_one_holds(name, there, text, kept):
    merged = Merged({name: there}, {name: text})
    assert (merged.kept, merged.write) == (({name: there}, {}) if kept else ({}, {name: text}))


def test_what_is_there_already_is_not_written_again():
    merged = Merged({"memory.max": "100", "pids.max": None}, {"memory.max": "100", "pids.max": "5"})
    assert (merged.kept, merged.write, merged.missing) == ({}, {}, ["pids.max"])


def test_a_burst_of_processor_time_goes_with_its_quota():
    merged = Merged({"cpu.max": "1000 100000", "cpu.max.burst": "0"}, {"cpu.max": "50000 100000", "cpu.max.burst": "50000"})
    assert merged.write == {}


BURSTING = Limits(memory_max=512 * MIB, memory_high=64 * MIB, memory_burst=256 * MIB, burst_seconds=10.0)


def laid(limits, counted=False, **found):
    there = {name.replace("_", "."): text for name, text in found.items()}
    merged = Merged(there, container_files(limits))
    return governed(limits, merged, there, counted=counted)


def test_what_is_governed_without_a_word_of_the_engines():
    limits, notes = laid(BURSTING, memory_max="max", memory_high="max")
    assert (limits, notes) == (BURSTING, [])


def test_a_burst_fits_below_the_engines_limit():
    limits, notes = laid(BURSTING, memory_max=str(128 * MIB), memory_high="max")
    assert (limits.memory_max, limits.memory_high, limits.memory_burst) == (128 * MIB, 64 * MIB, 64 * MIB)
    assert notes == []


def test_an_engines_limit_below_the_steady_budget_leaves_nothing_to_govern():
    limits, notes = laid(BURSTING, memory_max=str(32 * MIB), memory_high="max")
    assert (limits.memory_max, limits.memory_high, limits.memory_burst) == (32 * MIB, None, None)
    assert "below the policy's memory.high" in notes[0]


def test_an_engines_own_brake_is_left_alone():
    limits, notes = laid(BURSTING, memory_max="max", memory_high=str(200 * MIB))
    assert (limits.memory_high, limits.memory_burst) == (None, None)
    assert "engine's own" in notes[0]


def test_without_a_controller_only_programs_can_hold_it():
    assert laid(BURSTING)[0].memory_high is None
    assert laid(BURSTING)[0].memory_max is None
    assert laid(BURSTING, counted=True)[0] == BURSTING


def test_a_container_has_no_init_of_ours():
    assert container_files(Limits(pids_max=7))["pids.max"] == "7"


def test_who_insists_on_what():
    policy = Policy(name="x", limits=Limits(memory_max=64 * MIB, cpus=0.5))
    assert insisted(DEFAULT, "") == set()
    assert insisted(policy, "") == {"memory.max", "cpu.max"}
    assert insisted(policy, "open") == set()
    assert insisted(policy, "closed") == {"memory.max", "pids.max", "cpu.max"}
    easy = msgspec.structs.replace(policy, best_effort=True)
    assert (insisted(easy, ""), is_open(easy, ""), is_open(easy, "closed"), is_open(policy, "")) == (set(), True, False, False)
    assert "memory.max" in insisted(easy, "closed")


# ---------------------------------------------------------------- files


def test_control_files_are_read_and_written(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert read_files(fd, ["memory.max", "pids.max"]) == {"memory.max": "max", "pids.max": None}
        write_files(fd, {"memory.max": "100"}, "/where")
        assert (tmp_path / "memory.max").read_text() == "100\n"
        with pytest.raises(HookError, match=r"writing '1' to /where/memory\.high: its cgroup has no memory controller"):
            write_files(fd, {"memory.high": "1"}, "/where")
        with pytest.raises(HookError, match=r"this kernel has no cpu\.max\.burst"):
            write_files(fd, {"cpu.max.burst": "1"}, "/where")
    finally:
        os.close(fd)


def test_a_container_must_have_a_cgroup_of_its_own():
    with pytest.raises(HookError, match="also its runtime's"):
        cgroup_of(os.getpid())
    with pytest.raises(HookError, match="no pid"):
        cgroup_of(0)
    with pytest.raises(HookError, match="process 4194304: No such file"):
        cgroup_of(4194304)


# ---------------------------------------------------------------- the program


def run_hook(raw: bytes, *words: str, tmp) -> subprocess.CompletedProcess[bytes]:
    """As an engine does: no environment, no open files."""
    argv = [sys.executable, "-I", "-S", "-E", hook.__file__, f"--socket={tmp}/s", f"--policies={tmp}/policies.json", *words]
    return subprocess.run(argv, input=raw, capture_output=True, env={}, cwd="/", timeout=30)


def test_a_container_that_asks_for_nothing_is_let_be(tmp_path):
    done = run_hook(state(), tmp=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("annotations", "status", "code"),
    [
        ({"polcy": "test"}, "created", 1),
        ({"polcy": "test"}, "running", 0),
        ({"polcy": "test", "fail": "open"}, "created", 0),
        ({"policy": "test", "fail": "maybe"}, "created", 1),
    ],
)
def test_a_mistake_in_the_annotations_is_no_silent_pass(tmp_path, annotations, status, code):
    done = run_hook(state(status, **annotations), tmp=tmp_path)
    assert done.returncode == code
    assert b"io.agentrun." in done.stderr
    assert (tmp_path / "hook.log").read_bytes().endswith(done.stderr)


def test_wrong_usage(tmp_path):
    done = run_hook(b"", "prestart", tmp=tmp_path)
    assert (done.returncode, done.stderr) == (2, hook.USAGE)


def test_it_imports_next_to_nothing(tmp_path):
    """Each of these takes as long as half of Python's start."""
    argv = [sys.executable, "-I", "-S", "-E", "-X", "importtime", hook.__file__, f"--socket={tmp_path}/s"]
    done = subprocess.run(argv, input=state(), capture_output=True, env={}, text=False, timeout=30)
    imported = {line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines()}
    assert "agentrun_shim.hook_cgroup" in imported
    assert not imported & {"re", "json", "socket", "typing", "enum", "msgspec", "subprocess", "pathlib", "site"}


def test_the_loader_takes_no_relative_path(tmp_path, monkeypatch, capsys):
    """Its directory is the engine's; the daemon says the same."""
    (tmp_path / "mine.toml").write_text('name = "mine"\ndescription = "For me."\nmemory.max = "64M"\n')
    monkeypatch.chdir(tmp_path)
    for name, found in (("mine.toml", "error"), ("./mine.toml", "error"), (str(tmp_path / "mine.toml"), "files")):
        assert main(["", name]) == 0
        assert found in json.loads(capsys.readouterr().out), name
