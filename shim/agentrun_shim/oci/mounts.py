"""``mounts`` of config.json, as operations of a container plan.

A bind is opened by the helper, with the host's paths and privileges, and attached inside; a new file system is made inside, in
the container's namespaces. config.md "Mounts" and config-linux.md "Default Filesystems".
"""

from __future__ import annotations

from agentrun_shim import container_plan as cp
from agentrun_shim.container_plan import Plan
from agentrun_shim.oci import names
from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_INSTEAD = {"sysfs": "/sys", "mqueue": "/dev/mqueue", "cgroup2": "/sys/fs/cgroup"}
"""Where a user namespace may not make it: the host's, bound."""
_MAP_SIZE = 4


class Parsed:
    """One mount's options, sorted by what they are."""

    def __init__(self, destination: str, options: list[str]) -> None:
        """Raises OciError for an option that is neither known nor one of the file system's own."""
        self.set = self.clear = self.rset = self.rclear = self.propagation = 0
        self.bind: bool | None = None
        self.idmap: bool | None = None
        self.copy_up = False
        self.data: list[str] = []
        for option in options:
            if option in names.SET:
                self._attr(names.SET[option])
            elif option in names.CLEAR:
                self.set &= ~names.CLEAR[option]
                self.clear |= names.CLEAR[option]
            elif option in names.RECURSIVE_SET:
                self.rset |= names.RECURSIVE_SET[option]
            elif option in names.RECURSIVE_CLEAR:
                self.rclear |= names.RECURSIVE_CLEAR[option]
            elif option in names.PROPAGATION:
                self.propagation = names.PROPAGATION[option]
            elif option in names.BIND:
                self.bind = names.BIND[option] or bool(self.bind)
            elif option in names.IDMAP:
                self.idmap = names.IDMAP[option]
            elif option == names.COPY_UP:
                self.copy_up = True
            elif option not in names.IGNORED:
                if "\n" in option:
                    raise OciError(f"mounts: {destination}: option {option!r}")
                self.data.append(option)

    def _attr(self, bit: int) -> None:
        if bit & names.ATIME:
            self.set &= ~names.ATIME
        self.set |= bit
        self.clear &= ~bit


class Mounts:
    """The mounts of one container: ``helper`` and ``inside`` write their operations, in that order."""

    def __init__(
        self,
        mounts: list[dict[str, Any]],
        bundle: str,
        *,
        cgroup: str,
        own_cgroup_namespace: bool,
        maps: bytes,
        mount_label: str = "",
    ) -> None:
        """``cgroup`` is the container's cgroup directory, "" without one; ``maps`` its id maps, as USERNS has them.

        Raises:
            OciError: a mount that cannot be understood.
        """
        self.bundle, self.cgroup, self.own_cgroup_namespace, self.maps = bundle, cgroup, own_cgroup_namespace, maps
        self.label = mount_label
        self.todo: list[Callable[[Plan], None]] = []
        self.mounts = [self._checked(number, mount) for number, mount in enumerate(mounts)]

    def _checked(self, number: int, mount: Any) -> tuple[dict[str, Any], Parsed]:
        destination = mount.get("destination") if isinstance(mount, dict) else None
        if not isinstance(destination, str) or not destination:
            raise OciError(f"mounts[{number}]: no destination")
        parsed = Parsed(destination, list(mount.get("options") or ()))
        if mount.get("type") == "bind" and parsed.bind is None:
            parsed.bind = True
        if parsed.bind is None and not mount.get("type"):
            raise OciError(f"mounts: {destination}: neither a type nor bind or rbind")
        return mount, parsed

    def is_bound(self, destination: str) -> bool:
        """Whether the last mount at a destination shows a directory of the host."""
        found = [parsed.bind is not None for mount, parsed in self.mounts if mount["destination"].rstrip("/") == destination]
        return bool(found and found[-1])

    def has(self, destination: str) -> bool:
        """Whether anything is mounted there."""
        return any(mount["destination"].rstrip("/") == destination for mount, _ in self.mounts)

    def helper(self, plan: Plan) -> None:
        """Open what is bound."""
        for mount, parsed in self.mounts:
            destination = mount["destination"]
            if mount.get("type") == "cgroup" and parsed.bind is None and not self.own_cgroup_namespace and self.cgroup:
                self._bind(plan, self.cgroup, destination, parsed, {})  # the part of the hierarchy that is its own
            elif parsed.bind is not None:
                source = mount.get("source") or ""
                self._bind(plan, source if source.startswith("/") else f"{self.bundle}/{source}", destination, parsed, mount)
            else:
                self._new(mount, parsed)

    def inside(self, plan: Plan) -> None:
        """Attach what was opened, make what is new, in the order of the configuration."""
        for action in self.todo:
            action(plan)

    def _bind(self, plan: Plan, source: str, destination: str, parsed: Parsed, mount: dict[str, Any]) -> None:
        about = f"mount {source} at {destination}"
        users = 0
        if parsed.idmap is not None or mount.get("uidMappings"):
            users = plan.slot() + 1
            maps = pack_maps(mount["uidMappings"], mount.get("gidMappings") or []) if mount.get("uidMappings") else self.maps
            if not maps:
                raise OciError(
                    f"mounts: {destination}: idmap without uidMappings and gidMappings, and there is no user namespace"
                )
            plan.add("USERNS", a=users - 1, b=len(maps) // 16, blob=maps, about=f"{about}: its id maps")
        slot = plan.slot()
        plan.add("TREE", source, a=slot, b=int(bool(parsed.bind)), c=users, d=int(bool(parsed.idmap)), about=about)
        # As if it had been made inside, where all mounts are slaves of the host's.
        propagation = parsed.propagation or names.MS_SLAVE | names.MS_REC
        deep = int(bool(propagation & names.MS_REC))
        for bits, clear, how in (
            (0, 0, propagation & ~names.MS_REC | deep),
            (parsed.rset, parsed.rclear & ~parsed.rset, 1),
            (parsed.set, parsed.clear & ~parsed.set, 0),
        ):
            if bits or clear or how & ~1:
                plan.add("ATTR", a=slot, b=bits, c=clear, d=how, about=f"{about}: options")
        self.todo.append(lambda plan: plan.add("ATTACH", destination, a=slot, about=about))

    def _new(self, mount: dict[str, Any], parsed: Parsed) -> None:
        kind, destination = mount["type"], mount["destination"]
        data, flags = parsed.data, 0
        if kind == "cgroup":
            kind, data = (
                "cgroup2",
                [word for word in data if word in ("nsdelegate", "memory_localevents", "memory_recursiveprot")],
            )
        if self.label and kind in ("tmpfs", "mqueue", "devpts"):
            data = [*data, f"context={self.label}"]
        source = mount.get("source") or kind
        if kind in _INSTEAD:
            source, flags = _INSTEAD[kind], cp.BIND_INSTEAD
        if parsed.copy_up:
            if kind != "tmpfs":
                raise OciError(f"mounts: {destination}: tmpcopyup is for tmpfs, not {kind}")
            flags |= cp.COPY_UP
        attributes = parsed.set | parsed.rset
        propagation = parsed.propagation
        self.todo.append(
            lambda plan: plan.add(
                "FSMOUNT", kind, source, destination, "\n".join(data), a=attributes, c=propagation, d=flags,
                about=f"mount {kind} at {destination}",
            )
        )  # fmt: skip


def pack_maps(users: list[dict[str, int]], groups: list[dict[str, int]]) -> bytes:
    """Id maps as ``struct plan_map``: is it of groups, first id inside, first outside, how many.

    Raises:
        OciError: one of the numbers is missing.
    """
    packed = b""
    for group, entries in ((0, users), (1, groups)):
        for entry in entries:
            try:
                numbers = (group, entry["containerID"], entry["hostID"], entry["size"])
            except (KeyError, TypeError):
                raise OciError(f"id mapping {entry!r}: containerID, hostID and size are needed") from None
            packed += b"".join([number.to_bytes(_MAP_SIZE, "little") for number in numbers])
    return packed
