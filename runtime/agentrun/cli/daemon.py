"""``agentrun daemon``, and the private runtime of a single ``agentrun exec``."""

from __future__ import annotations

import argparse
import contextlib
import grp
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from agentrun import notify
from agentrun.cgroup.tree import check_name
from agentrun.config import DaemonConfig, executor_config, load_config
from agentrun.daemon import Daemon
from agentrun.errors import AgentrunError, UsageError
from agentrun.executor import Executor
from agentrun.executorconfig import ExecutorConfig
from agentrun.metrics import open_metrics, serve_metrics
from agentrun.nursery import open_plain_nursery
from agentrun.opening import open_executor
from agentrun.protocol import error_frame
from agentrun.unixsocket import open_listener

NICE = -10
_log = logging.getLogger("agentrun")


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun daemon``."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of /etc/agentrun/config.toml")
    parser.add_argument("--socket", metavar="PATH", help="instead of the configuration's")
    parser.add_argument("--group", metavar="NAME", help="whose members may connect (mode 0660); else only root may")
    parser.add_argument("--name", default="daemon", help="of its cgroup, agentrun-NAME (default: daemon)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    passed = [socket.socket(fileno=fd) for fd, _ in notify.listen_fds()]
    try:
        config = load_config(args.config)
        if args.socket:
            config = msgspec.structs.replace(config, socket=args.socket)
        if args.group:
            config = msgspec.structs.replace(config, group=args.group)
        check_name(args.name)
        _raise_descriptor_limit()
        _raise_priority()
        trio.run(_serve, config, args.name, passed)
    except Exception:
        _turn_away(passed)
        raise
    return 0


def _turn_away(passed: list[socket.socket]) -> None:
    """Tell those who wait at the sockets of a service manager that there is no daemon.

    They would wait for ever, and make the manager start us again and again. What is wrong is in the log and not for them: it
    may be about somebody else's policies.
    """
    refusal = error_frame(125, "the daemon could not be started; its log says why")
    for listener in passed:
        listener.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.send(refusal, socket.MSG_DONTWAIT)


async def _serve(config: DaemonConfig, name: str, passed: list[socket.socket]) -> None:
    if passed:
        listeners = [trio.socket.from_stdlib_socket(listener) for listener in passed]
    else:
        listeners = [open_listener(config.socket, _group_id(config.group))]
    try:
        with _metrics_listener(config) as scraped:
            await _run(config, name, listeners, scraped)
    finally:
        if not passed:
            listeners[0].close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config.socket)


async def _run(
    config: DaemonConfig, name: str, listeners: list[trio.socket.SocketType], scraped: trio.socket.SocketType | None
) -> None:
    async with open_executor(executor_config(config, name)) as executor, open_plain_nursery() as nursery:
        daemon = Daemon(executor, config)
        # A policy that does not load stops the daemon here, where somebody looks, and not a call in the night.
        executor.policies.reload()
        # Or the first calls would not be held to limits that only the programs can enforce, and be refused.
        await executor.memory.wait_ready()
        await executor.warm_up("default", count=config.pool_least)
        nursery.start_soon(daemon.serve, listeners)
        if scraped is not None:
            nursery.start_soon(serve_metrics, scraped, executor)
        notify.notify(f"READY=1\nSTATUS=serving on {config.socket}")
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                _reload(executor, config)
        with contextlib.suppress(OSError):  # whoever wanted to know may be gone
            notify.notify("STOPPING=1")
        await daemon.finish()
        nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _metrics_listener(config: DaemonConfig) -> Iterator[trio.socket.SocketType | None]:
    """Where Prometheus comes, if it is to; the file of a unix socket goes with it."""
    if config.metrics is None:
        yield None
        return
    local = config.metrics.startswith("/")
    listener = open_listener(config.metrics, _group_id(config.group)) if local else open_metrics(config.metrics)
    try:
        yield listener
    finally:
        listener.close()
        if local:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config.metrics)


def _reload(executor: Executor, config: DaemonConfig) -> None:
    """Read the policies anew, all or none: calls that are made from now on have the new ones, those that run keep theirs."""
    with contextlib.suppress(OSError):
        notify.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        status = f"{executor.policies.reload()} policies reloaded"
        _log.warning("%s", status)
    except AgentrunError as error:
        status = f"reload refused, the old policies stay: {error}"
        _log.error("%s", status)
    with contextlib.suppress(OSError):
        notify.notify(f"READY=1\nSTATUS=serving on {config.socket}; {status}")


def serve_one(fd: int) -> int:
    """Serve the one connection ``fd`` with an executor of its own: what `agentrun exec` does where no daemon is."""
    trio.run(_serve_one, fd)
    return 0


async def _serve_one(fd: int) -> None:
    sock = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
    try:
        async with open_executor(ExecutorConfig(pool_least=0, pool_most=0)) as executor:
            await Daemon(executor, DaemonConfig(), private=True).handle(sock)
    except AgentrunError as error:
        with contextlib.suppress(OSError):
            await sock.send(error_frame(error.exit_code, str(error)))
    finally:
        sock.close()


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"group: there is no group {name!r}") from None


def _raise_priority() -> None:
    """Before the tools it runs, which get level 0 again: what the systemd unit does too. A latency, not a right: no error."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, min(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def _raise_descriptor_limit() -> None:
    """Every warm sandbox takes six or seven descriptors; select(2) is not used here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
