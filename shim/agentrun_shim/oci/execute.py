"""exec: one more program in a container, in a leaf of its own below the container's cgroup.

A leaf of its own means: what it uses is counted by itself (`events` shows it), and it can be found and ended as a whole, with all
that it started. Leaves whose processes have ended are added up and removed by the next exec, by `events`, or with the container.
"""

from __future__ import annotations

import os

from agentrun_shim import container_plan as cp
from agentrun_shim.container_plan import Plan
from agentrun_shim.oci import cgroup, leaves, names, state
from agentrun_shim.oci.build import open_label
from agentrun_shim.oci.config import Linux
from agentrun_shim.oci.context import Context
from agentrun_shim.oci.create import agent_state, pid_out, preserved
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.jsontext import loads
from agentrun_shim.oci.launch import Launch
from agentrun_shim.oci.options import Options
from agentrun_shim.oci.process import Process, set_rlimits
from agentrun_shim.oci.shape import PROCESS, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KINDS = (
    ("user", "user"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("network", "net"),
    ("cgroup", "cgroup"),
    ("time", "time"),
    ("mount", "mnt"),
)


def execute(context: Context, options: Options) -> int:
    """Run a program in a container; returns its exit status, 0 if it is detached.

    Raises:
        OciError: it could not be started.
    """
    if not options.operands:
        raise OciError("exec: a container id is needed")
    keep, listen_env = preserved(options.number("preserve-fds"))
    pid_file = options.get("pid-file")
    pid_file = os.path.abspath(pid_file) if pid_file else None
    console = options.get("console-socket")
    container = state.Container(context.root, options.operands[0])
    container.must_run("created", "running", "paused")
    if container.status() == "paused" and "ignore-paused" not in options:
        raise OciError(f"container {container.name} is paused: exec would wait until it is resumed (--ignore-paused does that)")
    config = container.config()
    linux = Linux(config)
    process = Process(_process(options, config), extra_env=listen_env)
    relay = None
    if process.terminal and not console:
        if "detach" in options:
            raise OciError("exec: a terminal needs a --console-socket, or this process to stay")
        from agentrun_shim.oci.relay import Relay

        relay = Relay(context.root)
        console = relay.path
        process.rows, process.columns = relay.size()
    filters = _filters(container, linux)
    container.lock()  # nobody removes our leaf while nothing is in it yet
    leaf = _leaf(container, linux, options)
    launch = None
    try:
        plan = _plan(container, config, process, filters, leaf=leaf, console=console, context=context, linux=linux)
        launch = Launch(plan, process.args[0], keep)
        pid = launch.born()
        if not container.alive():  # or the namespaces joined may have been somebody else's
            raise OciError(f"container {container.name}: container not running")
        container.unlock()  # the leaf has somebody in it; what comes now may take as long as it likes
        set_rlimits(pid, process)
        launch.send(b"m")
        if "STATE" in plan.names:
            launch.expect(cp.READY)
            launch.send_state(agent_state(config, container.state(container.status(), container.pid), pid))
        launch.expect(cp.STARTED)
        if relay is not None:
            relay.receive()
        if (event := launch.next()) is not None:
            raise OciError(launch.explain(event[2], event[3]))
        pid_out(pid, pid_file, options.get("pidfd-socket"))
        launch.close()
    except BaseException:
        if launch is not None:
            launch.kill()
        leaves.remove(leaf)
        if relay is not None:
            relay.close()
        raise
    container.close()
    if "detach" in options:
        return 0
    from agentrun_shim.oci.foreground import wait_for

    code = wait_for(pid, relay)
    leaves.settle(context.root, options.operands[0])
    return code


def _process(options: Options, config: dict[str, Any]) -> dict[str, Any]:
    """The process object: a file's, or the container's own with what the command line says."""
    path = options.get("process")
    if path:
        with open(path, "rb") as file:
            given: dict[str, Any] = loads(file.read(), path)
        if not isinstance(given, dict):
            raise OciError(f"{path}: not an object")
        check(given, PROCESS, "process")
    else:
        if len(options.operands) < 2:
            raise OciError("exec: a program is needed, or --process")
        given = {**config["process"], "args": options.operands[1:], "terminal": False}
        given.pop("consoleSize", None)
    if "tty" in options:
        given["terminal"] = True
    if cwd := options.get("cwd"):
        given["cwd"] = cwd
    given["env"] = [*(given.get("env") or ()), *options.many.get("env", ())]
    if user := options.get("user"):
        uid, _, gid = user.partition(":")
        try:
            given["user"] = {**(given.get("user") or {}), "uid": int(uid), **({"gid": int(gid)} if gid else {})}
        except ValueError:
            raise OciError(f"exec: --user {user}: numbers are needed, uid[:gid]") from None
    if groups := options.many.get("additional-gids"):
        try:
            given["user"] = {**(given.get("user") or {}), "additionalGids": [int(group) for group in groups]}
        except ValueError:
            raise OciError(f"exec: --additional-gids {' '.join(groups)}: numbers are needed") from None
    if "no-new-privs" in options:
        given["noNewPrivileges"] = True
    for flag, key in (("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")):
        if value := options.get(flag):
            given[key] = value
    if caps := options.many.get("cap"):
        sets = given.get("capabilities") or {}
        given["capabilities"] = {
            name: sorted({*(sets.get(name) or ()), *caps})
            for name in ("bounding", "effective", "permitted", "inheritable", "ambient")
        }
    return given


def _filters(container: state.Container, linux: Linux) -> tuple[bytes, int, bool] | None:
    if not linux.config.get("seccomp"):
        return None
    data = container.read("filter")
    flags = int.from_bytes(data[:4], "little")
    return data[4:], flags, bool(flags & 8)


def _leaf(container: state.Container, linux: Linux, options: Options) -> str:
    """A cgroup for it, made here; "" where the container has none."""
    top = container.record.get("cgroup", "")
    if not top:
        return ""
    if wanted := options.get("cgroup"):
        below = f"{top}/{wanted.rsplit(':', 1)[-1].strip('/')}".rstrip("/")
        if ".." in wanted.split("/") or not os.path.isdir(below):
            raise OciError(f"exec: --cgroup {wanted}: no such cgroup below the container's")
        return below
    if not linux.exec_leaf:
        return f"{top}/{cgroup.INIT}"
    leaves.sweep(container)
    return leaves.make(top)


def _plan(
    container: state.Container, config: dict[str, Any], process: Process, filters: tuple[bytes, int, bool] | None, *, leaf: str,
    console: str | None, context: Context, linux: Linux,
) -> Plan:  # fmt: skip
    plan, pid = Plan(), container.pid
    if leaf:
        plan.add("LEAF", leaf, about=f"the cgroup {leaf}")
    if console:
        plan.add("CONSOLE", os.path.abspath(console), about=f"--console-socket {console}")
    if filters and filters[2]:
        plan.add("AGENT", linux.config["seccomp"]["listenerPath"], about="linux.seccomp.listenerPath")
    score = process.oom_score_adj if process.oom_score_adj is not None else config["process"].get("oomScoreAdj")
    if score is not None and not context.rootless:
        plan.add("WRITE", "/proc/self/oom_score_adj", str(score), about="process.oomScoreAdj")
    other = [(kind, file) for kind, file in _KINDS if _differs(pid, file)]
    # Unprivileged callers may join the others only once they are in the user namespace: all that before the clone.
    first = context.rootless and ("user", "user") in other
    joins = [("JOIN", f"/proc/{pid}/ns/{file}", names.NAMESPACES[kind], kind) for kind, file in other]
    if first:
        plan.add("JOIN", f"/proc/{pid}/ns/user", a=names.NAMESPACES["user"], about="the container's user namespace")
        joins = [join for join in joins if join[3] != "user"]
    if _differs(pid, "pid"):
        plan.add("JOIN", f"/proc/{pid}/ns/pid", a=names.NAMESPACES["pid"], about="the container's pid namespace")
    plan.add("CLONE", about="clone")
    plan.add("WAIT", a=ord("m"))
    label = open_label(plan, process)
    for name, path, flag, kind in joins:
        plan.add(name, path, a=flag, about=f"the container's {kind} namespace")
    if linux.in_user_namespace:
        plan.add("MASTER", about="user 0 of the user namespace")
    plan.add("KEYRING", f"_ses.{container.name}", about="the session keyring")
    plan.add("SESSION")
    if process.terminal:
        plan.add("TTY", a=process.uid, b=process.rows, c=process.columns, about="process.terminal")
    if filters and filters[2]:
        plan.add("STATE")
    process.enter(plan, make=False)
    process.find(plan)
    process.placement(plan)
    process.rights(plan, filters, label=label)
    return plan


def _differs(pid: int, kind: str) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
    except FileNotFoundError:
        return False  # no such namespaces in this kernel, or the container has just ended
