# SPDX-License-Identifier: Apache-2.0
"""The tests of the escape suite by name: what docs/security.md lists, and the VM lane runs in its guests."""

from __future__ import annotations

import ast
from pathlib import Path


def wall_files() -> list[Path]:
    """The suite's files."""
    return sorted(Path(__file__).parent.glob("test_wall_*.py"))


def wall_tests() -> dict[str, str]:
    """Every test of the suite, and the first line of its docstring: ``attack — source``.

    Raises:
        ValueError: two tests have one name, or one has no such line.
    """
    found: dict[str, str] = {}
    for path in wall_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if node.name in found or " — " not in line:
                    raise ValueError(f"{path.name}: {node.name}: twice, or without `attack — source`")
                found[node.name] = line
    return found
