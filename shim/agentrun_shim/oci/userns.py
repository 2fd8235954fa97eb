"""The id maps of a new user namespace: written directly where we may, by newuidmap(1) and newgidmap(1) where only those may."""

from __future__ import annotations

import os

from agentrun_shim.oci.errors import OciError, strerror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin")


def write_maps(pid: int, users: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Map a waiting process's users and groups.

    Raises:
        OciError: we may not, and nobody does it for us.
    """
    for file, program, entries in (("uid_map", "newuidmap", users), ("gid_map", "newgidmap", groups)):
        try:
            _write(f"/proc/{pid}/{file}", entries)
        except PermissionError:
            _by_program(program, pid, entries)
        except OSError as error:
            raise OciError(f"/proc/{pid}/{file}: {strerror(error)}: {entries}") from None


def _write(path: str, entries: list[dict[str, Any]]) -> None:
    text = "".join([f"{entry['containerID']} {entry['hostID']} {entry['size']}\n" for entry in entries])
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _by_program(program: str, pid: int, entries: list[dict[str, Any]]) -> None:
    if len(entries) == 1 and entries[0]["size"] == 1:
        # One id, our own: user_namespaces(7) lets anyone map it, if setgroups(2) is given up.
        if program == "newgidmap":
            with open(f"/proc/{pid}/setgroups", "w", encoding="ascii") as file:
                file.write("deny")
        try:
            _write(f"/proc/{pid}/{program[3:6]}_map", entries)
        except OSError as error:
            raise OciError(f"mapping {entries}: {strerror(error)}") from None
        return
    found = next((f"{directory}/{program}" for directory in _DIRECTORIES if os.access(f"{directory}/{program}", os.X_OK)), None)
    if found is None:
        raise OciError(f"{program} is needed to map {entries} (apt-get install uidmap)")
    numbers = [str(entry[key]) for entry in entries for key in ("containerID", "hostID", "size")]
    child = os.posix_spawn(found, [program, str(pid), *numbers], {})
    if os.waitpid(child, 0)[1]:
        raise OciError(f"{program} {pid} {' '.join(numbers)} failed (see /etc/subuid and /etc/subgid)")
