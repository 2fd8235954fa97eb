"""pause, resume, update, ps, list and events: verbs about a container that is there."""

from __future__ import annotations

import os
import sys
import time

from agentrun_shim.oci import cgroup, devices, leaves, resources
from agentrun_shim.oci.config import Linux
from agentrun_shim.oci.context import Context
from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.jsontext import dumps, loads
from agentrun_shim.oci.options import Options
from agentrun_shim.oci.shape import RESOURCES, check
from agentrun_shim.oci.state import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _open(context: Context, options: Options) -> Container:
    if not options.operands:
        raise OciError(f"{options.verb}: a container id is needed")
    return Container(context.root, options.operands[0])


def _format(options: Options) -> str:
    form = options.get("format") or "table"
    if form not in ("table", "json"):
        raise OciError(f"{options.verb}: --format {form!r} is none of table, json")
    return form


def _cgroup(container: Container) -> str:
    path = container.record.get("cgroup")
    if not path:
        raise OciError(f"container {container.name} has no cgroup")
    return path


def pause_(context: Context, options: Options) -> int:
    """Freeze the container with all that is below it."""
    container = _open(context, options)
    container.lock()  # not in the middle of a start, which would wait for us
    container.must_run("running")
    cgroup.freeze(_cgroup(container), True)
    return 0


def resume_(context: Context, options: Options) -> int:
    """Thaw it."""
    container = _open(context, options)
    container.must_run("paused")
    cgroup.freeze(_cgroup(container), False)
    return 0


_FLAGS = (
    ("memory", "memory", "limit"), ("memory-reservation", "memory", "reservation"), ("memory-swap", "memory", "swap"),
    ("cpu-quota", "cpu", "quota"), ("cpu-period", "cpu", "period"), ("cpu-share", "cpu", "shares"), ("cpu-burst", "cpu", "burst"),
    ("cpu-idle", "cpu", "idle"), ("pids-limit", "pids", "limit"), ("blkio-weight", "blockIO", "weight"),
    ("cpu-rt-period", "cpu", "realtimePeriod"), ("cpu-rt-runtime", "cpu", "realtimeRuntime"),
)  # fmt: skip


_UNITS = ("k", "m", "g", "t", "kb", "mb", "gb", "tb")


def update_(context: Context, options: Options) -> int:
    """Change limits; what is not named stays as it is."""
    container = _open(context, options)
    container.must_run("running", "created", "paused")
    wanted: dict[str, Any] = {}
    source = options.get("resources")
    if source == "-":
        wanted = loads(sys.stdin.buffer.read(), "the resources on stdin")
    elif source:
        with open(source, "rb") as file:
            wanted = loads(file.read(), source)
    if not isinstance(wanted, dict):
        raise OciError("update: the resources are not an object")
    check(wanted, RESOURCES, "")
    wanted = {table: values for table, values in wanted.items() if values is not None}
    for flag, table, key in _FLAGS:
        if flag in options:
            wanted.setdefault(table, {})[key] = _bytes(options, flag) if table == "memory" else options.number(flag)
    for flag, key in (("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")):
        if flag in options:
            wanted.setdefault("cpu", {})[key] = options.get(flag)
    rules = wanted.pop("devices", None)
    files = resources.to_files(wanted)
    container.lock()
    config = container.config()
    kept = config["linux"]["resources"] = config["linux"].get("resources") or {}
    program = None if rules is None or context.rootless else _other_program(kept.get("devices") or [], rules)
    if unit := container.record.get("scope"):
        from agentrun_shim.oci import systemd

        systemd.Manager(rootless=context.rootless).set_properties(unit, systemd.limits(files))
    cgroup.apply(_cgroup(container), files, best_effort=Linux(config).best_effort, log=context.log)
    if program is not None:
        from agentrun_shim.oci.deviceprogram import replace

        replace(_cgroup(container), program)
    if rules is not None:
        kept["devices"] = rules
    for table, values in wanted.items():
        kept[table] = {**(kept.get(table) or {}), **values} if isinstance(values, dict) else values
    container.write("config.json", dumps(config).encode())
    return 0


def _bytes(options: Options, flag: str) -> int:
    """A size: bytes, or as runc takes it with a unit of 1024 (64m, 1.5g)."""
    text = (options.get(flag) or "").lower()
    number = text.rstrip("kmgtb")
    power = ("", "k", "m", "g", "t").index(text[len(number) :].removesuffix("b")) if text[len(number) :] in _UNITS else 0
    try:
        return int(float(number) * 1024**power) if power else options.number(flag)
    except ValueError:
        raise OciError(f"--{flag}: {text!r} is not a size") from None


def _other_program(before: list[dict[str, Any]], rules: list[dict[str, Any]]) -> bytes | None:
    """The program for device rules; None if those before come to the same: containerd passes all there are with every update."""
    program = devices.compile_rules(rules)
    return None if program == devices.compile_rules(before) else program


def ps_(context: Context, options: Options) -> int:
    """The processes of a container: a table, or the numbers as JSON."""
    container = _open(context, options)
    form = _format(options)
    path = container.record.get("cgroup")
    pids = cgroup.processes(path) if path else [container.pid] if container.alive() else []
    if form == "json":
        print(dumps(pids))
        return 0
    print(f"{'PID':>8} {'PPID':>8} {'UID':>6} CMD")
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1].decode()
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            print(f"{pid:>8} {parent:>8} {os.stat(f'/proc/{pid}').st_uid:>6} {command}")
        except OSError:
            continue  # it has ended meanwhile
    return 0


def list_(context: Context, options: Options) -> int:
    """All containers below the root."""
    form = _format(options)
    found = []
    try:
        entries = sorted([name for name in os.listdir(context.root) if not name.startswith(".")])
    except FileNotFoundError:
        entries = []
    for name in entries:
        try:
            container = Container(context.root, name)
            status = container.status()
            text = container.state(status, 0 if status == "stopped" else container.pid)
        except OciError:
            continue  # no container, or one whose maker died before it had written anything
        found.append(loads(text.encode(), name))
        container.close()
    if "quiet" in options:
        print("".join([f"{one['id']}\n" for one in found]), end="")
    elif form == "json":
        print(dumps(found))
    else:
        width = max([len(one["id"]) for one in found] + [2])
        print(f"{'ID':<{width}}  {'PID':<8}  {'STATUS':<8}  {'CREATED':<30}  BUNDLE")
        for one in found:
            print(f"{one['id']:<{width}}  {one['pid']:<8}  {one['status']:<8}  {one['created']:<30}  {one['bundle']}")
    return 0


def events_(context: Context, options: Options) -> int:
    """Usage as JSON, once with --stats, else every interval until the container stops, and `oom` when the kernel killed."""
    container = _open(context, options)
    path = _cgroup(container)
    container.must_run("running", "paused", "created")
    pause = max(0.05, _seconds(options.get("interval") or "5s"))
    killed = leaves.flat(path, "memory.events").get("oom_kill", 0)
    while True:
        print(dumps({"type": "stats", "id": container.name, "data": stats(container, path)}), flush=True)
        if "stats" in options:
            return 0
        time.sleep(pause)
        now = leaves.flat(path, "memory.events").get("oom_kill", 0)
        if now > killed:
            print(dumps({"type": "oom", "id": container.name}), flush=True)
            killed = now
        if not container.alive():
            return 0


def _seconds(text: str) -> float:
    """A duration as Go writes it, of one unit: 500ms, 5s, 1m; a bare number is of seconds."""
    number = text.rstrip("hms")
    unit = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}.get(text[len(number) :])
    try:
        if unit is None or not 0 < float(number) < 1e9:
            raise ValueError
    except ValueError:
        raise OciError(f"events: --interval {text!r} is no duration (such as 500ms, 5s, 1m)") from None
    return float(number) * unit


def stats(container: Container, path: str) -> dict[str, Any]:
    """Usage in runc's form, and the account of execs."""
    cpu = leaves.flat(path, "cpu.stat")
    events = leaves.flat(path, "memory.events")
    data: dict[str, Any] = {
        "cpu": {
            "usage": {
                "total": cpu.get("usage_usec", 0) * 1000, "kernel": cpu.get("system_usec", 0) * 1000,
                "user": cpu.get("user_usec", 0) * 1000,
            },
            "throttling": {
                "periods": cpu.get("nr_periods", 0), "throttledPeriods": cpu.get("nr_throttled", 0),
                "throttledTime": cpu.get("throttled_usec", 0) * 1000,
            },
        },
        "memory": {
            "usage": {
                "usage": _number(path, "memory.current"), "max": _number(path, "memory.peak"),
                "limit": _number(path, "memory.max"), "failcnt": events.get("max", 0),
            },
            "swap": {"usage": _number(path, "memory.swap.current"), "limit": _number(path, "memory.swap.max")},
            "raw": leaves.flat(path, "memory.stat"), "oomKills": events.get("oom_kill", 0),
        },
        "pids": {"current": _number(path, "pids.current"), "limit": _number(path, "pids.max")},
        "blkio": _io(path),
    }  # fmt: skip
    container.lock()
    leaves.sweep(container)
    data["execs"] = {"ended": leaves.past(container), "running": [leaves.usage(leaf) for leaf in leaves.all_of(path)]}
    return data


def _number(path: str, file: str) -> int | None:
    """A file of one number; None where there is none, or no limit."""
    try:
        text = cgroup.read(path, file).strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _io(path: str) -> dict[str, Any]:
    entries = []
    try:
        lines = cgroup.read(path, "io.stat").splitlines()
    except OSError as error:
        return {"unavailable": strerror(error)}
    for line in lines:
        device, *words = line.split()
        major, _, minor = device.partition(":")
        for word in words:
            key, _, value = word.partition("=")
            if key in ("rbytes", "wbytes") and value.isdigit():
                entries.append(
                    {"major": int(major), "minor": int(minor), "op": "Read" if key == "rbytes" else "Write", "value": int(value)}
                )
    return {"ioServiceBytesRecursive": entries}
