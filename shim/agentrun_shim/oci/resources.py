"""``linux.resources`` as control files of cgroup v2, in the order they have to be written.

config-linux.md "Control groups" is written for v1; the numbers are converted as runc and crun do: shares to weight linearly, swap
as what is beyond memory, 0 as not set and -1 as no limit. ``unified`` comes last, as it stands.
"""

from __future__ import annotations

from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Files = list[tuple[str, str]]
_NONE = (
    ("network", "classID", "cgroup v2 has no net_cls (a BPF program can look at the cgroup instead)"),
    ("network", "priorities", "cgroup v2 has no net_prio"),
    ("memory", "swappiness", "cgroup v2 has no swappiness of its own for a cgroup"),
    ("memory", "disableOOMKiller", "cgroup v2 always kills what is out of memory"),
)
"""What only cgroup v1 had. ``memory.kernel`` and ``kernelTCP`` are passed over: deprecated, and counted in ``limit`` here."""


def to_files(resources: dict[str, Any]) -> Files:
    """Every limit as (file, text).

    Raises:
        OciError: one that cgroup v2 has no word for.
    """
    files: Files = []
    _memory(resources.get("memory") or {}, files)
    _cpu(resources.get("cpu") or {}, files)
    limit = (resources.get("pids") or {}).get("limit")
    if limit:
        files.append(("pids.max", "max" if limit < 0 else str(limit)))
    _block(resources.get("blockIO") or {}, files)
    for page in resources.get("hugepageLimits") or ():
        files.append((f"hugetlb.{page['pageSize']}.max", str(page["limit"])))
    for device, limits in (resources.get("rdma") or {}).items():
        words = [
            f"{key}={limits[name]}"
            for key, name in (("hca_handle", "hcaHandles"), ("hca_object", "hcaObjects"))
            if name in limits
        ]
        files.append(("rdma.max", f"{device} {' '.join(words)}"))
    for table, key, why in _NONE:
        if (resources.get(table) or {}).get(key):
            raise OciError(f"linux.resources.{table}.{key}: {why}")
    for file, text in (resources.get("unified") or {}).items():
        if "/" in file or not isinstance(text, str):
            raise OciError(f"linux.resources.unified: {file!r}: {text!r}: a file's name, and its text")
        files.append((file, text))
    return files


def _number(value: int) -> str:
    return "max" if value < 0 else str(value)


def _memory(memory: dict[str, Any], files: Files) -> None:
    limit, swap, reservation = memory.get("limit"), memory.get("swap"), memory.get("reservation")
    if swap:
        if swap > 0 and not (limit and limit > 0):
            raise OciError("linux.resources.memory: swap without a limit (swap is memory and swap together)")
        if swap > 0 and limit and swap < limit:
            raise OciError(f"linux.resources.memory: swap {swap} is less than limit {limit} (it is memory and swap together)")
    elif limit and limit < 0:
        swap = -1
    grow = limit is not None and limit < 0
    memory_file = [("memory.max", _number(limit))] if limit else []
    swap_file = []
    if swap:
        swap_file = [("memory.swap.max", "max" if swap < 0 or limit is None else str(swap - limit))]
    files += memory_file + swap_file if grow else swap_file + memory_file
    if reservation:
        files.append(("memory.low", _number(reservation)))


def _cpu(cpu: dict[str, Any], files: Files) -> None:
    if cpu.get("realtimeRuntime") or cpu.get("realtimePeriod"):
        raise OciError("linux.resources.cpu: cgroup v2 has no limits for real-time threads")
    if shares := cpu.get("shares"):
        files.append(("cpu.weight", str(1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142)))
    quota, period = cpu.get("quota"), cpu.get("period")
    if quota or period:
        text = "max" if not quota or quota < 0 else str(quota)
        files.append(("cpu.max", f"{text} {period}" if period else f"{text} 100000" if quota else text))
    if (burst := cpu.get("burst")) is not None:
        files.append(("cpu.max.burst", str(burst)))
    if (idle := cpu.get("idle")) is not None:
        files.append(("cpu.idle", str(idle)))
    if cpus := cpu.get("cpus"):
        files.append(("cpuset.cpus", cpus))
    if mems := cpu.get("mems"):
        files.append(("cpuset.mems", mems))


_RATES = {
    "throttleReadBpsDevice": "rbps", "throttleWriteBpsDevice": "wbps", "throttleReadIOPSDevice": "riops",
    "throttleWriteIOPSDevice": "wiops",
}  # fmt: skip


def _block(block: dict[str, Any], files: Files) -> None:
    if weight := block.get("weight"):
        # Of v1, 10 to 1000; io.weight goes to 10000. Which of the two files there is depends on the scheduler.
        files.append(("io.weight", f"default {1 + (weight - 10) * 9999 // 990}"))
    for device in block.get("weightDevice") or ():
        if device.get("weight"):
            files.append(("io.weight", f"{device['major']}:{device['minor']} {1 + (device['weight'] - 10) * 9999 // 990}"))
    for key, word in _RATES.items():
        for device in block.get(key) or ():
            files.append(("io.max", f"{device['major']}:{device['minor']} {word}={device['rate'] or 'max'}"))
