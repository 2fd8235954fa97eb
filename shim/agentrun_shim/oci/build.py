"""A configuration as a container plan: the one place where the order of a container's set-up is decided."""

from __future__ import annotations

import os

from agentrun_shim.container_plan import Plan
from agentrun_shim.oci import cgroup, devices, hooks, names
from agentrun_shim.oci.config import Linux, absolute
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.log import Log
from agentrun_shim.oci.mounts import Mounts
from agentrun_shim.oci.process import Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_APPARMOR = ("/proc/self/attr/apparmor/exec", "/proc/self/attr/exec")
_SELINUX = "/proc/self/attr/exec"
_CLONE_NEWCGROUP = names.NAMESPACES["cgroup"]


class Request:
    """What the command line adds to the configuration."""

    def __init__(self, bundle: str, *, console: str | None = None, no_pivot: bool = False, no_keyring: bool = False) -> None:
        self.bundle, self.console, self.no_pivot, self.no_keyring = bundle, console, no_pivot, no_keyring


def container_plan(
    config: dict[str, Any], linux: Linux, process: Process, request: Request, *, name: str, leaf: str, privileged: bool,
    filters: tuple[bytes, int, bool] | None, log: Log, host_rules: bool,
) -> Plan:  # fmt: skip
    """Everything from the host to the program.

    ``leaf`` is the container's cgroup, "" without one. ``privileged``: we are the host's root, and not in a user namespace.
    ``host_rules``: device rules can be attached.

    Raises:
        OciError: something in it cannot be done.
    """
    plan = Plan()
    rootfs = absolute(config["root"]["path"], request.bundle)
    mounts = Mounts(
        config.get("mounts") or [], request.bundle, cgroup=leaf, own_cgroup_namespace="cgroup" in linux.new, maps=linux.maps,
        mount_label=_mount_label(linux, log),
    )  # fmt: skip
    wants_state = bool(filters and filters[2]) or bool(config.get("hooks"))
    if process.terminal and not request.console:
        raise OciError("process.terminal: a --console-socket is needed for the terminal")
    if not process.terminal and request.console:
        raise OciError("--console-socket, but process.terminal is false")

    # The helper, with the host's paths and privileges.
    if leaf:
        plan.add("LEAF", f"{leaf}/{cgroup.INIT}", about=f"the cgroup {leaf}")
        rules = devices.compile_rules((linux.config.get("resources") or {}).get("devices") or []) if host_rules else b""
        if rules:
            plan.add("PROGRAM", leaf, a=len(rules) // 8, blob=rules, about="linux.resources.devices")
    slot = plan.slot()

    def trees() -> None:
        plan.add("TREE", rootfs, a=slot, b=1, about=f"root.path {rootfs}")
        plan.add("ATTR", a=slot, d=names.MS_SLAVE | 1, about=f"root.path {rootfs}")
        mounts.helper(plan)

    # Who is no root anywhere can clone mounts only inside, where it is.
    capable = os.geteuid() == 0
    if capable:
        trees()
    if request.console:
        plan.add("CONSOLE", request.console, about=f"--console-socket {request.console}")
    if filters and filters[2]:
        plan.add("AGENT", linux.config["seccomp"]["listenerPath"], about="linux.seccomp.listenerPath")
    plan.add("LISTEN", "start", about="the start socket")
    _oom(plan, process, privileged=privileged, log=log)
    for kind, path in linux.joined:
        plan.add("JOIN", path, a=names.NAMESPACES[kind], about=f"linux.namespaces: {kind} at {path}")
    if "time" in linux.new:
        plan.add("UNSHARE", a=names.NAMESPACES["time"], about="linux.namespaces: time")
        if offsets := linux.time_offsets():
            plan.add("WRITE", "/proc/self/timens_offsets", offsets, about="linux.timeOffsets")
    plan.add("CLONE", a=linux.clone_flags(), about="linux.namespaces")

    # The container's process, still outside of its root.
    plan.add("UMASK", a=0o22)  # of what is made for it, whoever called
    if "user" in linux.new:
        plan.add("WAIT", a=ord("m"), about="linux.uidMappings")
    if not capable:
        trees()
    outside, inside = linux.propagation()
    plan.add("ROOT", rootfs, a=slot, b=outside, about=f"root.path {rootfs}")
    if linux.in_user_namespace:
        plan.add("MASTER", about="user 0 of the user namespace")
    if "cgroup" in linux.new:
        plan.add("UNSHARE", a=_CLONE_NEWCGROUP, about="linux.namespaces: cgroup")
    if config.get("hostname"):
        plan.add("HOSTNAME", config["hostname"], about=f"hostname {config['hostname']}")
    if config.get("domainname"):
        plan.add("DOMAIN", config["domainname"], about=f"domainname {config['domainname']}")
    if "network" in linux.new:
        plan.add("LOOPBACK", about="the loopback interface")
    mounts.inside(plan)
    _devices(plan, linux, mounts)
    for path, value in linux.sysctls():
        plan.add("WRITE", path, value, about=f"linux.sysctl {path[10:]}")
    for path in linux.config.get("readonlyPaths") or ():
        plan.add("FROZEN", path, about=f"linux.readonlyPaths {path}")
    for path in linux.config.get("maskedPaths") or ():
        plan.add("MASKED", path, about=f"linux.maskedPaths {path}")
    if not request.no_keyring:
        plan.add("KEYRING", f"_ses.{name}", about="the session keyring")
    plan.add("SESSION")
    if process.terminal:
        plan.add("TTY", a=process.uid, b=process.rows, c=process.columns, d=1, about="process.terminal")
    label = open_label(plan, process)
    if wants_state:
        plan.add("STATE")
    hooks.add(plan, config, "createContainer")
    plan.add("PIVOT", a=int(request.no_pivot), b=inside, about="pivot_root")

    # Inside. A working directory that the image lacks is made while that can be.
    process.enter(plan, make=True)
    if config["root"].get("readonly"):
        plan.add("ROOT_ATTR", a=names.RDONLY, about="root.readonly")
    process.find(plan)
    process.placement(plan)
    _memory_policy(plan, linux)
    if personality := linux.config.get("personality"):
        domain = names.PERSONALITIES.get(personality.get("domain", ""))
        if domain is None or personality.get("flags"):
            raise OciError(f"linux.personality: {personality!r}: the domains are LINUX and LINUX32, there are no flags")
        plan.add("PERSONALITY", a=domain, about="linux.personality")
    plan.add("PARK")
    process.rights(plan, filters, label=label, hooks=lambda plan: hooks.add(plan, config, "startContainer"))
    return plan


def _devices(plan: Plan, linux: Linux, mounts: Mounts) -> None:
    if mounts.is_bound("/dev"):
        return
    for name, major, minor in devices.NODES:
        plan.add("NODE", f"/dev/{name}", a=0o020666, b=devices.number(major, minor), about=f"/dev/{name}")
    for device in linux.config.get("devices") or ():
        path, mode, number, uid, gid = devices.node(device)
        plan.add("NODE", path, a=mode, b=number, c=uid, d=gid, about=f"linux.devices {path}")
    for target, path in devices.LINKS:
        plan.add("LINK", target, path, about=path)


def _oom(plan: Plan, process: Process, *, privileged: bool, log: Log) -> None:
    """In the helper: only the host's root may lower it. Others keep what they have."""
    score = process.oom_score_adj
    if score is None:
        return
    if not privileged:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            own = int(file.read())
        if score < own:
            log.write("debug", f"process.oomScoreAdj {score}: only the host's root may go below {own}")
            return
    plan.add("WRITE", "/proc/self/oom_score_adj", str(score), about="process.oomScoreAdj")


def open_label(plan: Plan, process: Process) -> int | None:
    """Open the file a label is written to at the very end; returns its slot, or None without a label.

    Raises:
        OciError: AppArmor or SELinux is asked for, and not there.
    """
    if process.apparmor and process.apparmor != "unconfined":
        if not os.path.isdir("/sys/kernel/security/apparmor") and not os.path.exists("/sys/module/apparmor/parameters/enabled"):
            raise OciError(f"process.apparmorProfile {process.apparmor}: this kernel has no AppArmor")
        path = _APPARMOR[0] if os.path.exists(_APPARMOR[0]) else _APPARMOR[1]
    elif process.selinux:
        if not os.path.exists("/sys/fs/selinux/enforce"):
            raise OciError(f"process.selinuxLabel {process.selinux}: this kernel has no SELinux")
        path = _SELINUX
    else:
        return None
    slot = plan.slot()
    plan.add("OPEN", path, a=slot, b=os.O_WRONLY, about="the label's file")
    return slot


def _mount_label(linux: Linux, log: Log) -> str:
    label = linux.config.get("mountLabel") or ""
    if label and not os.path.exists("/sys/fs/selinux/enforce"):
        log.write("warning", f"linux.mountLabel {label}: this kernel has no SELinux")
        return ""
    return str(label)


def _memory_policy(plan: Plan, linux: Linux) -> None:
    policy = linux.config.get("memoryPolicy")
    if not policy:
        return
    from agentrun_shim.oci.process import cpu_mask

    mode = names.MEMORY_MODES.get(policy.get("mode", ""))
    unknown = [flag for flag in policy.get("flags") or () if flag not in names.MEMORY_FLAGS]
    if mode is None or unknown:
        raise OciError(f"linux.memoryPolicy: unknown {unknown[0] if unknown else policy.get('mode')!r}")
    for flag in policy.get("flags") or ():
        mode |= names.MEMORY_FLAGS[flag]
    nodes = cpu_mask(policy["nodes"]) if policy.get("nodes") else b""
    plan.add("MEMPOLICY", a=mode, b=len(nodes), blob=nodes, about="linux.memoryPolicy")
