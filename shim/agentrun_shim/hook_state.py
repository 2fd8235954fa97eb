"""What the runtime tells a hook on its standard input, and what the container's annotations ask of agentrun."""

from __future__ import annotations

PREFIX = "io.agentrun."
KNOWN = {"policy", "tenant", "memory", "fail", "daemon", "exec-leaf", "best-effort"}
"""The last two are for agentrun-oci (agentrun_shim/oci/config.py), and nothing to the hook."""
STAGES = {"creating": "createRuntime", "created": "createRuntime", "running": "poststart", "stopped": "poststop"}
"""The stage by the container's status, if nobody names it. crun says `created` where runc says `creating`; but runc 1.1 says
`created` to poststart too, which then does again, without effect, what was done."""
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.+-:")


class HookError(Exception):
    """What keeps the policy from being in force, in one line."""


class Container:
    """A container as its runtime describes it, and what it asks for.

    Annotations (all begin with ``io.agentrun.``): ``policy`` is a name; ``tenant`` as in ``--tenant``; ``memory`` is a hint
    (``low``, ``medium``, ``high`` or ``4g``); ``fail`` is ``open`` or ``closed``; ``daemon`` is ``required`` or ``optional``.
    """

    __slots__ = ("bundle", "fail", "id", "memory", "needs_daemon", "pid", "policy", "stage", "tenant")

    def __init__(self, raw: bytes, stage: str = "") -> None:
        """``raw`` is the state; ``stage`` goes before what its status says.

        Raises:
            HookError: it is no state, or an annotation of ours is none.
        """
        state = _parse(raw)
        annotations = state.get("annotations") or {}
        if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
            raise HookError("annotations: not a map of text")
        ours = {key.removeprefix(PREFIX): value for key, value in annotations.items() if key.startswith(PREFIX)}
        self.policy: str = ours.get("policy", "")
        """Empty: the container asks for nothing."""
        self.id, self.bundle = str(state.get("id", "")), str(state.get("bundle", ""))
        pid = state.get("pid")
        self.pid = pid if isinstance(pid, int) else 0
        self.stage = stage or STAGES.get(str(state.get("status")), "")
        self.fail = _choice(ours, "fail", ("open", "closed"))
        if not self.policy:
            if "policy" in ours and self.fail != "open":  # a variable that was not set, say: whoever wrote it wanted one
                raise HookError(f"{PREFIX}policy: it names none")
            return
        self.needs_daemon = _choice(ours, "daemon", ("required", "optional")) == "required"
        self.tenant: str | None = ours.get("tenant")
        memory = ours.get("memory")
        self.memory: str | None = memory and f"memory:{memory.removeprefix('memory:').removeprefix('memory=')}"
        if not self.id or len(self.id) > 1024 or not _NAME.issuperset(self.id):
            raise HookError(f"id: {self.id[:60]!r} is none")
        if not self.stage:
            raise HookError(f"status: {state.get('status')!r} is not one in which hooks run")

    @property
    def name(self) -> str:
        """Its id for people: sixty-four hexadecimal digits are cut to twelve, as the engines do."""
        return self.id[:12] if len(self.id) == 64 else self.id


def unknown_annotations(raw: bytes) -> list[str]:
    """Annotations that begin like ours and are none: a typing error in ``io.agentrun.polcy`` would else go unnoticed."""
    annotations = _parse(raw).get("annotations")
    names = annotations if isinstance(annotations, dict) else {}
    return sorted(key for key in names if key.startswith(PREFIX) and key.removeprefix(PREFIX) not in KNOWN)


def _choice(ours: dict[str, str], key: str, words: tuple[str, ...]) -> str:
    value = ours.get(key, "")
    if value and value not in words:
        raise HookError(f"{PREFIX}{key}: {value[:60]!r} is not known ({' or '.join(words)})")
    return value


class _Context:
    """What the scanner of ``json`` wants to know."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _parse(raw: bytes) -> dict[str, object]:  # the values are whatever a runtime says
    try:
        text = raw.decode()
        try:
            # `json` imports `re`, which takes half as long as starting Python. Its scanner, in C, is all that is needed: without
            # the module around it it fails in odd ways (SystemError), so whatever it does not like is given to the whole.
            from _json import make_scanner

            scan = make_scanner(_Context)  # type: ignore[arg-type]  # typeshed has it as the type it returns
            value, _ = scan(text, len(text) - len(text.lstrip()))
        except Exception:  # noqa: BLE001
            import json

            value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HookError(f"standard input is no container state: {error}") from None
    if not isinstance(value, dict):
        raise HookError("standard input is no container state: not an object")
    return value
