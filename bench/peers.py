"""The peers: which are installed, how to install them, and how each is called here.

Each has a list of ways to call it, the plainest first. The first way whose trial call succeeds is measured, and its deviation
from the plain one is printed; a peer of which none succeeds is left out with its own error line, never silently.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agentrun_shim.seccomp import default_filter
from bench.bundle import PROGRAM, make_bundle
from bench.contender import Program
from bench.numbers import Report

PACKAGES = {"bwrap": "bubblewrap", "crun": "crun", "runc": "runc", "podman": "podman"}
"""Program → Debian package."""
BWRAP = "bubblewrap"
CRUN = "crun run"
_FILTER_FD = 9

Way = tuple[Program, str]


class Peers(msgspec.Struct):
    """What was found."""

    programs: list[Program]
    versions: dict[str, str]


def missing() -> list[str]:
    """The Debian packages of the peers that are not installed."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def install_line(packages: Sequence[str]) -> list[str]:
    """The command that installs them."""
    return ["apt-get", "install", "-y", "--no-install-recommends", *packages]


def install(report: Report) -> None:
    """Install what is missing, from the configured Debian archive; what fails is said and left out."""
    wanted = missing()
    if not wanted:
        return
    for command in (["apt-get", "update", "-q"], install_line(wanted)):
        report.say(f"$ {' '.join(command)}")
        try:
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            report.say(f"  {error}")
            return
        if done.returncode:
            report.say(f"  exit status {done.returncode}")


def find_peers(scratch: Path, report: Report) -> Peers:
    """The peers that work here, each tried once; those that do not are reported with their own words."""
    if lacking := missing():
        report.say(f"not installed: {', '.join(lacking)} ({' '.join(install_line(lacking))}, or --install)")
    peers = Peers([], {})
    bundle = make_bundle(scratch)
    for name, ways in _ways(scratch, bundle):
        program = shutil.which(name)
        if program is None:
            continue
        peers.versions[name] = _version(program)
        errors: list[str] = []
        for contender, deviation in ways:
            error = contender.try_once(scratch)
            if not error:
                peers.programs.append(contender)
                if deviation:
                    contender.note = f"{contender.note}; {deviation}" if contender.note else deviation
                    report.say(f"{contender.name}: called with {deviation}; without: {errors[-1]}")
                break
            errors.append(error)
        else:
            report.say(f"LEFT OUT {name} {peers.versions[name]}: {errors[-1]}")
    return peers


@contextlib.contextmanager
def no_leftovers(parent: Path = Path("/sys/fs/cgroup/libpod_parent")) -> Iterator[None]:
    """Remove the cgroups that podman leaves behind, if it was we who made it leave them."""
    existed = parent.exists()
    try:
        yield
    finally:
        if not existed:
            for directory, _, _ in os.walk(parent, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)


def _ways(scratch: Path, bundle: Path) -> Iterator[tuple[str, list[Way]]]:
    yield "bwrap", [(_bubblewrap(scratch), "")]
    yield "crun", [_oci("crun", scratch, bundle), _oci("crun", scratch, bundle, "--cgroup-manager=disabled")]
    yield "runc", [_oci("runc", scratch, bundle)]
    limits = ["--pids-limit", "-1", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]
    yield (
        "podman",
        [
            _podman(scratch, bundle),
            _podman(scratch, bundle, run=limits),
            _podman(scratch, bundle, run=[*limits, "--cgroups", "disabled"]),
            _podman(scratch, bundle, run=limits, runtime="runc"),
        ],
    )


def _bubblewrap(scratch: Path) -> Program:
    """The namespaces of an agentrun sandbox, its seccomp filter, no capabilities, the host's root read-only."""
    program = scratch / "filter.bpf"
    program.write_bytes(default_filter())
    argv = [
        shutil.which("bwrap") or "bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc",
        "--tmpfs", "/tmp", "--die-with-parent", "--cap-drop", "ALL", "--new-session", "--seccomp", str(_FILTER_FD), PROGRAM,
    ]  # fmt: skip
    # Opened anew for each call: bwrap reads the filter to its end.
    action = (os.POSIX_SPAWN_OPEN, _FILTER_FD, str(program), os.O_RDONLY, 0)
    return Program(
        BWRAP, lambda: argv, actions=[action], note="all namespaces, agentrun's own seccomp filter, no cgroup of its own"
    )


def _oci(name: str, scratch: Path, bundle: Path, *options: str) -> Way:
    program = shutil.which(name) or name
    front = [program, "--root", str(scratch / f"{name}-state"), *options, "run", "--bundle", str(bundle)]
    numbers = itertools.count(1)
    note = "a fresh container for each call; no user namespace, no seccomp filter"
    return Program(f"{name} run", lambda: [*front, f"agentrun-bench-{os.getpid()}-{next(numbers)}"], note=note), " ".join(options)


def _podman(scratch: Path, bundle: Path, run: Sequence[str] = (), runtime: str = "crun") -> Way:
    argv = [
        shutil.which("podman") or "podman", "--root", str(scratch / "podman"), "--runroot", str(scratch / "podman-run"),
        "--storage-driver", "vfs", "--events-backend", "none", "--cgroup-manager", "cgroupfs", "--runtime", runtime,
        "run", "--rm", "--network", "none", *run, "--rootfs", str(bundle / "rootfs"), PROGRAM,
    ]  # fmt: skip
    deviation = " ".join(run) + (f" --runtime {runtime}" if runtime != "crun" else "")
    return Program("podman run", lambda: argv, note="no image: the bundle's directory is the root"), deviation


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next((line.split()[-1] for line in done.stdout.splitlines() if line.strip()), "?")
