# SPDX-License-Identifier: Apache-2.0
"""How the unit starts, ends and begins again: steps of guest_systemd.py, which build on each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.vm.unit import ETC, POLICY, SERVICE, SOCKET, Step, Unit, below, cgroups, drop_in, eventually, identity, same, sleeping

STOP_SECONDS = 30
"""TimeoutStopSec= of the unit."""
LIFE: dict[str, Step] = {}


def life(function: Step) -> Step:
    LIFE[function.__name__] = function
    return function


@life
def enabled_it_starts_at_once(unit: Unit) -> Any:
    unit.systemctl("enable", "--now", "agentrun.socket", "agentrun.service")
    same(unit.show("ActiveState", "SubState", "UnitFileState"), ["active", "running", "enabled"])
    same(unit.prints("--", "echo", "hello"), "hello\n")


@life
def reload_reads_policies(unit: Unit) -> Any:
    """All or none; what came of it is in the status, not in the exit code."""
    policy = ETC / "policies" / "changing.toml"
    host = ("--policy", "changing", "--", "hostname")
    before = unit.main_pid()
    same(unit.prints(*host), "first\n")
    policy.write_text(POLICY.format("changing", 'process.hostname = "second"'))
    same(unit.prints(*host), "first\n")
    unit.systemctl("reload", "agentrun.service")
    eventually(lambda: unit.show("StatusText")[0].endswith(" policies reloaded"), "reloaded")
    same(unit.prints(*host), "second\n")
    policy.write_text("name = 3\n")
    unit.systemctl("reload", "agentrun.service")
    said = eventually(lambda: next(iter([text for text in unit.show("StatusText") if "refused" in text]), None), "refused")
    assert f"the old policies stay: {policy}: " in said, said
    same(unit.prints(*host), "second\n")
    same((unit.show("ActiveState", "NRestarts"), unit.main_pid()), (["active", "0"], before))
    policy.unlink()
    return said


@life
def killed_it_comes_back(unit: Unit) -> Any:
    client = unit.begin("4711", "--", "sleep", "4711")
    old, processes, path = cgroups(SERVICE), below(SERVICE), identity(SOCKET)
    os.kill(unit.main_pid(), signal.SIGKILL)
    stdout, stderr = client.communicate(timeout=60)
    same((client.returncode, stdout), (125, ""))
    same(stderr, "agentrun: the daemon went away during the call; the tool call was killed with it\n")
    same(unit.prints("--", "echo", "again"), "again\n")  # it waits at the socket until there is a daemon again
    same(unit.show("ActiveState", "SubState", "NRestarts"), ["active", "running", "1"])
    same(sleeping("4711"), [])
    same([pid for pid in processes if Path(f"/proc/{pid}").exists()], [])
    same([str(old[inode]) for inode in old.keys() & cgroups(SERVICE).keys()], [])
    same(identity(SOCKET), path)


@life
def stopped_it_ends_its_calls(unit: Unit) -> Any:
    """In time, and its clients are told; what listens goes on listening."""
    path = identity(SOCKET)
    told = unit.begin("4712", "--json", "--", "sh", "-c", "echo begun; sleep 4712")
    deaf = unit.begin("4713", "--", "sh", "-c", "trap '' TERM INT HUP; sleep 4713")
    begun = time.monotonic()
    unit.systemctl("stop", "agentrun.service")
    seconds = time.monotonic() - begun
    assert seconds < STOP_SECONDS / 2, seconds
    stdout, stderr = told.communicate(timeout=60)
    result = json.loads(stdout)
    message = "killed because the daemon was stopped"
    same((told.returncode, result["outcome"], result["verdict"]["message"]), (137, "cancelled", message))
    same((result["stdout"], stderr), ("begun\n", ""))
    stdout, stderr = deaf.communicate(timeout=60)
    same((deaf.returncode, stdout, stderr), (137, "", f"agentrun: {message}\n"))
    same(sleeping("4712") + sleeping("4713"), [])
    same(cgroups(SERVICE), {})
    same(unit.show("ActiveState", "Result"), ["inactive", "success"])
    same(unit.show("ActiveState", "SubState", unit="agentrun.socket"), ["active", "listening"])
    same(identity(SOCKET), path)
    return round(seconds, 1)


@life
def a_mistake_in_its_configuration_is_told(unit: Unit) -> Any:
    """Whoever calls is told at once and systemd does not try for ever; when it is mended, the next call starts the service."""
    config = ETC / "config.toml"
    good, path = config.read_text(), identity(SOCKET)
    config.write_text("prbes = false\n")
    done = unit.exec("--", "true")
    same((done.returncode, done.stderr), (125, "agentrun: the daemon could not be started; its log says why\n"))
    eventually(lambda: unit.show("ActiveState") == ["failed"], "failed")
    same(unit.show("Result", "NRestarts", "ExecMainStatus"), ["exit-code", "0", "2"])
    log = unit.inside.must("journalctl", "--boot", "--no-pager", "--unit", "agentrun.service")
    assert f"agentrun: {config}: " in log, log
    same(unit.show("ActiveState", unit="agentrun.socket"), ["active"])
    config.write_text(good)
    same(unit.prints("--", "echo", "mended"), "mended\n")
    same((unit.show("ActiveState"), identity(SOCKET)), (["active"], path))


@life
def a_group_is_let_in(unit: Unit) -> Any:
    subprocess.run(["groupadd", "--system", "agentrun"], check=True)
    subprocess.run(["useradd", "--groups", "agentrun", "member"], check=True)
    subprocess.run(["useradd", "stranger"], check=True)
    uid = int(unit.inside.must("id", "-u", "member"))
    refusal = f"agentrun: cannot connect to {SOCKET}: Permission denied"
    before = unit.exec("--", "true", user="member")
    assert (before.returncode, before.stderr.startswith(refusal)) == (125, True), before
    drop_in("agentrun.socket", "[Socket]\nSocketGroup=agentrun\nSocketMode=0660\nDirectoryMode=0711\n")
    drop_in("agentrun.service", "[Service]\nRuntimeDirectoryMode=0711\n")
    unit.systemctl("daemon-reload")
    unit.systemctl("restart", "agentrun.socket", "agentrun.service")
    owner, _, mode = identity(SOCKET)
    same((owner, mode, identity(SOCKET.parent)[::2]), ("root:agentrun", "660", ("root:root", "711")))
    same(unit.prints("--", "id", "-un", user="member"), "tool\n")
    assert (SERVICE / "agentrun-daemon" / f"tenant-uid-{uid}").is_dir()
    other = unit.exec("--tenant", "default", "--", "true", user="member")
    same((other.returncode, other.stderr), (2, f"agentrun: tenant: user {uid} may not call for 'default' (yours is uid-{uid})\n"))
    stranger = unit.exec("--", "true", user="stranger")
    assert (stranger.returncode, stranger.stderr.startswith(refusal)) == (125, True), stranger
    listed = unit.inside("runuser", "-u", "member", "--", "ls", str(SOCKET.parent))
    assert listed.returncode != 0, listed
    same(unit.prints("--", "echo", "root"), "root\n")


@life
def without_its_socket_it_ends(unit: Unit) -> Any:
    """Then it is as if there was no daemon: root's calls have a runtime each, and others none."""
    unit.systemctl("stop", "agentrun.socket")
    same((unit.show("ActiveState", "Result"), cgroups(SERVICE), SOCKET.exists()), (["inactive", "success"], {}, False))
    alone = unit.exec("--json", "--", "echo", "alone")
    same((alone.returncode, json.loads(alone.stdout)["private_runtime"]), (0, True))
    same(unit.exec("--", "true", user="member").returncode, 125)
