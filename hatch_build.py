"""Compile the native programs when the package is built: they are shipped in the wheel, which is therefore a platform wheel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs ``agentrun_shim.native.build`` and tags the wheel for this platform and any Python 3."""

    def initialize(self, _version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        sys.path.insert(0, str(root / "shim"))
        try:
            from agentrun_shim import native
        finally:
            sys.path.pop(0)
        native.build(root / "shim" / "native")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
