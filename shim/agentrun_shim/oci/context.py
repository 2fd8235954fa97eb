"""What every verb is given."""

from __future__ import annotations

from agentrun_shim.oci.log import Log


class Context:
    """Where containers are, where errors go, which cgroup manager was asked for, and whether we are less than the host's root."""

    def __init__(self, root: str, log: Log, *, manager: str, rootless: bool) -> None:
        self.root, self.log, self.manager, self.rootless = root, log, manager, rootless

    def front(self) -> list[str]:
        """Global flags for a native verb that is run on our behalf."""
        log = ["--log", self.log.path, "--log-format", "json" if self.log.json else "text"] if self.log.path else []
        return ["--root", self.root, *log]
