"""Change sets beside calls: what ``draft`` does to disks, done in threads, and undone when a call comes to nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec
import trio

from agentrun.changes.draft import Draft
from agentrun.changes.store import Store, check_text
from agentrun.request import Request
from agentrun.types import Result


class Keeping:
    """The change set of one call."""

    def __init__(self, draft: Draft, request: Request) -> None:
        self._draft, self._request = draft, request

    @property
    def fd(self) -> int:
        """Of the directory that its changes go to."""
        return self._draft.fd

    async def start(self) -> None:
        """The workspace is mounted; the tool will see the original as it is now."""
        await trio.to_thread.run_sync(self._draft.start)

    async def seal(self, result: Result) -> Result:
        """The result, with what was changed."""
        request = self._request
        changes = await trio.to_thread.run_sync(self._draft.seal, result.id, request.argv, request.caller)
        return msgspec.structs.replace(result, changes=changes)


class Drafts:
    """Begins change sets, for one executor."""

    def __init__(self) -> None:
        self._swept = False

    @contextlib.asynccontextmanager
    async def keep(self, request: Request) -> AsyncIterator[Keeping]:
        """A change set for the length of a call; what was not sealed by then is removed.

        Raises:
            UsageError: the workspace's path cannot be written down.
            HostError: the store cannot be used.
        """
        draft = await trio.to_thread.run_sync(self._begin, request)
        try:
            yield Keeping(draft, request)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(draft.close)

    def _begin(self, request: Request) -> Draft:
        check_text(request.workspace_path)
        store = Store()
        if not self._swept:
            store.sweep()
            self._swept = True
        return Draft(store, request.workspace_fd, request.workspace_path)
