"""The tables of a policy file: every key with its type and bounds. docs/policies.md says what each means.

What is not in a file is ``UNSET``. The description of a type is what messages and the JSON Schema say would be right.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agentrun import policy as p

# Python's $ also matches before a last newline; that of JSON Schema does not.
_END = r"$(?!\n)"
_SIZE = r"[0-9]{1,19}(\.[0-9]{1,9})? *([kmgtKMGT]([iI]?[bB])?|[bB])?"
_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
_LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}"
_IMAGE = r"[a-zA-Z0-9][a-zA-Z0-9._/:@+-]{0,250}"
_PATH = r"/[^\x00-\x1f\x7f]{1,1023}"

Size = Annotated[str, Meta(pattern=f"^{_SIZE}{_END}", description='a size such as "512M"')]
SizeOrNone = Annotated[str, Meta(pattern=f"^(none|{_SIZE}){_END}", description='a size such as "512M", or "none"')]
SizeOrZero = Annotated[str, Meta(pattern=f"^(none|{_SIZE}){_END}", description='a size such as "512M", "0", or "none"')]
Seconds = Annotated[float, Meta(ge=0.001, le=1e9, description="a number of seconds (0.001 to 1000000000)")]
SecondsOrZero = Annotated[float, Meta(ge=0, le=3600, description="a number of seconds (0 to 3600)")]
WholeSeconds = Annotated[int, Meta(ge=1, le=10**9, description="a whole number of seconds (1 to 1000000000)")]
Weight = Annotated[int, Meta(ge=1, le=10000, description="a whole number from 1 to 10000")]
User = Annotated[int, Meta(ge=1, le=65535, description="a whole number from 1 to 65535; no tool is root")]
Id = Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535")]
Name = Annotated[str, Meta(pattern=f"^{_NAME}{_END}", description="a name of a-z, 0-9, - and _, at most 64")]
Line = Annotated[str, Meta(pattern=f"^{_LINE}{_END}", description="one line of text, at most 200 characters")]
Profile = Annotated[str, Meta(pattern=f"^({_NAME}|{_PATH}){_END}", description="the name of a profile, or an absolute path")]
Image = Annotated[str, Meta(pattern=f"^{_IMAGE}{_END}", description='"host", or the name of an image')]
Umask = Annotated[str, Meta(pattern=f"^0?[0-7]{{3}}{_END}", description='three octal digits such as "022"')]
Cpus = Annotated[float, Meta(ge=0.01, le=4096, description="a number of processors (0.01 to 4096)")]
CpuSeconds = Annotated[float, Meta(ge=1e-6, le=1000, description="a number of seconds (0.000001 to 1000)")]
Pids = Annotated[int, Meta(ge=1, le=4194304, description="a whole number from 1 to 4194304")]
OomScore = Annotated[int, Meta(ge=0, le=1000, description="a whole number from 0 to 1000")]
RlimitNumber = Annotated[int, Meta(ge=0, le=1 << 53, description="a whole number up to 2^53")] | Literal["none"]
# Not a tuple: msgspec 0.22 crashes in garbage collection over a fixed-length tuple in such a union.
SoftHard = Annotated[list[RlimitNumber], Meta(min_length=2, max_length=2, description="two of them, [soft, hard]")]
Rlimit = RlimitNumber | SoftHard
Paths = Annotated[list[str], Meta(max_length=256, description="a list of at most 256 paths")]
Mode = Literal["ro", "rw"]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the file; what is not in it comes from the policy it extends."""


class MemoryTable(_Table, frozen=True, kw_only=True):
    """Memory of all processes of a call together."""

    max: SizeOrNone | UnsetType = UNSET
    high: SizeOrNone | UnsetType = UNSET
    swap: SizeOrZero | UnsetType = UNSET
    burst: SizeOrNone | UnsetType = UNSET
    burst_seconds: Seconds | UnsetType = UNSET
    on_exhausted: p.Exhausted | UnsetType = UNSET
    throttle_seconds: SecondsOrZero | UnsetType = UNSET
    freeze_seconds: SecondsOrZero | UnsetType = UNSET


class CpuTable(_Table, frozen=True, kw_only=True):
    """Processor time of all processes of a call together."""

    max: Cpus | Literal["none"] | UnsetType = UNSET
    burst: CpuSeconds | Literal["none"] | UnsetType = UNSET
    weight: Weight | Literal["none"] | UnsetType = UNSET


class IoTable(_Table, frozen=True, kw_only=True):
    """Share of the block devices."""

    weight: Weight | Literal["none"] | UnsetType = UNSET


class PidsTable(_Table, frozen=True, kw_only=True):
    """Processes and threads."""

    max: Pids | Literal["none"] | UnsetType = UNSET


class TimeTable(_Table, frozen=True, kw_only=True):
    """How long a call may take."""

    timeout: Seconds | Literal["none"] | UnsetType = UNSET
    cpu: WholeSeconds | Literal["none"] | UnsetType = UNSET


class BindTable(_Table, frozen=True, kw_only=True):
    """A host file or directory that is shown inside."""

    source: str
    target: str | UnsetType = UNSET
    mode: Mode | UnsetType = UNSET


class FsTable(_Table, frozen=True, kw_only=True):
    """What a call sees and may write."""

    image: Image | UnsetType = UNSET
    root: Literal["ro", "scratch"] | UnsetType = UNSET
    workspace: Literal["rw", "ro", "none"] | UnsetType = UNSET
    binds: Annotated[list[BindTable], Meta(max_length=64, description="a list of at most 64 tables")] | UnsetType = UNSET
    masked: Paths | UnsetType = UNSET
    read_only: Paths | UnsetType = UNSET
    scratch: Size | UnsetType = UNSET
    file_size: SizeOrNone | UnsetType = UNSET
    landlock: bool | UnsetType = UNSET


class NetTable(_Table, frozen=True, kw_only=True):
    """What a call reaches."""

    mode: p.Network | UnsetType = UNSET
    allow: list[str] | UnsetType = UNSET
    hosts: dict[str, str] | UnsetType = UNSET


class EnvTable(_Table, frozen=True, kw_only=True):
    """Environment variables. ``pass`` is a word of Python's, hence the other name here."""

    pass_: list[str] | UnsetType = msgspec.field(name="pass", default=UNSET)
    set: dict[str, str] | UnsetType = UNSET
    forbid: list[str] | UnsetType = UNSET


class RlimitsTable(_Table, frozen=True, kw_only=True):
    """Resource limits of each process, in the units of getrlimit(2). There is no ``nproc``: pids.max sets it."""

    as_: Rlimit | UnsetType = msgspec.field(name="as", default=UNSET)
    core: Rlimit | UnsetType = UNSET
    cpu: Rlimit | UnsetType = UNSET
    data: Rlimit | UnsetType = UNSET
    fsize: Rlimit | UnsetType = UNSET
    locks: Rlimit | UnsetType = UNSET
    memlock: Rlimit | UnsetType = UNSET
    msgqueue: Rlimit | UnsetType = UNSET
    nice: Rlimit | UnsetType = UNSET
    nofile: Rlimit | UnsetType = UNSET
    rss: Rlimit | UnsetType = UNSET
    rtprio: Rlimit | UnsetType = UNSET
    rttime: Rlimit | UnsetType = UNSET
    sigpending: Rlimit | UnsetType = UNSET
    stack: Rlimit | UnsetType = UNSET


class ProcessTable(_Table, frozen=True, kw_only=True):
    """Who the tool is, and what it starts with."""

    user: User | UnsetType = UNSET
    group: User | UnsetType = UNSET
    groups: Annotated[list[Id], Meta(max_length=32, description="a list of at most 32 group ids")] | UnsetType = UNSET
    hostname: str | UnsetType = UNSET
    umask: Umask | UnsetType = UNSET
    oom_score_adj: OomScore | UnsetType = UNSET
    rlimits: RlimitsTable = RlimitsTable()
    env: EnvTable = EnvTable()


class SeccompTable(_Table, frozen=True, kw_only=True):
    """The system calls a tool may make."""

    profile: Profile | UnsetType = UNSET


class HintsTable(_Table, frozen=True, kw_only=True):
    """What the words of a memory hint stand for."""

    low: Size | UnsetType = UNSET
    medium: Size | UnsetType = UNSET
    high: Size | UnsetType = UNSET


class PolicyTables(_Table, frozen=True, kw_only=True):
    """A policy of agentrun: what a tool call may do."""

    name: Name
    description: Line
    extends: Name | UnsetType = UNSET
    best_effort: bool | UnsetType = UNSET
    memory: MemoryTable = MemoryTable()
    cpu: CpuTable = CpuTable()
    io: IoTable = IoTable()
    pids: PidsTable = PidsTable()
    time: TimeTable = TimeTable()
    fs: FsTable = FsTable()
    net: NetTable = NetTable()
    process: ProcessTable = ProcessTable()
    seccomp: SeccompTable = SeccompTable()
    hints: HintsTable = HintsTable()


def schema() -> dict[str, Any]:
    """The JSON Schema of a policy file. What it cannot say (contradictions, paths) the loader checks besides."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(PolicyTables)}
