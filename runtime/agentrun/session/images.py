"""The images below sessions: each has a name in the image store for as long as there is the session, so nobody prunes it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from agentrun.errors import UsageError
from agentrun.image.shelf import SESSION_TAG, default_root
from agentrun.image.store import Store
from agentrun.policy import HOST


class KeptImages:
    """Those of one store of sessions. The image store is opened when somebody first asks for an image."""

    def __init__(self, images: Store | None = None) -> None:
        self._opened = images
        self._depths: dict[str, int] = {}

    @property
    def _store(self) -> Store:
        if self._opened is None:
            self._opened = Store()
        return self._opened

    def keep(self, image: str, session_id: str) -> str:
        """Keep an image for a session; its id.

        Raises:
            UsageError: there is no such image.
        """
        return image if image == HOST else self._store.tag(image, _tag(session_id))

    def depth(self, image_id: str) -> int:
        """How many layers an image has."""
        if image_id == HOST:
            return 0
        if image_id not in self._depths:
            image = self._store.find(image_id)
            self._depths[image_id] = len(image.layers) - image.hidden
        return self._depths[image_id]

    def let_go(self, image: str, session_id: str) -> None:
        """A session is gone. Whoever is killed before leaves a name, which is taken back, and no session without its image."""
        if image != HOST:
            with contextlib.suppress(UsageError):
                self._store.remove(_tag(session_id))

    def keep_only(self, session_ids: Collection[str]) -> None:
        """Take back names that were given for sessions of which nothing came, or of which nothing is left."""
        if self._opened is None and not default_root().exists():
            return
        needed = {_tag(session_id) for session_id in session_ids}
        for name in self._store.names():
            if name.startswith(SESSION_TAG) and name.removesuffix(":latest") not in needed:
                with contextlib.suppress(UsageError):
                    self._store.remove(name)


def _tag(session_id: str) -> str:
    return f"{SESSION_TAG}{session_id}"
