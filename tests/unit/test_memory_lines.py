# SPDX-License-Identifier: Apache-2.0
"""What ``agentrun top`` and ``agentrun bursts`` print when nobody counts memory."""

from agentrun.cli import bursts, top

ROW = {
    "call": "a1", "tenant": "default", "argv": ["make"], "seconds": 1.0, "memory": None, "high": None, "max": None,
    "credit": None, "rung": None, "cpu": 0.5, "psi_cpu": None, "psi_memory": None,
}  # fmt: skip


def test_top_says_that_it_does_not_know():
    memory = {"mode": "none", "hook": None, "lost": 0}
    known = {**ROW, "call": "b2", "memory": 5 << 20}
    first, _, *rows = top._text({"calls": [ROW, known], "containers": [], "memory": memory}, {}, 1.0).splitlines()
    assert first.endswith("memory is held by: none")
    assert [row.split()[:4] for row in rows] == [["b2", "default", "1.0", "5M"], ["a1", "default", "1.0", "-"]]


def test_bursts_says_who_holds_memory_from_now_on():
    news = {"event": "mode", "mode": "none", "call": "", "tenant": "", "time": 0.25, "argv": [], "missed": 0}
    assert bursts._line(news).endswith(".250 memory is held by: none")
