"""Attach the scheduler for calls, ``bpf/sched.c``, where the kernel has sched_ext. Optional: nothing else needs it.

BCC compiles it, as it does all else; what BCC cannot do is in ``structops``. So nothing has to be installed besides BCC.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path
from typing import Any

from agentrun.probes.attach import Attached
from agentrun.probes.btf import Btf
from agentrun.probes.loader import ProbesError, import_bcc, load
from agentrun.probes.structops import Function, attach_table, mark_kernel_calls

MAPS = ("turns", "terms", "tally", "parting", "notices")
"""Whose descriptors the daemon gets."""
STATE = Path("/sys/kernel/sched_ext/state")
TIMEOUT_MS = 5000
"""A runnable task that has not run for so long makes the kernel eject the scheduler. Its own default, and most, is 30 s."""
NAME = "agentrun"
_OPS = "sched_ext_ops"
_FUNCTIONS = (
    "select_cpu", "enqueue", "dispatch", "tick", "running", "stopping", "disable", "cpu_online", "cpu_offline", "init", "exit",
)  # fmt: skip
_SLEEPABLE = frozenset({"init"})
_VALUES = ("flags", "timeout_ms", "name")
_KERNEL = {
    "create_dsq": "scx_bpf_create_dsq", "insert_vtime": "__scx_bpf_dsq_insert_vtime", "nr_queued": "scx_bpf_dsq_nr_queued",
    "move_to_local": "scx_bpf_dsq_move_to_local", "kick_cpu": "scx_bpf_kick_cpu", "task_cpu": "scx_bpf_task_cpu",
    "pick_idle_cpu": "scx_bpf_pick_idle_cpu", "select_cpu_dfl": "scx_bpf_select_cpu_dfl", "set_slice": "scx_bpf_task_set_slice",
    "cpumask_test_cpu": "bpf_cpumask_test_cpu",
}  # fmt: skip
"""Names of ``bpf/sched.c`` → the kernel's functions."""
_OFFSETS = {
    "CGROUPS": "task_struct.cgroups", "CPUS_PTR": "task_struct.cpus_ptr", "SCX": "task_struct.scx", "PID": "task_struct.pid",
    "TASK_FLAGS": "task_struct.flags", "DFL_CGRP": "css_set.dfl_cgrp",
    "KN": "cgroup.kn", "SELF": "cgroup.self", "ID": "kernfs_node.id",
    "PARENT": "cgroup_subsys_state.parent", "CGROUP": "cgroup_subsys_state.cgroup", "DSQ_VTIME": "sched_ext_entity.dsq_vtime",
    "FLAGS": "sched_ext_entity.flags", "KIND": "scx_exit_info.kind", "EXIT_CODE": "scx_exit_info.exit_code",
    "REASON": "scx_exit_info.reason", "MSG": "scx_exit_info.msg",
}  # fmt: skip
_ENUMS = {
    "scx_ops_flags": ["SCX_OPS_SWITCH_PARTIAL"], "scx_kick_flags": ["SCX_KICK_IDLE", "SCX_KICK_PREEMPT"],
    "scx_enq_flags": ["SCX_ENQ_WAKEUP"], "scx_ent_flags": ["SCX_TASK_QUEUED"], "scx_public_consts": ["SCX_SLICE_DFL"],
}  # fmt: skip


class _Held:
    """The compiled program and the link: when this goes, the scheduler does."""

    def __init__(self, program: Any, link: int) -> None:
        self.program, self.link = program, link

    def close(self) -> None:
        """Unload it."""
        if self.link >= 0:
            os.close(self.link)
            self.link = -1


def attach_sched() -> Attached:
    """Compile, load and attach; it schedules the tasks with the policy SCHED_EXT from then on, of which there are none yet.

    Raises:
        ProbesError: this kernel has no sched_ext or lacks something of it, another scheduler is loaded, or the kernel refused.
    """
    begun = time.monotonic()
    try:
        btf = _read_btf()
        functions = {btf.ids[name]: name for name in _KERNEL.values()}
        program = load("sched", _defines(btf))
        table = {
            name: Function(mark_kernel_calls(_code(program, name), functions), name in _SLEEPABLE) for name in _FUNCTIONS
        }  # fmt: skip
        values = {
            "flags": struct.pack("<Q", btf.values["SCX_OPS_SWITCH_PARTIAL"]), "timeout_ms": struct.pack("<I", TIMEOUT_MS),
            "name": NAME.encode(),
        }  # fmt: skip
        link = attach_table(_OPS, btf, table, values, NAME)
    except OSError as error:
        raise ProbesError(f"sched_ext: {error.strerror or error}{_why_not()}") from error
    except (LookupError, ValueError) as error:
        raise ProbesError(f"sched_ext: {error}") from error
    maps = {name: program[name.encode()].map_fd for name in MAPS}
    return Attached("sched", maps, time.monotonic() - begun, {}, _Held(program, link))


def _read_btf() -> Btf:
    """Everything the program and its loading have to know of this kernel.

    Raises:
        LookupError: what this kernel does not have.
        OSError: it has no BTF.
    """
    if not STATE.exists():
        raise LookupError("this kernel has none (CONFIG_SCHED_CLASS_EXT)")
    members: dict[str, list[str]] = {name: list(values) for name, values in _ENUMS.items()}
    members[_OPS] = [*_FUNCTIONS, *_VALUES]
    members[f"bpf_struct_ops_{_OPS}"] = ["data"]
    members["rq"] = ["ext_server"]
    for name in _OFFSETS.values():
        owner, member = name.split(".")
        members.setdefault(owner, []).append(member)
    btf = Btf(members, _KERNEL.values())
    places = {*_OFFSETS.values(), *(f"{_OPS}.{name}" for name in members[_OPS]), f"bpf_struct_ops_{_OPS}.data"}
    numbers = {name for names in _ENUMS.values() for name in names}
    missing = {*_KERNEL.values()} - btf.functions | places - btf.offsets.keys() | numbers - btf.values.keys()
    if missing:
        raise LookupError(f"this kernel's has no {', '.join(sorted(missing))}")
    if "rq.ext_server" not in btf.offsets:
        # Without it the tasks of calls could wait for normal ones until the kernel ejects the scheduler.
        raise LookupError("this kernel keeps no time for it beside normal tasks (no rq.ext_server)")
    return btf


def _defines(btf: Btf) -> dict[str, int | str]:
    defines: dict[str, int | str] = {f"OFF_{name}": btf.offsets[member] for name, member in _OFFSETS.items()}
    defines.update({f"KF_{name}": btf.ids[function] for name, function in _KERNEL.items()})
    defines.update({name: f"{value}ull" for name, value in btf.values.items()})
    return {**defines, "CPUS": _possible_cpus()}


def _code(program: Any, member: str) -> bytes:
    bcc = import_bcc()
    name = f"agentrun_{member}".encode()
    start, size = bcc.lib.bpf_function_start(program.module, name), bcc.lib.bpf_function_size(program.module, name)
    if not start:
        raise LookupError(f"sched.c has no {name.decode()}")
    return ctypes.string_at(start, size)


def _possible_cpus() -> int:
    """Processors that may ever be there."""
    return int(Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1].split("-")[-1]) + 1


def _why_not() -> str:
    """What is in the way of a scheduler, if that can be seen."""
    try:
        state = STATE.read_text().strip()
        if state != "disabled":
            name = STATE.parent.joinpath("root/ops").read_text().strip()
            return f" (the scheduler {name} is loaded, sched_ext is {state})"
    except OSError:
        pass
    return ""
