"""A nursery that does not show: what one task raises comes out as it is, not in a group of one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def open_plain_nursery() -> AsyncIterator[trio.Nursery]:
    """``trio.open_nursery`` for a block whose user need not know that there are tasks behind it.

    Several exceptions stay a group, and so does a group that was raised inside. A cancellation beside an exception gives way to
    it, as it does wherever code that is being cancelled raises something else.
    """
    single = None
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        real = [error for error in group.exceptions if not isinstance(error, trio.Cancelled)]
        if len(real) > 1:
            raise
        single = real[0] if real else group.exceptions[0]
    if single is not None:
        try:
            raise single  # out here, where the group does not become its context
        finally:
            del single  # it holds this frame, which would hold it
