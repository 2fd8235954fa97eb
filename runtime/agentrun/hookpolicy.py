"""What a policy comes to for a container that another runtime makes: control files, what must not be missing, what is governed.

For the daemon, which tells the OCI hook; and without one for the hook itself, which must not wait for the loader of policies: it
reads a file of all policies, worked out beforehand (``write_cache``), and runs this module if that is missing or out of date::

    python -I -m agentrun.hookpolicy CACHE NAME [HINT]    # prints one policy, and writes the cache anew if it may
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agentrun.cgroup.limits import plan_limits
from agentrun.errors import AgentrunError, UsageError
from agentrun.hints import apply_hint
from agentrun.policy import DEFAULT, Limits, Policy
from agentrun.policystore import PolicyStore, directories, is_path
from agentrun_shim.hook_cgroup import HARMLESS, Merged

VERSION = 1
LIMIT_FIELDS = {
    "memory.max": "memory_max", "memory.high": "memory_high", "cpu.max": "cpus", "cpu.max.burst": "cpu_burst",
    "cpu.weight": "cpu_weight", "io.weight": "io_weight", "pids.max": "pids_max",
}  # fmt: skip


def container_files(limits: Limits) -> dict[str, str]:
    """The control files of a container's cgroup. Unlike a leaf it has no init of ours that would count as a process."""
    files = plan_limits(limits)
    if limits.pids_max is not None:
        files["pids.max"] = str(limits.pids_max)
    return files


def insisted(policy: Policy, fail: str) -> set[str]:
    """Control files without which the container must not start.

    ``fail`` is the container's own word: ``open`` none, ``closed`` all, else as for a call: what the policy says and the built-in
    default does not, unless it is best effort.
    """
    if fail == "open" or (not fail and policy.best_effort):
        return set()
    if fail == "closed":
        return set(container_files(policy.limits)) - HARMLESS
    fields = LIMIT_FIELDS.items()
    return {name for name, field in fields if getattr(policy.limits, field) not in (None, getattr(DEFAULT.limits, field))}


def is_open(policy: Policy, fail: str) -> bool:
    """The container starts although its policy is not in force."""
    return fail == "open" or (not fail and policy.best_effort)


def governed(limits: Limits, merged: Merged, found: dict[str, str | None], *, counted: bool) -> tuple[Limits, list[str]]:
    """What is left for the governor once the engine's own, tighter limits are counted in; and what there is to say about that.

    ``counted``: programs in the kernel count memory where there is no controller, so no file is needed.
    """
    notes = []
    most, high = limits.memory_max, limits.memory_high
    if "memory.max" in merged.kept:
        most = int(merged.kept["memory.max"])
    elif "memory.max" in merged.missing and not counted:
        most = None
    if high is not None and found.get("memory.high") not in (None, "max"):
        notes.append(f"memory.high: {found['memory.high']} is the engine's own, so bursts are not governed")
        high = None
    elif "memory.high" in merged.missing and not counted:
        high = None
    if high is not None and most is not None and high >= most:
        notes.append(f"memory.max: {most} is the engine's own, below the policy's memory.high")
        high = None
    burst = limits.memory_burst if high is not None else None
    if burst is not None and most is not None and high is not None:
        burst = min(burst, most - high) or None
    return msgspec.structs.replace(
        limits, memory_max=most, memory_high=high, memory_burst=burst, burst_seconds=limits.burst_seconds if burst else None
    ), notes


# ------------------------------------------------------------------ without a daemon


def describe(policy: Policy) -> dict[str, Any]:
    """A policy as the hook wants it."""
    limits = policy.limits
    return {
        "best_effort": policy.best_effort, "files": container_files(limits), "insisted": sorted(insisted(policy, "")),
        "governed": limits.memory_high is not None,
    }  # fmt: skip


def compile_policies() -> dict[str, Any]:
    """All policies of the machine, and of which files this is true. Those of users, below their homes, are the daemon's alone."""
    where = directories({})
    # Before they are read: what changes in between makes the cache out of date, not wrong.
    files = [path for paths in PolicyStore(where).files().values() for path in paths]
    sources = {str(path): stamp(path) for path in [*where, *files]}
    found: dict[str, Any] = {}
    for name in PolicyStore(where).names():
        try:
            found[name] = describe(PolicyStore(where).find(name))
        except AgentrunError as error:
            found[name] = {"error": str(error)}
    return {"version": VERSION, "sources": sources, "policies": found}


def stamp(path: Path) -> list[int] | None:
    """By which a change of a file, or of what is in a directory, is seen; ``None``: it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def write_cache(path: Path) -> int:
    """Write the cache, whole or not at all; how many policies there are.

    Raises:
        OSError: it cannot be written.
    """
    document = compile_policies()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(document["policies"])


def main(words: Sequence[str]) -> int:
    """For the hook: a policy, with a hint laid over it, as JSON."""
    cache, name, *hint = words
    try:
        if is_path(name) and not name.startswith("/"):  # as the daemon says: relative to what?
            raise UsageError(f"policy: {name} is a relative path; give the whole path, or a name")
        policy = PolicyStore(directories({})).find(name)
        if hint:
            policy, _ = apply_hint(policy, hint[0], None)
        answer = describe(policy)
    except AgentrunError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))  # noqa: T201
    if cache:
        with contextlib.suppress(OSError):
            write_cache(Path(cache))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
