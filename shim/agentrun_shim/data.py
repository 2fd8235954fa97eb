"""The files that come with the package: policies, profiles, units. In a wheel they are below ``agentrun/_data``."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def data_path(name: str) -> Path:
    """The path of a shipped file or folder, such as ``policies/default.toml``: of the wheel, else of the checkout."""
    installed = _HERE.parent / "agentrun" / "_data"
    return (installed if installed.is_dir() else _HERE.parents[1]) / name
