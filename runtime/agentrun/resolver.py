"""From what a caller says to a request: every rule about a call that can be checked before it has its turn.

The policy with its image and its session, the hint, the workspace's mode, the defaults; then the terms, which the policy comes
to for this tenant. It is on the way of every call: policies are looked up by what they are, not worked out anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from agentrun import rootfs
from agentrun.environment import encode
from agentrun.errors import HostError, UsageError
from agentrun.fleet import Fleet
from agentrun.hints import apply_hint
from agentrun.policy import HOST, Policy
from agentrun.policystore import PolicyStore
from agentrun.request import Request, Text, check_tenant, encode_argv
from agentrun.terms import TermsBook
from agentrun.workspace import check_mode, real_path

_HOME = rootfs.HOME.encode()


class Resolver:
    """Makes the requests of one executor."""

    def __init__(self, policies: PolicyStore, terms: TermsBook, fleet: Fleet) -> None:
        self._policies, self._terms = policies, terms
        self._images, self._sessions, self._tenants = fleet.images, fleet.sessions, fleet.tenants
        self.closed = False
        """Every request is refused: it would make pools that nobody ends."""

    def resolve(
        self,
        argv: Sequence[Text],
        *,
        policy: Policy | str = "default",
        tenant: str = "default",
        workspace_fd: int = -1,
        workspace_mode: str = "rw",
        cwd: str | None = None,
        env: Mapping[str, str] | Sequence[bytes] | None = None,
        timeout: float | None = None,
        hint: str | None = None,
        image: str | None = None,
        session: str | None = None,
        timings: bool = False,
        caller: tuple[int, int] | None = None,
    ) -> Request:
        """Check a request and fill in its defaults.

        Raises:
            UsageError: something in it cannot be.
            LimitError: one of its limits cannot be enforced here.
            HostError: the executor is closing, or the host cannot do it.
        """
        if self.closed:
            raise HostError("the executor is closing")
        command = encode_argv(argv)
        check_tenant(tenant)
        kept = None if session is None else self._sessions.store.get(session)
        if kept is not None and (image is not None or workspace_fd >= 0):
            raise UsageError(f"session {session}: it has an image and a workspace of its own")
        rules = self.rules(policy, image) if kept is None else self.rules(policy, kept.image, kept.key)
        if rules.fs.entrypoint:
            command = tuple(encode(word, "entrypoint") for word in rules.fs.entrypoint) + command
        asked = None
        if hint:
            rules, asked = apply_hint(rules, hint, self._tenants.budget(tenant).memory_max)
        if timeout is None:
            timeout = rules.timeout
        elif not isinstance(timeout, (int, float)) or not timeout > 0:
            raise UsageError(f"timeout: {timeout!r} is not a positive number of seconds")
        path, mode = "", check_mode("rw", "rw", "")
        if workspace_fd >= 0:
            mode = check_mode(workspace_mode, rules.fs.workspace, rules.name)
            path, caller = real_path(workspace_fd), caller or (os.geteuid(), os.getegid())
        elif kept is not None and kept.workspace:
            check_mode("ro", rules.fs.workspace, rules.name)  # the directory itself is never written to
            path = kept.workspace
        # Last: it makes the tenant's cgroup and pool, which a request that is none must not.
        terms = self._terms.find(rules, tenant, hinted=asked is not None)
        return Request(
            argv=command,
            env=terms.environment(env),
            cwd=os.path.join(os.fsencode(path or rules.fs.workdir) or _HOME, encode(cwd or "", "cwd")).rstrip(b"/") or b"/",
            terms=terms,
            timeout=timeout,
            tenant=tenant,
            hint=asked,
            timings=timings,
            workspace_fd=workspace_fd,
            workspace_path=path if workspace_fd >= 0 else "",
            session=rules.fs.session,
            workspace_mode=mode,
            caller=caller or (0, 0),
        )

    def rules(self, policy: Policy | str, image: str | None, session: str = "") -> Policy:
        """The policy of a call: by its name, with the image that the call asks for, and a session's key.

        Raises:
            UsageError: there is no such policy or image, or it does not go with the host's root.
            HostError: the store of images cannot be read.
        """
        found = self._policies.find(policy) if isinstance(policy, str) else policy
        if not isinstance(found, Policy):
            raise UsageError(f"policy: {found!r} is neither a name nor a Policy")
        if image is not None:
            found = self._images.choose(found, image, session)
        if found.fs.image != HOST:
            return self._images.pin(found)
        if found.fs.root != "ro" and not session:
            raise UsageError(f"policy {found.name}: fs.root: the host's root is read-only; name an image")
        return found
