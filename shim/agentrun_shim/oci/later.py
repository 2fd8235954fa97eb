"""What the native verbs leave to Python, where a configuration asks for it: hooks after start and stop, readiness messages."""

from __future__ import annotations

import os
import select

from agentrun_shim.oci import hooks
from agentrun_shim.oci.context import Context
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.launch import native
from agentrun_shim.oci.options import Options
from agentrun_shim.oci.state import Container

DIRECTORY, NAME, INSIDE = "notify", "notify.sock", "/run/notify"
"""Of the container's directory, of the socket in it, and where the container sees it."""
_SOCKET = f"{DIRECTORY}/{NAME}"


def poststart(context: Context, options: Options) -> int:
    """The program runs; if a hook fails, the container is stopped and removed (specification 1.3)."""
    container = Container(context.root, options.operands[0])
    try:
        hooks.run(container.config(), "poststart", container.state("running", container.pid))
    except OciError:
        container.close()
        native(["--root", context.root, "delete", "--force", container.name])
        raise
    return 0


def poststop(context: Context, options: Options) -> int:
    """The container is gone but for its directory: its last hooks, whatever becomes of them, then that as well."""
    container = Container(context.root, options.operands[0])
    try:
        config = container.config()
    except OciError:
        config = {}
    if config and "poststop" in container.record:
        hooks.run_all(config, "poststop", container.state("stopped", 0), context.log)
    if unit := container.record.get("scope"):
        from agentrun_shim.oci.systemd import Manager

        try:
            Manager(rootless=context.rootless).stop(unit)
        except OciError as error:
            context.log.warning(str(error))
    _remove(container.path)
    return 0


def _remove(path: str) -> None:
    """A directory and what is in it; the record last."""
    for directory, below, files in os.walk(path, topdown=False):
        for name in sorted(files, key=lambda name: name == "record"):
            os.unlink(f"{directory}/{name}")
        for name in below:
            entry = f"{directory}/{name}"
            (os.unlink if os.path.islink(entry) else os.rmdir)(entry)
    os.rmdir(path)


def start(context: Context, options: Options) -> int:
    """Start a container that says when it is ready, and pass that on: systemd's sd_notify(3), to the socket we were given."""
    container = Container(context.root, options.operands[0])
    upstream = container.record.get("notify", "")
    import socket

    os.chdir(container.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        try:
            os.unlink(_SOCKET)
        except FileNotFoundError:
            pass
        ours.bind(_SOCKET)
        os.chmod(_SOCKET, 0o777)
        container.save(notify=None)
        if native([*context.front(), "start", container.name]):
            return 1
        pidfd = os.pidfd_open(container.pid)
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if ours.fileno() not in ready:
                return 0  # it has ended without a word
            message = ours.recv(4096)
            if b"READY=1" in message.splitlines():
                address = "\0" + upstream[1:] if upstream.startswith("@") else upstream
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                    out.sendto(b"READY=1\nMAINPID=%d\n" % container.pid, address)
                return 0
