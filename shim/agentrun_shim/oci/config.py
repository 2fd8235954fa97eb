"""config.json: read it, check what everything else relies on, and sort out its namespaces."""

from __future__ import annotations

import os

from agentrun_shim.oci import names
from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.jsontext import loads
from agentrun_shim.oci.mounts import pack_maps
from agentrun_shim.oci.shape import CONFIG, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BEST_EFFORT = "io.agentrun.best-effort"
EXEC_LEAF = "io.agentrun.exec-leaf"
POLICY = "io.agentrun.policy"
_JOIN_LAST = ("pid", "user")


def load(path: str) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        OciError: it is not there, no JSON, or not of a version we know the meaning of.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise OciError(f"{path}: {strerror(error)}") from None
    config = loads(data, path)
    if not isinstance(config, dict):
        raise OciError(f"{path}: not an object")
    check(config, CONFIG, "")
    version = config.get("ociVersion") or ""
    if version.split(".")[0] != "1" or len(version.split(".")) < 3:
        raise OciError(f"ociVersion: {version!r} is no version 1.x.y of the runtime specification")
    if not (config.get("root") or {}).get("path"):
        raise OciError("root.path: a root file system is needed")
    if not config.get("process"):
        raise OciError("process: nothing to run")
    return config


class Linux:
    """``linux`` of a configuration: its namespaces, and what must be known before anything is made."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Raises OciError for what is unknown, or cannot be done."""
        self.config: dict[str, Any] = config.get("linux") or {}
        self.annotations: dict[str, str] = config.get("annotations") or {}
        self.new: dict[str, bool] = {}
        self.joined: list[tuple[str, str]] = []
        for entry in self.config.get("namespaces") or ():
            kind, path = entry.get("type"), entry.get("path")
            if kind not in names.NAMESPACES:
                raise OciError(f"linux.namespaces: unknown type {kind!r}")
            if kind in self.new or kind in dict(self.joined):
                raise OciError(f"linux.namespaces: {kind} twice")
            if path:
                self.joined.append((kind, path))
            else:
                self.new[kind] = True
        if "mount" not in self.new:
            raise OciError("linux.namespaces: a mount namespace of the container's own is needed (type mount, without a path)")
        self.own = {*self.new, *[kind for kind, path in self.joined if not _is_ours(kind, path)]}
        """Kinds of namespaces that are not simply the host's, whether nothing is said of them or their path is given."""
        for key in ("hostname", "domainname"):
            if config.get(key) and "uts" not in self.own:
                raise OciError(f"{key}: it would be the host's: the container has no uts namespace")
        self.joined.sort(key=lambda item: _JOIN_LAST.index(item[0]) if item[0] in _JOIN_LAST else -1)
        users, groups = self.config.get("uidMappings") or [], self.config.get("gidMappings") or []
        if "user" in self.new and not (users and groups):
            raise OciError("linux.uidMappings, gidMappings: a new user namespace needs both")
        self.maps = pack_maps(users, groups) if users or groups else b""
        self.users, self.groups = users, groups
        if self.config.get("timeOffsets") and "time" not in self.new:
            raise OciError("linux.timeOffsets without a new time namespace")
        if self.config.get("intelRdt"):
            raise OciError("linux.intelRdt is not supported")
        if self.config.get("netDevices"):
            raise OciError("linux.netDevices is not supported")

    @property
    def in_user_namespace(self) -> bool:
        """New or joined."""
        return "user" in self.own

    @property
    def best_effort(self) -> bool:
        """Limits that nothing here enforces are said, not refused."""
        return self.annotations.get(BEST_EFFORT) == "true"

    @property
    def exec_leaf(self) -> bool:
        """Every exec in a leaf of its own; under a policy of the hook's, which holds the first process's leaf, they go there."""
        return self.annotations.get(EXEC_LEAF, "false" if POLICY in self.annotations else "true") != "false"

    def clone_flags(self) -> int:
        """Namespaces that are new at the clone; those of time and cgroup are entered otherwise."""
        return sum([names.NAMESPACES[kind] for kind in self.new if kind not in ("time", "cgroup")])

    def time_offsets(self) -> str:
        """What timens_offsets takes, time_namespaces(7)."""
        offsets = self.config.get("timeOffsets") or {}
        return "".join([f"{clock} {value.get('secs', 0)} {value.get('nanosecs', 0)}\n" for clock, value in offsets.items()])

    def propagation(self) -> tuple[int, int]:
        """Propagation of the host's mounts in the container's namespace, and of its root afterwards."""
        wanted = self.config.get("rootfsPropagation") or ""
        if wanted and wanted not in names.PROPAGATION:
            raise OciError(f"linux.rootfsPropagation: unknown {wanted!r}")
        bits = names.PROPAGATION.get(wanted, 0)
        return (names.MS_PRIVATE if bits & names.MS_PRIVATE else names.MS_SLAVE) | names.MS_REC, bits

    def sysctls(self) -> list[tuple[str, str]]:
        """Paths below /proc/sys and values.

        Raises:
            OciError: one that is not of a namespace the container has to itself.
        """
        found = []
        for name, value in (self.config.get("sysctl") or {}).items():
            path = name if "/" in name else name.replace(".", "/")
            parts = path.split("/")
            own = self.own
            if parts[0] == "net" and "network" not in own:
                raise OciError(f"linux.sysctl: {name} is the host's: the container has no network namespace")
            ipc = path.startswith("fs/mqueue/") or (parts[0] == "kernel" and parts[1:2] and parts[1] in _IPC)
            if ipc and "ipc" not in own:
                raise OciError(f"linux.sysctl: {name} is the host's: the container has no ipc namespace")
            uts = path in ("kernel/hostname", "kernel/domainname") and "uts" in own
            if (parts[0] != "net" and not ipc and not uts) or ".." in parts:
                raise OciError(f"linux.sysctl: {name} is not of a namespace")
            found.append((f"/proc/sys/{path}", str(value)))
        return found


_IPC = ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced", "auto_msgmni", "sem_next_id",
        "msg_next_id", "shm_next_id")  # fmt: skip


def _is_ours(kind: str, path: str) -> bool:
    """A path to the very namespace that we are in, where that is what would be changed."""
    if kind not in ("network", "ipc", "uts"):
        return False
    try:
        return os.path.samefile(path, f"/proc/self/ns/{'net' if kind == 'network' else kind}")
    except OSError:
        return False  # the helper says what is wrong with it


def absolute(path: str, base: str) -> str:
    """A path from the configuration: relative ones begin at the bundle."""
    return os.path.normpath(path if path.startswith("/") else f"{base}/{path}")
