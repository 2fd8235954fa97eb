"""What the hook does without a daemon: limits out of a file of policies worked out beforehand, and a record of the container.

The file (``agentrun setup oci`` writes it, ``agentrun.hookpolicy`` makes it) says which files of policies it is made from. If one
of them has changed, or there is none, the loader itself is run: a third of a second instead of none, and the file is new again.
"""

from __future__ import annotations

import os
import sys

from agentrun_shim.hook_state import Container, HookError

DEFAULT_SOCKET = "/run/agentrun/agentrun.sock"
DEFAULT_CACHE = "/var/lib/agentrun/hook-policies.json"


def record_directory(socket: str) -> str:
    """Where the records of the containers of a daemon are: beside its socket. Root's alone."""
    return f"{socket}.containers"


def record_name(name: str, bundle: str) -> str:
    """The file of a container's record. Two engines may both have a container of that id, but not in one bundle."""
    from binascii import crc32

    return f"{name[:200]}-{crc32(name.encode() + bytes(1) + bundle.encode('utf-8', 'surrogateescape')):08x}.json"


class Compiled:
    """A policy as control files."""

    __slots__ = ("files", "governed", "insisted", "open", "slow")

    def __init__(self, document: dict[str, object], fail: str, *, slow: bool) -> None:
        """``document`` is of ``agentrun.hookpolicy.describe``; ``fail`` the container's own word.

        Raises:
            HookError: the policy does not load.
        """
        if "error" in document:
            raise HookError(str(document["error"]))
        self.open = fail == "open" or (not fail and bool(document["best_effort"]))
        files, insisted = document["files"], document["insisted"]
        assert isinstance(files, dict)
        assert isinstance(insisted, list)
        self.files: dict[str, str] = files
        self.insisted: set[str] = set() if self.open else set(files) if fail == "closed" else set(insisted)
        self.governed = bool(document["governed"])
        """It has a steady budget, and so needs a daemon for what is above."""
        self.slow = slow
        """The loader had to be run."""


def find_policy(cache: str, container: Container) -> Compiled:
    """The policy a container names, from the cache or by the loader.

    Raises:
        HookError: there is none of that name, or it does not load.
    """
    from json import loads

    name = container.policy
    if container.memory is None:
        try:
            with open(cache, "rb") as file:
                if _is_roots(os.fstat(file.fileno())):
                    document = loads(file.read())
                    if _is_true(document["sources"]) and name in document["policies"]:
                        return Compiled(document["policies"][name], container.fail, slow=False)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the loader knows better
    return Compiled(_load(cache, name, container.memory), container.fail, slow=True)


def _is_roots(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _is_true(sources: dict[str, list[int] | None]) -> bool:
    """Nothing has changed that the cache is made from."""
    for path, stamp in sources.items():
        try:
            found = os.stat(path)
        except OSError:
            if stamp is None:
                continue
            return False
        if stamp != [found.st_ino, found.st_size, found.st_mtime_ns]:
            return False
    return bool(sources)


def _load(cache: str, name: str, memory: str | None) -> dict[str, object]:
    from json import loads

    argv = [sys.executable, "-I", "-m", "agentrun.hookpolicy", cache, name, *([memory] if memory else [])]
    read, write = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, write, 1)]
        # What a process of Python needs, and nothing of the runtime's.
        pid = os.posix_spawn(sys.executable, argv, {"LC_ALL": "C.UTF-8", "PATH": os.defpath}, file_actions=actions)
    finally:
        os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    try:
        document = loads(text)
    except ValueError:
        document = None
    if status or not isinstance(document, dict):
        raise HookError(f"the loader of policies failed (exit status {os.waitstatus_to_exitcode(status)})")
    return document


def save_record(socket: str, container: Container, cgroup: str, inode: int, found: dict[str, str | None]) -> None:
    """Leave a record for the next daemon (``agentrun.containerrecords.Record``); whoever may not write there leaves none."""
    from json import dumps

    record = {
        "id": container.id, "bundle": container.bundle, "cgroup": cgroup, "inode": inode, "policy": container.policy,
        "tenant": container.tenant or "default", "hint": container.memory, "fail": container.fail, "uid": os.geteuid(),
        "found": found,
    }  # fmt: skip
    directory = record_directory(socket)
    path = f"{directory}/{record_name(container.id, container.bundle)}"
    try:
        if os.geteuid() != 0:
            return
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if not _is_roots(os.lstat(directory)):
            return
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(dumps(record))
        os.rename(f"{path}.new", path)
    except OSError:
        return


def drop_record(socket: str, container: Container) -> None:
    """Its record goes, if it has one."""
    try:
        os.unlink(f"{record_directory(socket)}/{record_name(container.id, container.bundle)}")
    except OSError:
        return
