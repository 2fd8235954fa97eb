"""What is drawn on a terminal while something takes its time. Where nobody looks, nothing is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from agentrun.image.limits import Report, silent
from agentrun.tomltext import show_path

_EVERY = 0.05
"""Seconds: things are told at every step, and nobody sees more than this."""


@contextlib.contextmanager
def progress(*, counts_bytes: bool = True) -> Iterator[Report]:
    """A bar on stderr for each thing that is worked on, if that is a terminal.

    Args:
        counts_bytes: what is done is told in bytes; else in steps, of which only the share says something.
    """
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn()) if counts_bytes else (TaskProgressColumn(),)
    tasks: dict[str, TaskID] = {}
    last: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), *columns, console=Console(stderr=True), transient=True
    ) as bars:

        def report(what: str, done: int, total: int | None) -> None:
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = bars.add_task(show_path(what)[-48:], total=total)
            elif now - last[what] < _EVERY and done != total:
                return
            last[what] = now
            bars.update(tasks[what], completed=done, total=total, visible=total != 0)

        yield report
