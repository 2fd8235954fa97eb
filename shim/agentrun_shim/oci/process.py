"""``process`` of config.json: who the program is, what it may do, and what it is started with.

``rights`` writes the last operations of a plan, in the one order that works: ids while capabilities are kept, the filter while
they are still there unless no_new_privs makes that unnecessary, then the capabilities, then the program.
"""

from __future__ import annotations

from struct import Struct

from agentrun_shim.container_plan import Plan, strings
from agentrun_shim.oci import names
from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SETS = ("effective", "permitted", "inheritable", "ambient")
_SCHED = Struct("<IIQiIQQQII")


class Process:
    """A checked ``process`` object."""

    def __init__(self, config: dict[str, Any], *, extra_env: list[str] | None = None) -> None:
        """Raises OciError where something is missing or unknown."""
        self.config = config
        self.args: list[str] = list(config.get("args") or ())
        if not self.args or not all(isinstance(arg, str) for arg in self.args):
            raise OciError("process.args: a program is needed, and all must be strings")
        self.cwd: str = config.get("cwd") or ""
        if not self.cwd.startswith("/"):
            raise OciError(f"process.cwd: {self.cwd!r} is not an absolute path")
        # Of a variable that is there twice the last one counts: engines and `exec --env` append.
        given = [*(config.get("env") or ()), *(extra_env or ())]
        self.env: list[str] = list({item.partition("=")[0]: item for item in given}.values())
        user = config.get("user") or {}
        self.uid, self.gid = _id(user, "uid"), _id(user, "gid")
        self.groups: list[int] = list(user.get("additionalGids") or ())
        self.umask: int | None = user.get("umask")
        self.terminal = bool(config.get("terminal"))
        size = config.get("consoleSize") or {}
        self.rows, self.columns = size.get("height", 0), size.get("width", 0)
        capabilities = config.get("capabilities") or {}
        self.bounding = capability_mask(capabilities.get("bounding") or ())
        self.sets = [capability_mask(capabilities.get(name) or ()) for name in _SETS]
        self.no_new_privileges = bool(config.get("noNewPrivileges"))
        self.rlimits = [_rlimit(limit) for limit in config.get("rlimits") or ()]
        self.oom_score_adj: int | None = config.get("oomScoreAdj")
        self.apparmor: str = config.get("apparmorProfile") or ""
        self.selinux: str = config.get("selinuxLabel") or ""

    @property
    def path(self) -> str:
        """Where a program is looked for."""
        return next((item[5:] for item in self.env if item.startswith("PATH=")), DEFAULT_PATH)

    @property
    def _homeless(self) -> bool:
        """The program is told where its user's home is, by the container's own /etc/passwd."""
        return not any(item.startswith("HOME=") for item in self.env)

    def placement(self, plan: Plan) -> None:
        """Scheduling, which is set before the program starts and outlives it."""
        if scheduler := self.config.get("scheduler"):
            plan.add("SCHED", blob=_sched(scheduler), about=f"process.scheduler {scheduler.get('policy')}")
        if priority := self.config.get("ioPriority"):
            kind = names.IO_CLASSES.get(priority.get("class", ""))
            if kind is None:
                raise OciError(f"process.ioPriority: unknown class {priority.get('class')!r}")
            plan.add("IOPRIO", a=kind << 13 | priority.get("priority", 0), about="process.ioPriority")
        if affinity := (self.config.get("execCPUAffinity") or {}).get("final"):
            mask = cpu_mask(affinity)
            plan.add("AFFINITY", a=len(mask), blob=mask, about=f"process.execCPUAffinity.final {affinity}")

    def enter(self, plan: Plan, *, make: bool) -> None:
        """The working directory, made if it is not there and ``make``."""
        plan.add("CWD", self.cwd, a=int(make), about=f"process.cwd {self.cwd}")

    def find(self, plan: Plan) -> None:
        """The program, while an error is still `create`'s."""
        plan.add("FIND", self.args[0], self.path, a=self.uid, b=int(self._homeless), about="exec")

    def rights(
        self,
        plan: Plan,
        filters: tuple[bytes, int, bool] | None,
        *,
        label: int | None,
        hooks: Callable[[Plan], None] | None = None,
    ) -> None:
        """From a privileged process in the container to the program. ``label``: the slot of the open attribute file, if any."""
        plan.add("UMASK", a=0o22 if self.umask is None else self.umask)
        plan.add("BOUND", blob=self.bounding.to_bytes(8, "little"), about="process.capabilities.bounding")
        plan.add("KEEP", about="process.capabilities")
        groups = b"".join([group.to_bytes(4, "little") for group in self.groups])
        plan.add("IDS", a=self.uid, b=self.gid, c=len(self.groups), blob=groups, about=f"process.user {self.uid}:{self.gid}")
        plan.add("RAISE", about="process.capabilities")
        if label is not None:
            text = f"exec {self.apparmor}" if self.apparmor else self.selinux
            plan.add("LABEL", text, a=label, about=f"process label {self.apparmor or self.selinux}")
        if filters and not self.no_new_privileges:
            _filter(plan, filters)
        plan.add("CAPS", blob=b"".join([mask.to_bytes(8, "little") for mask in self.sets]), about="process.capabilities")
        if hooks is not None:
            hooks(plan)
        if self.no_new_privileges:
            plan.add("NNP", about="process.noNewPrivileges")
            if filters:
                _filter(plan, filters)
        env = self.env if any(item.startswith("PATH=") for item in self.env) else [*self.env, f"PATH={DEFAULT_PATH}"]
        env = [*env, "HOME="] if self._homeless else env
        plan.add(
            "EXEC", a=len(self.args), b=len(env), c=int(self._homeless), blob=strings(self.args) + strings(env), about="exec"
        )


def _filter(plan: Plan, filters: tuple[bytes, int, bool]) -> None:
    program, flags, listener = filters
    plan.add("SECCOMP", a=len(program) // 8, b=flags, c=int(listener), blob=program, about="linux.seccomp")


def _id(user: dict[str, Any], name: str) -> int:
    value = user.get(name, 0)
    if not isinstance(value, int) or not 0 <= value < 2**32 - 1:
        raise OciError(f"process.user.{name}: {value!r} is no id")
    return value


def capability_mask(capabilities: list[str] | tuple[str, ...]) -> int:
    """The bits of a list of names; those this kernel or we do not know are left out, as the specification has it.

    Raises:
        OciError: not the name of a capability at all.
    """
    mask = 0
    for name in capabilities:
        if not isinstance(name, str) or not name.startswith("CAP_"):
            raise OciError(f"process.capabilities: {name!r} is no capability")
        if name[4:] in names.CAPABILITIES:
            mask |= 1 << names.CAPABILITIES.index(name[4:])
    return mask


def _rlimit(limit: dict[str, Any]) -> tuple[int, int, int]:
    kind = str(limit.get("type"))
    if kind.removeprefix("RLIMIT_") not in names.RLIMITS or not kind.startswith("RLIMIT_"):
        raise OciError(f"process.rlimits: unknown type {kind!r}")
    if limit.get("soft") is None or limit.get("hard") is None:
        raise OciError(f"process.rlimits: {kind}: soft and hard are needed")
    return names.RLIMITS[kind[7:]], limit["soft"], limit["hard"]


def set_rlimits(pid: int, process: Process) -> None:
    """From outside, with the host's privileges: in a user namespace nobody may raise a hard limit.

    Raises:
        OciError: a limit was refused.
    """
    if not process.rlimits:
        return
    import resource

    for number, soft, hard in process.rlimits:
        unlimited = (1 << 63) - 1
        pair = tuple([resource.RLIM_INFINITY if value > unlimited or value < 0 else value for value in (soft, hard)])
        try:
            resource.prlimit(pid, number, (pair[0], pair[1]))
        except (OSError, ValueError) as error:
            raise OciError(f"process.rlimits: RLIMIT_{list(names.RLIMITS)[number]} {soft}:{hard}: {error}") from None


def _sched(scheduler: dict[str, Any]) -> bytes:
    policy = names.SCHEDULERS.get(scheduler.get("policy", ""))
    if policy is None:
        raise OciError(f"process.scheduler: unknown policy {scheduler.get('policy')!r}")
    flags = 0
    for flag in scheduler.get("flags") or ():
        if flag not in names.SCHEDULER_FLAGS:
            raise OciError(f"process.scheduler: unknown flag {flag!r}")
        flags |= names.SCHEDULER_FLAGS[flag]
    return _SCHED.pack(
        _SCHED.size, policy, flags, scheduler.get("nice", 0), scheduler.get("priority", 0), scheduler.get("runtime", 0),
        scheduler.get("deadline", 0), scheduler.get("period", 0), 0, 0,
    )  # fmt: skip


def cpu_mask(text: str) -> bytes:
    """A list such as ``0-2,7`` as a mask.

    Raises:
        OciError: it is no such list.
    """
    bits = 0
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            for number in range(int(first), int(last or first) + 1):
                bits |= 1 << number
    except ValueError:
        raise OciError(f"{text!r} is no list of numbers (such as 0-2,7)") from None
    return bits.to_bytes(max(8, (bits.bit_length() + 63) // 64 * 8), "little")
