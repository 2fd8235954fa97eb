# SPDX-License-Identifier: Apache-2.0
"""docs/security.md lists every test of the escape suite, and none that is not there."""

import re
from pathlib import Path

from tests.kernel.wall_names import wall_tests

SECURITY = Path(__file__).resolve().parents[2] / "docs/security.md"


def rows() -> list[list[str]]:
    section = SECURITY.read_text().split("\n## Escape suite\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells[2:]]


def test_the_table_and_the_suite_are_the_same() -> None:
    listed = [name for row in rows() for name in re.findall(r"`(test_\w+)`", row[1])]
    assert sorted(listed) == sorted(wall_tests())


def test_every_row_says_what_stops_it() -> None:
    for row in rows():
        assert len(row) == 5, row  # attack, test, wall, and the results on this host and in the guests
        assert all(row), row
