# SPDX-License-Identifier: Apache-2.0
"""The OCI hook under crun, runc and podman on a kernel with all of cgroup v2: run in a guest by test_hook.py.

    python -m tests.vm.run --ext4 6.1 -- .venv/bin/python -m tests.vm.guest_hook [NAME…]

Real runtimes, the real hook as `agentrun setup oci` has it run, a real daemon with its programs in the kernel. Verdicts are
printed as guest_limits.py does. Checks of ``WITH`` are run for each runtime with one daemon; those of ``BETWEEN`` see it end and
another begin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentrun import cli
from agentrun.cli.bursts import follow
from agentrun_shim import native
from tests import support
from tests.containers import RUNTIMES, Container, hook_argv, make_rootfs
from tests.hog import compile_hog
from tests.support import Daemon, eventually
from tests.vm.guest_limits import EXT4, MIB, MOUNT, verdict

BUDGET = 64 * MIB
POLICIES = {
    "hook-kill": 'memory = { high = "64M", max = "512M", on_exhausted = "kill" }\npids.max = 77',
    "hook-burst": 'memory = { high = "64M", max = "512M", burst = "256M", burst_seconds = 30 }',
    "hook-steps": 'memory = { high = "64M", max = "512M", burst = "64M", burst_seconds = 0.2, on_exhausted = "throttle",'
    " throttle_seconds = 1, freeze_seconds = 1 }",
    "hook-easy": 'best_effort = true\nmemory = { high = "64M", max = "512M" }',
}
IDLE = ["/bin/busybox", "sleep", "1000"]

Check = Callable[["Lab", str], str]
WITH: dict[str, Check] = {}
BETWEEN = (
    *(f"{runtime}: static_limits_without_a_daemon" for runtime in RUNTIMES),
    "what_is_below_a_container_counts_too", "the_next_daemon_takes_over", "podman_runs_the_hook_by_annotation",
    "podman_knows_the_runtime_by_its_name",
)  # fmt: skip


def check(function: Check) -> Check:
    WITH[function.__name__] = function
    return function


class Lab:
    """A daemon, a root file system, and what has been seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        (directory / "daemon").mkdir()
        self.rootfs = make_rootfs(directory / "rootfs", compile_hog(directory))
        self.cache = directory / "policies.json"
        self.hooks = hook_argv(str(directory / "daemon" / "s"), str(self.cache))
        self.log = directory / "daemon" / "hook.log"
        self._news = directory / "bursts"
        self._number = 0
        self.daemon: Daemon
        self.start_daemon()

    def start_daemon(self, *, probes: bool = True) -> None:
        self.daemon = Daemon(self.directory / "daemon", config=f"probes = {str(probes).lower()}\npool_least = 0")
        mode = self.status()["memory"]["mode"]
        assert mode == ("controller+bpf" if probes else "controller"), mode
        threading.Thread(target=self._follow, daemon=True).start()
        eventually(lambda: self._news.exists() and b"listening" in self._news.read_bytes(), "bursts", 60)

    def _follow(self) -> None:
        """What `agentrun bursts` does, without the seconds that a guest takes to start it; the host lane has it itself."""
        with self._news.open("a") as news:
            for one in follow(self.daemon.socket, {"op": "bursts"}):
                print(json.dumps(one), file=news, flush=True)

    def stop_daemon(self) -> None:
        self.daemon.take_log()
        self.daemon.stop()
        self._news.unlink()

    def ask(self, op: str) -> Any:
        return self.daemon.ask(op=op)["data"]  # type: ignore[no-untyped-call]

    def status(self) -> Any:
        return self.ask("status")

    def listed(self, name: str) -> dict[str, Any] | None:
        rows = self.ask("ps")["containers"]
        return next((row for row in rows if row["id"] == name), None)

    def everything(self) -> list[dict[str, Any]]:
        """What `agentrun bursts` has said."""
        lines = self._news.read_text().splitlines(keepends=True)
        return [news for line in lines if line.endswith("\n") and "call" in (news := json.loads(line))]

    def news(self, name: str) -> list[dict[str, Any]]:
        return [news for news in self.everything() if news["call"] == name]

    def rungs(self, name: str) -> list[str]:
        return [news["rung"] for news in self.news(name) if news["event"] == "step"]

    def make(
        self, runtime: str, args: Sequence[str], memory: int = 0, words: Sequence[str] = (), **annotations: str
    ) -> Container:
        self._number += 1
        name = f"{runtime}-{self._number}"
        limit = {"limit": memory} if memory else {}
        return Container(runtime, self.directory, name, self.rootfs, args, self.hooks, limit, words=words, **annotations)

    def run(self, runtime: str, args: Sequence[str], memory: int = 0, **annotations: str) -> Container:
        """Created and started, or an error."""
        container = self.make(runtime, args, memory, **annotations)
        for verb in (container.create, container.start):
            done = verb()
            assert done.returncode == 0, (done, self.said())
        return container

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def remove(self, container: Container, cgroup: Path | None = None) -> None:
        """Delete it; nothing may be left, of it or of what we knew of it."""
        done = container.delete()
        assert done.returncode == 0, done
        assert self.listed(container.name) is None
        assert not list((self.directory / "daemon").glob(f"s.containers/{container.name}-*"))
        assert cgroup is None or not cgroup.exists(), cgroup


def flat(cgroup: Path, *names: str) -> list[str]:
    return [(cgroup / name).read_text().strip() for name in names]


@check
def limits_are_in_force_before_it_starts(lab: Lab, runtime: str) -> str:
    container = lab.make(runtime, IDLE, policy="hook-kill")
    done = container.create()
    assert done.returncode == 0, (done, lab.said())
    cgroup = container.cgroup(MOUNT)
    found = flat(cgroup, "memory.high", "memory.max", "memory.swap.max", "pids.max", "memory.oom.group")
    row = lab.listed(container.name)
    assert found == [str(BUDGET), str(512 * MIB), "0", "77", "1"], found
    assert row is not None
    assert (row["policy"], row["cgroup"], row["unenforced"], row["notes"]) == ("hook-kill", str(cgroup), [], []), row
    assert container.start().returncode == 0
    (top,) = [row for row in lab.ask("top")["containers"] if row["call"] == container.name]
    assert (top["high"], top["max"], top["rung"]) == (BUDGET, 512 * MIB, "within"), top
    lab.remove(container, cgroup)
    return f"{cgroup}: {found}"


@check
def a_hog_is_killed_at_its_budget(lab: Lab, runtime: str) -> str:
    container = lab.run(runtime, ["/bin/hog", "anon", "256"], policy="hook-kill")
    eventually(lambda: not container.is_running(), "the end of the hog")
    eventually(lambda: "killed" in lab.rungs(container.name), "news of it")
    row = lab.listed(container.name)
    cgroup = next(path for path in (MOUNT / container.name,) if path.exists())
    events = dict(line.split() for line in (cgroup / "memory.events").read_text().splitlines())
    over = int((cgroup / "memory.peak").read_text()) - BUDGET if (cgroup / "memory.peak").exists() else None
    assert row is not None
    assert row["killed"], row
    assert events["oom_kill"] == "0", events  # it was not the kernel's limit
    assert over is None or over <= 5 * MIB, over
    lab.remove(container, cgroup)
    reaction = [news["reaction"] for news in lab.news(container.name) if news.get("rung") == "killed"]
    return (
        f"{'' if over is None else f'+{over / MIB:.2f} MB, '}{lab.rungs(container.name)}, reaction {reaction} s, {row['killed']}"
    )


@check
def a_burst_within_its_allowance_is_granted(lab: Lab, runtime: str) -> str:
    if runtime != "crun":
        return "the governor is the daemon's: once is enough"
    container = lab.run(runtime, ["/bin/hog", "anon", "128"], policy="hook-burst")
    eventually(lambda: not container.is_running(), "the end of the hog", 60)
    rungs = lab.rungs(container.name)
    assert "granted" in rungs, (rungs, lab.news(container.name))
    assert not {"throttled", "frozen", "killed"} & set(rungs), lab.news(container.name)
    assert container.output.read_text().startswith("done anon"), container.output.read_text()
    lab.remove(container)
    return f"{rungs}, {container.output.read_text().strip()}"


@check
def every_rung_is_reached_and_bounded(lab: Lab, runtime: str) -> str:
    if runtime != "crun":
        return "so is the ladder"
    began = time.monotonic()
    container = lab.run(runtime, ["/bin/hog", "anon", "256"], policy="hook-steps")
    eventually(lambda: "killed" in lab.rungs(container.name), "the end of the ladder", 40)
    assert lab.rungs(container.name) == ["granted", "throttled", "frozen", "killed"], lab.news(container.name)
    eventually(lambda: not container.is_running(), "the end of the hog")
    lab.remove(container)
    return f"{lab.rungs(container.name)} in {time.monotonic() - began:.1f} s"


@check
def set_up_is_recorded(lab: Lab, runtime: str) -> str:
    """In `agentrun lat`, once it is gone, and while it lives in `agentrun ps --json`."""
    eventually(lambda: lab.ask("latency")["recording"], "phases to be recorded", 60)
    container = lab.run(runtime, ["/bin/busybox", "sh", "-c", "echo hello; sleep 1000"], policy="hook-easy")
    eventually(lambda: container.output.read_text() == "hello\n", "its word")
    row = lab.listed(container.name)
    assert row is not None
    seen = {phase: value for phase, value in row["phases"].items() if value is not None}
    assert {"mounts", "pivot_root", "exec", "first_syscall", "first_write"} <= seen.keys(), seen
    lab.remove(container)
    report = lab.ask("latency")
    found = {one["phase"]: one["count"] for one in report["histograms"] if one["shape"] == "container/hook-easy"}
    assert found.get("teardown"), report
    assert found["exec"] == found["teardown"], found
    return ", ".join(f"{phase} {value * 1e3:.1f} ms" for phase, value in seen.items())


@check
def an_engines_tighter_limit_stays(lab: Lab, runtime: str) -> str:
    """Each runtime has its own time to write it: before the hook, or what the policy says would not hold."""
    container = lab.run(runtime, IDLE, 32 * MIB, policy="hook-burst")
    cgroup = container.cgroup(MOUNT)
    row = lab.listed(container.name)
    assert flat(cgroup, "memory.max") == [str(32 * MIB)]
    assert row is not None
    lab.remove(container, cgroup)
    return str(row["notes"])


@check
def failures_are_as_the_policy_says(lab: Lab, runtime: str) -> str:
    """Closed, unless the policy or the container says open: then it runs, and a line says what is not enforced."""
    said = []
    closed = lab.make(runtime, IDLE, policy="no-such")
    done = closed.create()
    assert done.returncode != 0, done
    assert f'{closed.name}: not started: policy no-such is not enforced: policy: there is no policy "no-such"' in lab.said()
    assert runtime != "runc" or "there is no policy" in done.stderr, done  # crun shows no hook's standard error
    said.append(done.stderr.strip().splitlines()[-1][-120:])
    closed.delete()
    opened = lab.run(runtime, IDLE, policy="no-such", fail="open")
    assert opened.is_running()
    assert f'{opened.name}: policy no-such is not enforced: policy: there is no policy "no-such"' in lab.said()
    lab.remove(opened)
    return " | ".join(said)


@check
def a_container_in_its_runtimes_own_cgroup_is_not_limited_with_it(lab: Lab, runtime: str) -> str:
    """Limits would be those of whoever started it."""
    if runtime != "crun":
        return "only crun runs containers without a cgroup"
    said = []
    for fail in ("closed", "open"):
        words = ["--cgroup-manager=disabled"]
        container = lab.make(runtime, IDLE, words=words, policy="hook-kill", fail=fail)
        done = container.create()
        assert (done.returncode == 0) is (fail == "open"), done
        (line,) = [line for line in lab.said().splitlines() if container.name in line]
        assert "no cgroup2 cgroup of its own" in line, line
        said.append(line)
        container.delete()
    return " | ".join(said)


@check
def what_vanishes_without_a_word_is_dropped(lab: Lab, runtime: str) -> str:
    """Its runtime died, say: no poststop hook."""
    container = lab.run(runtime, IDLE, policy="hook-kill")
    cgroup = container.cgroup(MOUNT)
    assert lab.listed(container.name)
    os.kill(container.pid, signal.SIGKILL)

    def removed() -> bool:
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    eventually(removed, "an empty cgroup")
    began = time.monotonic()
    eventually(lambda: lab.listed(container.name) is None, "that it is noticed", 5)
    took = time.monotonic() - began
    container.delete()
    return f"after {took:.1f} s"


def static_limits_without_a_daemon(lab: Lab, runtime: str) -> tuple[str, Container]:
    container = lab.run(runtime, IDLE, policy="hook-kill")
    cgroup = container.cgroup(MOUNT)
    assert flat(cgroup, "memory.high", "memory.max", "pids.max") == [str(BUDGET), str(512 * MIB), "77"]
    said = [line for line in lab.said().splitlines() if container.name in line]
    assert len(said) == 1, said
    assert "no daemon at" in said[0], said
    assert "the static limits of policy hook-kill are in force" in said[0], said
    refused = lab.make(runtime, IDLE, policy="hook-kill", daemon="required")
    assert refused.create().returncode != 0
    assert f"{refused.name}: not started: policy hook-kill is not enforced: no daemon at" in lab.said()
    refused.delete()
    return said[0], container


def exec_hog(container: Container) -> None:
    container.call("exec", container.name, "/bin/hog", "anon", "256", timeout=60)


def the_next_daemon_takes_over(lab: Lab, containers: Sequence[Container]) -> str:
    """What the last one held, and what a hook without one left: listed, and held to its budget."""
    said = []
    for container in containers:
        began = time.monotonic()
        row = lab.listed(container.name)
        assert row is not None, (container.name, lab.daemon.log())
        exec_hog(container)
        eventually(lambda: not container.is_running(), "the end of the hog")  # noqa: B023
        eventually(lambda: "killed" in lab.rungs(container.name), "news of it")  # noqa: B023
        lab.remove(container)
        said.append(f"{container.name} {lab.rungs(container.name)} in {time.monotonic() - began:.1f} s")
    return ", ".join(said)


def what_is_below_a_container_counts_too(lab: Lab) -> str:
    """The programs see the charges of a cgroup, not of those below it: the controller's own notices do."""
    cgroup = MOUNT / "delegated"
    below = cgroup / "below"
    below.mkdir(parents=True)
    (cgroup / "cgroup.subtree_control").write_text("+memory +pids")
    (cgroup / "memory.high").write_text("max")
    request = {"op": "register", "id": "delegated", "bundle": "/b", "cgroup": "/delegated", "inode": cgroup.stat().st_ino,
               "policy": "hook-kill", "started": True}  # fmt: skip
    answer = lab.daemon.ask(**request)["data"]  # type: ignore[no-untyped-call]
    for name, text in answer["write"].items():
        (cgroup / name).write_text(text)
    again = lab.daemon.ask(**request | {"started": False})["data"]  # type: ignore[no-untyped-call]
    # Whoever uses the cgroup for another container: what we wrote is not taken for the engine's.
    assert (again["known"], again["write"], again["kept"], again["notes"]) == (False, answer["write"], {}, []), again
    command = 'echo 0 > "$1/cgroup.procs"; exec "$2" anon 256'
    done = subprocess.run(["sh", "-c", command, "sh", below, lab.directory / "hog"], check=False, timeout=60)
    eventually(lambda: "killed" in lab.rungs("delegated"), "news of it")
    peak = below / "memory.peak"
    over = int(peak.read_text()) - BUDGET if peak.exists() else None
    eventually(lambda: not (below / "cgroup.procs").read_text(), "its end")
    below.rmdir()
    cgroup.rmdir()
    assert done.returncode == -signal.SIGKILL, done
    assert over is None or over <= 8 * MIB, over
    eventually(lambda: lab.listed("delegated") is None, "that it is gone", 5)
    return f"{'' if over is None else f'+{over / MIB:.2f} MB, '}{lab.rungs('delegated')}"


POLICY = ("--annotation", "io.agentrun.policy=hook-kill")


def podman(lab: Lab, runtime: str, *words: str, flags: Sequence[str] = POLICY) -> subprocess.CompletedProcess[str]:
    """`podman run` of something, with nothing but its configuration to tell it of us."""
    argv = [
        "podman", "--root", str(lab.directory / "storage"), "--runroot", str(lab.directory / "run"), "--storage-driver", "vfs",
        "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", runtime, "run", "--rm", "--network", "none",
        "--log-driver", "none", *flags, "--rootfs", str(lab.rootfs), *words,
    ]  # fmt: skip
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)


def podman_runs_the_hook_by_annotation(lab: Lab, runtime: str = "crun") -> str:
    """As it is installed: files of hooks.d, a drop-in, an annotation on the command line."""
    before = {news["call"] for news in lab.everything()}
    done = podman(lab, runtime, "/bin/busybox", "sh", "-c", "cat /proc/self/cgroup; exec hog anon 256")
    assert done.returncode == 137, done
    (name,) = eventually(lambda: {news["call"] for news in lab.everything()} - before, "news of it")
    assert len(name) == 64, name
    eventually(lambda: "killed" in lab.rungs(name), "news of its end")
    assert not lab.ask("ps")["containers"]
    return f"{lab.rungs(name)}; {done.stderr.strip()}"


def podman_knows_the_runtime_by_its_name(lab: Lab) -> str:
    """By the drop-in, which also makes podman ask it for JSON, or 127 would be 125; and the hook is run by it as by others."""
    done = podman(lab, "agentrun-oci", "/bin/no-such")
    assert done.returncode == 127, done
    alone = podman(lab, "agentrun-oci", "/bin/busybox", "true", flags=["--cgroups", "disabled"])
    assert alone.returncode == 0, alone
    return f"{podman_runs_the_hook_by_annotation(lab, 'agentrun-oci')} | {done.stderr.strip()}"


def main(names: Sequence[str]) -> None:
    support.PATIENCE = 90.0  # to start a daemon; two guests and whatever else share two processors
    policies = Path("/etc/agentrun/policies")
    policies.mkdir(parents=True, exist_ok=True)
    for name, text in POLICIES.items():
        (policies / f"{name}.toml").write_text(f'name = "{name}"\ndescription = "For the hook."\n{text}\n')
    with verdict("ready"):
        lab = Lab(EXT4 / "hook")
    for runtime in RUNTIMES:
        for name, function in WITH.items():
            if not names or name in names:
                with verdict(f"{runtime}: {name}") as details:
                    details.append(function(lab, runtime))
    if names and not set(names) & set(BETWEEN):
        return
    kept = lab.run("crun", IDLE, policy="hook-kill")
    lab.stop_daemon()
    left = [kept]
    for runtime in RUNTIMES:
        with verdict(f"{runtime}: static_limits_without_a_daemon") as details:
            said, container = static_limits_without_a_daemon(lab, runtime)
            details.append(said)
            left.append(container)
    lab.start_daemon(probes=False)  # the controller alone has to do: programs take seconds to compile
    with verdict("what_is_below_a_container_counts_too") as details:
        details.append(what_is_below_a_container_counts_too(lab))
    with verdict("the_next_daemon_takes_over") as details:
        details.append(the_next_daemon_takes_over(lab, left))
    with contextlib.redirect_stdout(io.StringIO()):
        words = ["setup", "oci", "--engine", "podman", "--runtime", str(native.DIRECTORY / "agentrun-oci")]
        assert cli.main([*words, "--socket", lab.daemon.socket]) == 0
    with verdict("podman_runs_the_hook_by_annotation") as details:
        details.append(podman_runs_the_hook_by_annotation(lab))
    with verdict("podman_knows_the_runtime_by_its_name") as details:
        details.append(podman_knows_the_runtime_by_its_name(lab))
    lab.stop_daemon()


if __name__ == "__main__":
    main(sys.argv[1:])
