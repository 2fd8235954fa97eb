"""create and run: from a bundle to a process that waits for `start`, with everything noted that its removal needs.

The record is written before what it names is made, so that `delete --force` can remove whatever a killed `create` left. The
process itself ends when its creator does, until it has been told that all is written.
"""

from __future__ import annotations

import os
import time

from agentrun_shim import container_plan as cp
from agentrun_shim.oci import cgroup, hooks, later, resources, seccomp, state
from agentrun_shim.oci.build import Request, container_plan
from agentrun_shim.oci.config import Linux, absolute, load
from agentrun_shim.oci.context import Context
from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.jsontext import dumps
from agentrun_shim.oci.launch import Launch, native, serve_maps
from agentrun_shim.oci.options import Options
from agentrun_shim.oci.process import Process, set_rlimits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agentrun_shim.oci.relay import Relay


def create(context: Context, options: Options, name: str, *, relays: list[Relay] | None = None) -> int:
    """Make a container; returns the pid of its first process, which is a child of ours.

    With ``relays``, a terminal that no engine asks for is relayed by us: it is put there.

    Raises:
        OciError: it could not be made, and nothing of it is left.
    """
    bundle = os.path.abspath(options.get("bundle") or ".")
    config = load(absolute(options.get("config") or "config.json", bundle))
    console = options.get("console-socket")
    pid_file = options.get("pid-file")
    pid_file = os.path.abspath(pid_file) if pid_file else None
    pidfd_socket = options.get("pidfd-socket")
    pidfd_socket = os.path.abspath(pidfd_socket) if pidfd_socket else None
    keep, listen_env = preserved(options.number("preserve-fds"))
    for stage in hooks.STAGES:
        hooks.of(config, stage)
    linux = Linux(config)
    notify = os.environ.get("NOTIFY_SOCKET", "")
    if notify:
        listen_env = [*listen_env, f"NOTIFY_SOCKET={later.INSIDE}/{later.NAME}"]
    process = Process(config["process"], extra_env=listen_env)
    if process.terminal and not console and relays is not None:
        from agentrun_shim.oci.relay import Relay

        relays.append(Relay(context.root))
        console = relays[0].path
        process.rows, process.columns = relays[0].size()
    filters = seccomp.compile_filter(linux.config["seccomp"], context.root, context.log) if linux.config.get("seccomp") else None
    leaf = ""
    files = resources.to_files(linux.config.get("resources") or {})
    path = linux.config.get("cgroupsPath") or ""
    scoped = context.manager == "systemd" and (path.count(":") == 2 or not path)
    if context.manager != "disabled" and not scoped:
        leaf = cgroup.place(path, name, rootless=context.rootless)
        if context.rootless and not cgroup.is_ours(leaf):
            if files:
                raise OciError(f"{leaf}: no cgroup was delegated to this user, so linux.resources cannot be enforced")
            context.log.write("debug", f"{leaf}: no cgroup was delegated to this user: the container has none of its own")
            leaf = ""
    request = Request(
        bundle, console=os.path.abspath(console) if console else None, no_pivot="no-pivot" in options,
        no_keyring="no-new-keyring" in options,
    )  # fmt: skip

    container = state.Container(context.root, name, new=True)
    launch = scope = None
    try:
        if leaf:
            cgroup.must_be_free(leaf)
        if scoped:
            from agentrun_shim.oci import systemd

            slice_, unit = systemd.scope_name(path, name)
            container.save(scope=unit)
            scope = systemd.Scope(slice_, unit, files, rootless=context.rootless, description=f"agentrun-oci container {name}")
            leaf = scope.path
        if notify:
            os.mkdir(f"{container.path}/{later.DIRECTORY}", 0o755)
            container.record["notify"] = notify
            bound = {
                "destination": later.INSIDE,
                "type": "bind",
                "source": f"{container.path}/{later.DIRECTORY}",
                "options": ["bind", "ro", "nosuid", "nodev", "noexec"],  # to a socket one may write all the same
            }
            config["mounts"] = [*(config.get("mounts") or ()), bound]
        plan = container_plan(
            config, linux, process, request, name=name, leaf=leaf, privileged=not context.rootless, filters=filters,
            log=context.log, host_rules=not context.rootless,
        )  # fmt: skip
        _note(container, config, bundle, leaf, process, filters)
        container.write("about", "\n".join([text.replace("\n", " ") for text in plan.about]).encode("utf-8", "surrogateescape"))
        if leaf:
            if scope is None:
                cgroup.make(f"{leaf}/{cgroup.INIT}")
            cgroup.apply(leaf, files, best_effort=linux.best_effort, log=context.log)
        os.chdir(container.path)
        launch = Launch(plan, process.args[0], keep)
        pid = launch.born()
        if scope is not None:
            scope.release()
        if "user" in linux.new:
            from agentrun_shim.oci.userns import write_maps

            serve_maps(launch, lambda pid: write_maps(pid, linux.users, linux.groups))
        if "STATE" in plan.names:
            launch.expect(cp.READY)
            told = container.state("created", pid)
            hooks.run(config, "prestart", told)
            hooks.run(config, "createRuntime", told)
            launch.send_state(agent_state(config, told, pid) if filters and filters[2] else told)
        launch.expect(cp.PARKED)
        set_rlimits(pid, process)
        pid_out(pid, pid_file, pidfd_socket)
        container.save(pid=pid, started=state.start_time(pid))
        launch.send(b"c")
        launch.close()
    except BaseException:
        if launch is not None:
            launch.kill()
        if scope is not None:
            scope.release()
        _undo(context, container)
        raise
    container.close()
    return pid


def _note(
    container: state.Container, config: dict[str, Any], bundle: str, leaf: str, process: Process,
    filters: tuple[bytes, int, bool] | None,
) -> None:  # fmt: skip
    """Everything that others need to know of it, before any of it is there."""
    now = time.time()
    head = {
        "ociVersion": config["ociVersion"], "id": container.name, "bundle": bundle,
        "rootfs": absolute(config["root"]["path"], bundle),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09d}Z", "owner": "",
        "annotations": config.get("annotations") or {},
    }  # fmt: skip
    container.write("head", dumps(head)[:-1].encode())
    container.write("config.json", dumps(config).encode())
    if filters:
        container.write("filter", filters[1].to_bytes(4, "little") + filters[0])
    if leaf:
        container.record["cgroup"] = leaf
        if "scope" not in container.record:
            container.record["made"] = cgroup.first_missing(leaf)
    for stage in ("poststart", "poststop"):
        if hooks.of(config, stage):
            container.record[stage] = ""
    container.save(exec=process.args[0].replace("\n", " "))


def agent_state(config: dict[str, Any], told: str, pid: int) -> str:
    """ContainerProcessState, config-linux.md "seccomp": what an agent is told about the listener it gets."""
    version, metadata = dumps(config["ociVersion"]), dumps(config["linux"]["seccomp"].get("listenerMetadata") or "")
    return f'{{"ociVersion":{version},"fds":["seccompFd"],"pid":{pid},"metadata":{metadata},"state":{told}}}'


def _undo(context: Context, container: state.Container) -> None:
    """Remove what there is of it: `delete --force` knows how. Its words are not the reason, so they are not said."""
    container.close()
    os.chdir("/")
    native(["--root", context.root, "delete", "--force", container.name])


def pid_out(pid: int, path: str | None, pidfd_socket: str | None) -> None:
    """--pid-file, whole or not at all, and --pidfd-socket."""
    if path:
        scratch = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{os.getpid()}"
        try:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.write(fd, str(pid).encode())
            os.close(fd)
            os.rename(scratch, path)
        except OSError as error:
            raise OciError(f"--pid-file {path}: {strerror(error)}") from None
    if pidfd_socket:
        import socket

        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.connect(pidfd_socket)
                pidfd = os.pidfd_open(pid)
                socket.send_fds(peer, [b"pidfd"], [pidfd])
                os.close(pidfd)
            except OSError as error:
                raise OciError(f"--pidfd-socket {pidfd_socket}: {strerror(error)}") from None


def preserved(count: int) -> tuple[int, list[str]]:
    """How many descriptors from 3 on are the program's, and what it is told about those of socket activation.

    Raises:
        OciError: one of them is not open.
    """
    env: list[str] = []
    try:
        listening = int(os.environ.get("LISTEN_FDS", "0") or 0)
    except ValueError:
        listening = 0
    if listening > 0:
        count += listening
        env = [f"LISTEN_FDS={listening}", "LISTEN_PID=1"]
        if names := os.environ.get("LISTEN_FDNAMES"):
            env.append(f"LISTEN_FDNAMES={names}")
    for fd in range(3, 3 + count):
        try:
            os.set_inheritable(fd, True)
        except OSError as error:
            raise OciError(f"--preserve-fds: descriptor {fd}: {strerror(error)}") from None
    return count, env


def run(context: Context, options: Options, name: str) -> int:
    """create, start and, unless detached, wait and delete; returns the program's exit status."""
    relays: list[Relay] = []
    try:
        pid = create(context, options, name, relays=None if "detach" in options else relays)
        if relays:
            relays[0].receive()
    finally:
        for relay in relays:
            relay.close()
    front = context.front()
    started = native([*front, "start", name])
    if started:
        native([*front, "delete", "--force", name])
        return 1
    if "detach" in options:
        return 0
    from agentrun_shim.oci.foreground import wait_for

    code = wait_for(pid, relays[0] if relays else None)
    if "keep" not in options:
        native([*front, "delete", "--force", name])
    return code
