"""Leaves of execs: made, read, added up, removed.

What the execs of a container have used so far, those whose leaves are gone included, is kept in the file ``execs`` of its
directory: how many there were, their processor time, and the largest peak of memory.
"""

from __future__ import annotations

import os

from agentrun_shim.oci import cgroup, state
from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.jsontext import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PREFIX = "exec-"
_NONE = {"count": 0, "cpu_usec": 0, "memory_peak": 0}


def make(top: str) -> str:
    """A fresh leaf below a container's cgroup, with every controller that can be had.

    Raises:
        OciError: it could not be made.
    """
    cgroup.enable(top)
    for number in range(1000):
        path = f"{top}/{PREFIX}{os.getpid()}{f'.{number}' if number else ''}"
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            continue
        except OSError as error:
            raise OciError(f"making the cgroup {path}: {strerror(error)}") from None
        return path
    raise OciError(f"{top}: no name for a leaf is free")


def usage(path: str) -> dict[str, Any]:
    """What one leaf has used, as far as its controllers tell."""
    found: dict[str, Any] = {"id": path.rsplit("/", 1)[-1]}
    numbers = flat(path, "cpu.stat")
    if "usage_usec" in numbers:
        found["cpu_usec"] = numbers["usage_usec"]
    for key, file in (("memory", "memory.current"), ("memory_peak", "memory.peak"), ("pids", "pids.current")):
        try:
            found[key] = int(cgroup.read(path, file))
        except (OSError, ValueError):
            continue
    oom = flat(path, "memory.events").get("oom_kill")
    if oom:
        found["oom_kill"] = oom
    found["populated"] = bool(flat(path, "cgroup.events").get("populated"))
    return found


def flat(path: str, file: str) -> dict[str, int]:
    """A file of ``key number`` lines; empty where it is not there."""
    try:
        text = cgroup.read(path, file)
    except OSError:
        return {}
    return {key: int(value) for key, _, value in [line.partition(" ") for line in text.splitlines()] if value.isdigit()}


def all_of(top: str) -> list[str]:
    """The leaves below a container's cgroup."""
    try:
        return sorted([f"{top}/{name}" for name in os.listdir(top) if name.startswith(PREFIX)])
    except OSError:
        return []


def past(container: state.Container) -> dict[str, int]:
    """What execs used whose leaves are gone."""
    try:
        value: dict[str, int] = loads(container.read("execs"), "execs")
    except FileNotFoundError:
        return dict(_NONE)
    return value


def sweep(container: state.Container) -> None:
    """Add up and remove the leaves nothing runs in. The container must be locked."""
    top = container.record.get("cgroup")
    total = None
    for path in all_of(top) if top else ():
        used = usage(path)
        if used["populated"]:
            continue
        try:
            os.rmdir(path)
        except OSError:
            continue  # it has cgroups of its own below, and goes with the container
        total = total or past(container)
        total["count"] += 1
        total["cpu_usec"] += used.get("cpu_usec", 0)
        total["memory_peak"] = max(total["memory_peak"], used.get("memory_peak", 0))
    if total:
        container.write("execs", dumps(total).encode())


def settle(root: str, name: str) -> None:
    """``sweep`` after a program in the foreground has ended; its container may be gone as well."""
    try:
        container = state.Container(root, name)
    except OciError:
        return
    try:
        container.lock()
        sweep(container)
    except OSError:
        return
    finally:
        container.close()


def remove(path: str) -> None:
    """Remove the leaf of an exec that could not be started."""
    if PREFIX in path.rsplit("/", 1)[-1]:
        try:
            os.rmdir(path)
        except OSError:
            return
