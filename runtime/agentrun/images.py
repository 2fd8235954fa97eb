"""Images for calls: what a policy that names one comes to, and the leases that keep its layers where they are."""

from __future__ import annotations

import itertools

import msgspec

from agentrun import rootfs
from agentrun.errors import UsageError
from agentrun.image.config import ImageConfig
from agentrun.image.store import Lease, Store
from agentrun.imageroot import swap
from agentrun.imageview import User, find_user, view
from agentrun.policy import HOST, Policy

_KEPT = 256
"""Images, and pairs of policy and image, that are remembered."""


class _Known(msgspec.Struct, frozen=True):
    """What a name meant when the store had this stamp."""

    stamp: tuple[int, ...]
    id: str
    config: ImageConfig
    user: User


class Images:
    """The images of one store, for one executor. The store is opened when somebody first asks for an image."""

    def __init__(self) -> None:
        self._opened: Store | None = None
        self._known: dict[str, _Known] = {}
        self._chosen: dict[tuple[int, str, str], tuple[Policy, Policy]] = {}
        self._pinned: dict[int, tuple[Policy, _Known, Policy]] = {}

    @property
    def _store(self) -> Store:
        if self._opened is None:
            self._opened = Store()
        return self._opened

    def choose(self, policy: Policy, image: str, session: str = "") -> Policy:
        """A policy with another image than its own, and a session. The same object for the same, which others remember it by.

        Raises:
            UsageError: the image is not text.
        """
        if not isinstance(image, str):
            raise UsageError(f"image: {image!r} is not a name")
        key = id(policy), image, session
        found = self._chosen.get(key)
        if found is None or found[0] is not policy:
            self._bound()
            found = policy, msgspec.structs.replace(policy, fs=msgspec.structs.replace(policy.fs, image=image, session=session))
            self._chosen[key] = found
        return found[1]

    def pin(self, policy: Policy) -> Policy:
        """A policy as the image it names makes it: the image by its id, and what its config says that the policy does not.

        Looked up again whenever the store's names have changed, so that a call has what its name means now.

        Raises:
            UsageError: there is no such image, or its user is none.
            HostError: the store cannot be read.
        """
        if policy.fs.image == HOST:
            return policy
        known = self._look_up(policy.fs.image)
        found = self._pinned.get(id(policy))
        if found is None or found[0] is not policy or found[1] is not known:
            self._bound()
            found = policy, known, _apply(policy, known)
            self._pinned[id(policy)] = found
        return found[2]

    def _look_up(self, name: str) -> _Known:
        stamp, known = self._store.stamp(), self._known.get(name)
        if known is None or known.stamp != stamp:
            with self._store.lease(name) as lease:
                if known is not None and known.id == lease.image.id:
                    known = msgspec.structs.replace(known, stamp=stamp)
                else:
                    with view(lease.layers) as files:
                        user = find_user(lease.config.user, files.read("/etc/passwd"), files.read("/etc/group"))
                    known = _Known(stamp, lease.image.id, lease.config, user)
            self._known[name] = known
        return known

    def lease(self, image_id: str) -> Lease:
        """The layers of a pinned policy's image."""
        return self._store.lease(image_id)

    def _bound(self) -> None:
        for remembered in (self._chosen, self._pinned, self._known):
            if len(remembered) >= _KEPT:
                remembered.clear()


def _apply(policy: Policy, known: _Known) -> Policy:
    """As ``docker run`` would: the image's environment, directory, entry point and user, where the policy does not say."""
    process, config, user = policy.process, known.config, known.user
    owners, name = (0, 0), rootfs.USER
    if (process.uid, process.gid, process.groups) == (rootfs.UID, rootfs.GID, ()):
        owners = rootfs.UID if user.uid == 0 else 0, _roots_group(user)
        uid, gid, *groups = swap(user.uid, owners[0]), *(swap(group, owners[1]) for group in (user.gid, *user.groups))
        process = msgspec.structs.replace(process, uid=uid, gid=gid, groups=tuple(groups))
        name = user.name if user.name and user.uid else name
    env = {"USER": name, "LOGNAME": name}
    env |= {key: value for key, _, value in (setting.partition("=") for setting in config.env)}
    env |= dict(policy.process.env_set)
    process = msgspec.structs.replace(process, env_set=tuple(sorted(env.items())))
    fs = msgspec.structs.replace(policy.fs, image=known.id, workdir=config.workdir, entrypoint=config.entrypoint, owners=owners)
    return msgspec.structs.replace(policy, process=process, fs=fs)


def _roots_group(user: User) -> int:
    """The number that root's group has for a tool that is in it: none of its other groups'. 0: it is not in it."""
    groups = {user.gid, *user.groups}
    return next(gid for gid in itertools.count(rootfs.GID) if gid not in groups) if 0 in groups else 0
