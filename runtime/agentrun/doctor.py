"""Try what agentrun needs of a host, feature by feature. Nothing is assumed from versions; everything made is removed."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Literal

import msgspec
import trio

from agentrun import rootfs
from agentrun.burst.control import Control
from agentrun.burst.ladder import Mode
from agentrun.cgroup.tree import CONTROLLERS, Tree, find_base
from agentrun.errors import AgentrunError, HostError
from agentrun.image.shelf import default_root
from agentrun.imageroot import Owners
from agentrun.imageview import clone_layers
from agentrun.overlay import mount_overlay, wants_attached
from agentrun.policy import DEFAULT, NO_LIMITS
from agentrun.shape import ID_RANGE, plan_shape, shape_of
from agentrun.slot import build_slot
from agentrun.workspace import clone_mount
from agentrun.zygote import Zygote
from agentrun_shim import landlock
from agentrun_shim.seccomp import compile_profile, default_profile
from agentrun_shim.seccomp_profile import ProfileError

_ID_BASE = 0x6FFF0000


class Finding(msgspec.Struct, frozen=True):
    """One feature of the host."""

    feature: str
    state: Literal["works", "degraded", "missing"]
    detail: str = ""
    fix: str = ""


class Report(msgspec.Struct, frozen=True):
    """What was found; ``usable`` if tool calls can run at all."""

    usable: bool
    findings: list[Finding]


async def examine(socket_path: str) -> Report:
    """Run every probe, in the order in which they build on each other."""
    findings: list[Finding] = []
    usable = True
    for probe in (_root, _native, _cgroup):
        found = probe()
        findings += found
        usable = usable and all(finding.state != "missing" for finding in found[:1])
    if usable:
        try:
            findings += [finding async for finding in _sandbox()]
        except AgentrunError as error:
            usable = False
            findings.append(Finding("sandbox", "missing", str(error), 'see docs/design.md, "What the host must give"'))
    return Report(usable, [*findings, _landlock(), _descriptors(), *await _memory(), _daemon(socket_path)])


def _root() -> list[Finding]:
    if os.geteuid() == 0:
        return [Finding("root", "works", "effective uid 0")]
    return [Finding("root", "missing", f"effective uid {os.geteuid()}", "run the daemon as root; rootless is not supported yet")]


def _native() -> list[Finding]:
    from agentrun_shim.native import slot_program

    try:
        return [Finding("native slot", "works", slot_program())]
    except FileNotFoundError as error:
        return [Finding("native slot", "missing", error.strerror or "", "pip install agentrun, or `make build` in a checkout")]


def _cgroup() -> list[Finding]:
    try:
        base = find_base()
        tree = Tree(base, f"doctor-{os.getpid()}")
    except HostError as error:
        return [Finding("cgroup v2", "missing", str(error), "mount cgroup2, or run in a unit with Delegate=yes")]
    try:
        findings = [Finding("cgroup v2", "works", f"{base.path} ({base.origin})")]
        missing = tree.plan(msgspec.structs.replace(DEFAULT.limits, cpus=1.0)).missing
        reasons = {item.limit.partition(".")[0]: item.reason for item in missing}
        for name in CONTROLLERS:
            if name in tree.controllers:
                findings.append(Finding(f"controller {name}", "works"))
            elif name == "pids":
                findings.append(Finding("controller pids", "degraded", "processes are bounded by RLIMIT_NPROC instead"))
            else:
                why = reasons.get(name, f"no {name} controller here")
                findings.append(Finding(f"controller {name}", "missing", why, "boot with systemd.unified_cgroup_hierarchy=1"))
        for name, why in (("cgroup.kill", "Linux 5.14"), ("memory.peak", "Linux 5.19"), ("pids.peak", "Linux 6.1")):
            if name in tree.files:
                findings.append(Finding(name, "works"))
            elif name == "cgroup.kill":
                findings.append(Finding(name, "missing", f"needs {why}", "use a newer kernel"))
            elif name.partition(".")[0] in tree.controllers:
                findings.append(Finding(name, "degraded", f"needs {why}; results carry null or rusage's figure"))
        return findings
    finally:
        tree.close()


async def _sandbox() -> AsyncIterator[Finding]:
    """Build real sandboxes and run `true` in one."""
    read, write = os.pipe2(os.O_CLOEXEC)
    tree = Tree(find_base(), f"doctor-{os.getpid()}")
    try:
        tree.tenant("doctor", {})
        async with trio.open_nursery() as nursery:
            root = rootfs.open_host_root()
            try:
                yield Finding("mount API", "works", f"{len(root.fds)} detached mounts make the image")
                program = compile_profile(default_profile(), notify=True)
                yield Finding("seccomp profiles", "works", f"the default one has {len(program) // 8} instructions")
                plan = plan_shape(shape_of(DEFAULT), root, program, notify=True)
                zygote = Zygote.spawn(read, nursery)
                await zygote.shape(plan, root.fds)
            except (OSError, ProfileError) as error:
                raise HostError(f"seccomp: {error}") from error
            finally:
                root.close()
            try:
                for finding in [await _clone(zygote, tree, use_clone3) for use_clone3 in (True, False)]:
                    yield finding
                yield await _idmap(zygote)
                yield await _overlay(zygote)
            finally:
                zygote.close()
                nursery.cancel_scope.cancel()
    finally:
        tree.close()
        os.close(read)
        os.close(write)


async def _clone(zygote: Zygote, tree: Tree, use_clone3: bool) -> Finding:
    maps = ((False, 0, _ID_BASE, ID_RANGE), (True, 0, _ID_BASE, ID_RANGE))
    begun = monotonic()
    slot = await build_slot(zygote, tree, "doctor", f"{use_clone3:d}", tree.plan(NO_LIMITS), maps, use_clone3=use_clone3)
    took = (monotonic() - begun) * 1e3
    direct, told = slot.used_clone3, slot.listener >= 0
    await slot.dispose()
    if not use_clone3:
        return Finding("fallback without clone3", "works", f"built and removed in {took:.1f} ms")
    walls = ["seven namespaces", "seccomp", *(["refused calls are told"] if told else [])]
    walls += [f"Landlock {landlock.version()}"] if landlock.version() else []
    detail = f"{', '.join(walls)}, leaf: built in {took:.1f} ms"
    if direct:
        return Finding("sandbox", "works", detail)
    return Finding("sandbox", "degraded", f"{detail}; clone3 is refused here", "let the outer seccomp profile allow clone3")


async def _idmap(zygote: Zygote) -> Finding:
    userns = await zygote.userns(((False, os.geteuid(), _ID_BASE, 1), (True, os.getegid(), _ID_BASE, 1)))
    with tempfile.TemporaryDirectory(prefix="agentrun-doctor-") as path:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(clone_mount(fd, path, "rw", userns))
        except HostError as error:
            return Finding("writable workspaces", "degraded", str(error), "keep workspaces on ext4, xfs or btrfs")
        finally:
            os.close(fd)
    return Finding("writable workspaces", "works", f"owners are mapped, tried below {tempfile.gettempdir()}")


async def _overlay(zygote: Zygote) -> Finding:
    """An overlay of two layers with mapped owners, where images are."""
    feature, where = "images", default_root()
    while not where.exists():
        where = where.parent
    userns = await zygote.userns(Owners(_ID_BASE, 0, 0).maps())
    with tempfile.TemporaryDirectory(prefix="agentrun-doctor-", dir=where) as path:
        layers = [Path(path, name) for name in ("lower", "upper")]
        mounts: list[int] = []
        for layer in layers:
            layer.mkdir()
        try:
            mounts += clone_layers(layers, userns)
            mounts.append(mount_overlay(mounts))
        except OSError as error:
            fix = "Linux 5.19, and a store on ext4, xfs or btrfs (AGENTRUN_IMAGES)"
            return Finding(feature, "degraded", f"owners are not mapped, {error.filename}: {error.strerror}; no sessions", fix)
        finally:
            for fd in mounts:
                os.close(fd)
    detail = f"layers are shared, their owners mapped, tried below {where}"
    return Finding(feature, "works", detail + ("; attached for a moment (before Linux 6.15)" if wants_attached() else ""))


def _landlock() -> Finding:
    abi = landlock.version()
    if abi >= 3:
        return Finding("Landlock", "works", f"version {abi}")
    fix = "a kernel with Landlock, and no lsm= on its command line that leaves it out"
    if abi:
        return Finding("Landlock", "degraded", f"version {abi} does not hold truncate(2)", "Linux 6.2")
    return Finding("Landlock", "missing", "the first wall, mounts and ids, stands alone", fix)


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= 4096:
        return Finding("descriptors", "works", f"soft {soft}, hard {hard}; a warm sandbox takes six or seven")
    return Finding("descriptors", "degraded", f"hard limit {hard}", "raise LimitNOFILE")


def _daemon(path: str) -> Finding:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            fix = "systemctl start agentrun, or `agentrun daemon &`"
            if "AGENTRUN_SOCKET" in os.environ:
                return Finding("daemon", "missing", f"{path} ($AGENTRUN_SOCKET): {error.strerror}", f"{fix}, or exec --no-daemon")
            return Finding("daemon", "degraded", f"{path}: {error.strerror}; each exec starts a private runtime (slow)", fix)
    return Finding("daemon", "works", path)


async def _memory() -> list[Finding]:
    """Start a probes process of our own, and see in which way calls would be held to their memory."""
    try:
        tree = Tree(find_base(), f"doctor-{os.getpid()}")
    except HostError as error:
        return [Finding("memory control", "missing", str(error))]
    memory = Control(tree, None, probes=True, sched=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.run)
            await memory.wait_ready(everything=True)
            status = memory.status()
            nursery.cancel_scope.cancel()
    finally:
        memory.close()
        tree.close()
    refused = "; ".join(f"{hook}: {why}" for hook, why in status.refused.items())
    if status.hook:
        detail = f"{status.hook}, attached in {status.seconds:.2f} s; the probes process takes {status.memory >> 20} MB"
        found = [Finding("programs in the kernel", "works", f"{detail} ({refused})" if refused else detail)]
    else:
        fix = "apt-get install python3-bpfcc; a kernel with BPF, BTF and tracepoints"
        found = [Finding("programs in the kernel", "missing", refused or "the probes process did not answer", fix)]
    sched = status.sched
    if sched is not None:
        state: Literal["works", "degraded"] = "works" if sched.on else "degraded"
        detail = "sched_ext takes the scheduler for short calls (sched = true)" if sched.on else sched.reason or "not attached"
        found.append(Finding("short calls first", state, detail, "a kernel with sched_ext; cpu.weight holds without it"))
    return [*found, Finding("memory control", _HOLDS[status.mode], f"mode {status.mode}: {MEANS[Mode(status.mode)]}")]


_HOLDS: dict[str, Literal["works", "degraded", "missing"]] = {
    Mode.CONTROLLER_BPF: "works", Mode.BPF: "works", Mode.CONTROLLER: "degraded", Mode.NONE: "missing",
}  # fmt: skip
MEANS = {
    Mode.CONTROLLER_BPF: "memory.max and memory.high hold, programs in the kernel detect and strike",
    Mode.BPF: "there is no memory controller; programs in the kernel count each page of a call, and strike",
    Mode.CONTROLLER: "memory.max and memory.high hold; bursts are noticed by the kernel's events, later than by programs in it",
    Mode.NONE: "nothing holds calls to their memory; what requires a limit is refused",
}
